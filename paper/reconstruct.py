"""Fig. 4 (Sec. 4.2.1): images and their reconstructions from the tokens in five orders.

    python -m paper.reconstruct digits                                 the first test digits, tokenizer.pt
    python -m paper.reconstruct --ckpt tokenizer.pt images/            any number of folders and files

Writes reconstructions.png, a row for each image: the image as the tokenizer sees it (center crop), then the
reconstructions from its tokens in the encoder's order, reversed, shuffled, ascending and descending. A set has no
order, so the five must be alike; the largest difference is printed. Table 1 has the FID of all five:
paper/table1_order.py.
"""
import numpy as np
import torch
from tqdm import tqdm

from paper.inputs import DEVICE, SEED, read_images, read_options
from sample import load_tokenizer
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.pictures import grid, save, to_uint8
from support.seeds import generator
from support.training import run

COLUMNS = ("image", "as encoded", "reversed", "shuffled", "ascending", "descending")
OPTIONS = [
    ("images", (), "", "image files, folders of them, or the word digits"),
    ("--ckpt", "tokenizer.pt", "", "checkpoint of train_tokenizer.py or import_released_weights"),
    ("--out", "reconstructions.png", "", "the picture"),
    ("--num", 10, "[1, inf)", "images at most, the first ones by name"),
    SEED, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "reconstruct", __doc__, argv)
    device, _, _ = init_distributed(args.device, tf32=False)  # TF32's rounding would hide that of the orders
    checkpoint = load_checkpoint(args.ckpt, "python train_tokenizer.py", "tokenizer")
    tokenizer = load_tokenizer(checkpoint, device)
    images = read_images(args.images, args.num, tokenizer)  # (N, ch, H, W) uint8
    rows, squared, differences = [], [], []
    for i, image in enumerate(tqdm(images, disable=None)):
        image = image.to(device)
        tokens = tokenizer.encode(image[None] / 127.5 - 1)  # (1, M)
        shuffle = torch.randperm(tokens.shape[1], generator=generator("cpu", "order", args.seed, i)).to(device)
        decoded = tokenizer.decode(torch.cat(five_orders(tokens, shuffle)))  # (5, ch, H, W)
        squared.append((decoded[0].clamp(-1, 1) - (image / 127.5 - 1)).square().mean().item())
        differences.append((decoded - decoded[0]).abs().max().item())
        rows.append(torch.cat([image[None], to_uint8(decoded)]).cpu())
    save(grid(torch.cat(rows), len(COLUMNS), column_labels=COLUMNS), args.out)
    print(f"{args.out}: {len(rows)} images, mean squared error {np.mean(squared):.4f} for pixels in [-1, 1]; "
          f"from one order of the tokens to another a pixel changes by at most {max(differences):.1e}")


def five_orders(tokens, shuffle):
    """Tokens (B, M) in the five orders of Table 1; shuffle: (M,), a permutation."""
    return [tokens, tokens.flip(1), tokens[:, shuffle], tokens.sort(1).values, tokens.sort(1, descending=True).values]


if __name__ == "__main__":
    run(main)
