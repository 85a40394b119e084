"""Images beside their reconstructions from the tokens in five orders (Sec. 4.2.1, Fig. 4, Tab. 1).

    python -m paper.reconstruct --ckpt tokenizer.pt images/            folders and files, in any number
    python -m paper.reconstruct --ckpt tokenizer.pt digits             the first test digits

Writes reconstructions.png, a row an image: the image as the tokenizer sees it (centre crop), then what is decoded from
its tokens in the encoder's order, reversed, shuffled, ascending and descending. A set has no order, so the five must be
alike; by how much they are not is printed. Table 1 takes rFID over them: paper/table1_order.py.
"""
import os
from collections import Counter

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
from data import pictures
from data.digits import Digits
from data.image_folder import SUFFIXES, center_crop, find_images, reason
from tokenizer import SetTokenizer

CKPT = "tokenizer.pt"
OUT = "reconstructions.png"
NUM = 10         # images at most
SEED = 0         # of the shuffled order
DEVICE = "auto"  # auto, cpu, cuda
COLUMNS = ("image", "as encoded", "reversed", "shuffled", "ascending", "descending")


def main(argv=None):
    args = parse(argv)
    device, _, _ = common.init_distributed(args.device, tf32=False)  # TF32 would blur what the orders differ by
    checkpoint = common.load_checkpoint(args.ckpt, "python train_tokenizer.py", "tokenizer")
    tokenizer = SetTokenizer(**checkpoint["model_config"])
    tokenizer.load_state_dict(checkpoint["weights"])
    tokenizer.to(device).eval()
    channels = checkpoint["model_config"]["channels"]
    try:
        images = read_images(args.images, args.num, tokenizer.image_size, channels)  # (N, ch, H, W) uint8
    except ValueError as problem:
        common.stop(str(problem))
    rows, squared, apart = [], [], []
    for i, image in enumerate(tqdm(images, disable=None)):
        image = image.to(device)
        tokens = tokenizer.encode(image[None] / 127.5 - 1)  # (1, M)
        shuffle = torch.randperm(tokens.shape[1], generator=common.generator("cpu", "order", args.seed, i)).to(device)
        decoded = tokenizer.decode(torch.cat(five_orders(tokens, shuffle)))  # (5, ch, H, W)
        squared.append((decoded[0].clamp(-1, 1) - (image / 127.5 - 1)).square().mean().item())
        apart.append((decoded - decoded[0]).abs().max().item())
        rows.append(torch.cat([image[None], pictures.to_uint8(decoded)]).cpu())
    pictures.save(pictures.grid(torch.cat(rows), len(COLUMNS), column_labels=COLUMNS), args.out)
    print(f"{args.out}: {len(rows)} images, mean squared error {np.mean(squared):.4f} for pixels in [-1, 1]; "
          f"from one order of the tokens to another a pixel changes by at most {max(apart):.1e}")


def parse(argv):
    parser = common.Parser(prog="python -m paper.reconstruct", description=__doc__)
    parser.add_argument("images", nargs="+", help="image files, folders of them, or the word digits")
    parser.add_argument("--ckpt", default=CKPT,
                        help=f"checkpoint of train_tokenizer.py or import_released_weights ({CKPT})")
    parser.add_argument("--out", default=OUT, help=f"the picture, .png ({OUT})")
    parser.add_argument("--num", type=int, default=NUM, help=f"images at most, the first ones by name ({NUM})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the shuffled order ({SEED})")
    parser.add_argument("--device", default=DEVICE, help=f"auto, cpu or cuda ({DEVICE})")
    args = parser.parse_args(argv)
    for name, least in (("num", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    pictures.check_picture(parser, args.out)
    return args


def five_orders(tokens, shuffle):
    """Tokens (B, M) in the five orders of Table 1; shuffle: (M,), a permutation."""
    return [tokens, tokens.flip(1), tokens[:, shuffle], tokens.sort(1).values, tokens.sort(1, descending=True).values]


def read_images(places, num, size, channels):
    """The first num images in files and folders -> (N, ch, size, size) uint8; ValueError where one can't be read."""
    if places == ["digits"]:
        if (size, channels) != (28, 1):
            raise ValueError("the digits are 28 pixels wide and grey, "
                             f"the tokenizer's images {size} with {channels} channels")
        return Digits("test").images[:num]
    paths = [path for place in places for path in image_paths(place)]
    return torch.from_numpy(np.stack([read_image(path, size, channels) for path in paths[:num]])).permute(0, 3, 1, 2)


def image_paths(place):
    """A file, or the images in a folder and the folders in it, by name; ValueError where there is none."""
    if os.path.isfile(place):
        return [place]
    found = find_images(place, "", Counter()) if os.path.isdir(place) else []
    found = sorted(os.path.join(place, name) for name, *_ in found)
    if not found:
        raise ValueError(f"there is no image {place}, and no folder of that name with images ({', '.join(SUFFIXES)})")
    return found


def read_image(path, size, channels):
    """The middle of an image file, cut out as ADM does it, (size, size, ch) uint8."""
    try:
        with Image.open(path) as file:
            image = center_crop(file, size)
    except Exception as problem:  # Pillow fails in many ways on a damaged file
        raise ValueError(f"the image {path} can't be read ({reason(problem)})") from None
    return np.asarray(image if channels == 3 else image.convert("L")).reshape(size, size, channels)


if __name__ == "__main__":
    common.run(main)
