"""Draw images from a trained model (Sec. 3.3.2, Eq. 8-10): noise -> counts -> tokens -> images.

    python sample.py --ckpt digits.pt                              a labelled grid of samples, samples.png
    python sample.py --ckpt fsdd.pt --out samples.gif              the set as it is refined, decoded at every step
    python sample.py --ckpt digits.pt --like digits:17             images that share tokens with an image
    torchrun --nproc_per_node=8 sample.py --ckpt fsdd.pt --num_images 50000 --out samples.npz    for evaluation

The same seed gives the same images for any number of processes. Settings that are not given are the checkpoint's.
"""
import time
from collections import deque

import torch
from tqdm import tqdm

from beyond import flip_times
from data import EMBEDDED, open_dataset
from data.evaluation_inputs import save_npz
from data.image_folder import read_image
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import generate, refine
from generation import (PROCESS, SAMPLERS, add_generation_options, choose_labels, decode, default_checkpoint,
                        generation_settings, load, refine_arguments)
from support.command_line import Parser, checked, listed, stop
from support.distributed import all_gather, chunks, rank_and_world_size
from support.files import check_outputs
from support.hardware import autocast, init_distributed
from support.pictures import grid, save, save_samples
from support.seeds import generator
from support.training import run

__all__ = ["SAMPLERS", "draw_images", "generate_images", "main"]


def main(argv=None):
    args = parse(argv)
    device, rank, _ = init_distributed(args.device)
    denoiser, tokenizer, checkpoint = load(args.ckpt, device)
    class_names = checkpoint["class_names"]
    try:
        at_most = len(class_names) if args.out.endswith(".npz") else 10
        labels = choose_labels(args.labels, args.num, class_names, at_most)
        settings = generation_settings(checkpoint["generation"], args)
        if args.like:
            if rank == 0:
                draw_like(denoiser, tokenizer, labels if args.labels else None, settings, args)
            return
    except ValueError as problem:
        stop(str(problem))
    if rank == 0:
        shown = listed([f"{label} ({class_names[label]})" for label in labels.unique_consecutive()], 10)
        print(f"generating {len(labels)} images of the classes {shown}:",
              ", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    began = time.time()
    images = generate_images(denoiser, tokenizer, labels, settings, args, every_step=args.out.endswith(".gif"))
    if rank > 0:
        for _ in images:  # this rank's share goes to rank 0, which writes the file
            pass
    elif args.out.endswith(".npz"):
        save_npz(args.out, images, labels, tokenizer.image_size)
    else:
        save_samples(args.out, torch.cat(list(images), dim=1), labels, class_names)
    if rank == 0:
        print(f"{args.out}: {len(labels)} images in {time.time() - began:.1f} s")


def generate_images(denoiser, tokenizer, labels, settings, args, every_step=False):
    """Yield the images of labels (N,) in chunks of args.batch, (frames, n, ch, H, W) uint8 on the CPU, on every rank.

    settings: see generation_settings().  every_step: a frame for every state, from noise to data; else only the last.
    """
    rank, world_size = rank_and_world_size()
    parts = chunks(slice(0, len(labels)), args.batch)
    for first in tqdm(range(0, len(parts), world_size), disable=rank > 0):
        images, chunk = None, first + rank  # one chunk for each rank; in the last round some have none
        if chunk < len(parts):
            images = draw_images(denoiser, tokenizer, labels[parts[chunk]], settings, chunk, args, every_step)
        yield from (found for found in all_gather(images) if found is not None)


def draw_images(denoiser, tokenizer, labels, settings, chunk, args, every_step=False):
    """One chunk of generate_images(), labels (n,). chunk: its number, which with args.seed determines the noise."""
    device = next(denoiser.parameters()).device
    random = generator(device, "sample", args.seed, chunk)
    with autocast(device, args.bf16):
        states = refine(denoiser, labels.to(device), **refine_arguments(settings), generator=random)  # each (n, C)
        states = list(states) if every_step else deque(states, maxlen=1)
    C = tokenizer.codebook_size  # hidden tokens, on a code of their own, are left out
    return torch.stack([decode(tokenizer, counts_to_tokens(x[:, :C])) for x in states])


@torch.no_grad()
def draw_like(denoiser, tokenizer, labels, settings, args):
    """Write a grid of images that share tokens with the image args.like: the image and its reconstruction, then a row
    for each number in args.keep of tokens that are kept; the other tokens are drawn. With the paper's noise, generation
    starts from the kept tokens and may change them.

    labels (n,): the classes of the 10 images in a row; None: the test image's own, or for a file the null class.
    """
    device, prior, M = denoiser.code_embedding.device, settings["prior"], tokenizer.num_tokens
    image, own = open_like(args.like, tokenizer)  # (1, ch, H, W) uint8
    if labels is None:
        labels = torch.tensor([denoiser.num_classes if own is None else own])
    labels = labels[torch.arange(10) * len(labels) // 10].to(device)  # (10,)
    if max(args.keep or [0]) > M:
        raise ValueError(f"--keep must be numbers from 0 to {M}, the tokens of an image, got {max(args.keep)}")
    tokens = tokenizer.encode(image.to(device) / 127.5 - 1).expand(len(labels), -1)  # (10, M)
    C, white = denoiser.codebook_size, torch.full_like(image, 255).expand(8, -1, -1, -1)
    rows, names = [image, decode(tokenizer, tokens[:1]), white], ["image, decoded"]
    noise, _ = PROCESS[prior]
    for keep in args.keep or [3 * M // 4, M // 2, M // 4, 0]:
        random = generator(device, "like", args.seed, keep)
        order = torch.rand(tokens.shape, generator=random, device=device).argsort(1)
        kept = tokens_to_counts(tokens.gather(1, order[:, :keep]), C)  # (10, C)
        x = kept + noise(len(labels), C, M - keep, prior, random, device)  # and noise for the others
        t = 1 - keep / M if prior == "hidden" else flip_times(torch.tensor(1 - keep / M)).item()
        with autocast(device, args.bf16):
            x = generate(denoiser, labels, **refine_arguments(settings), generator=random, start=(x, t))
        rows.append(decode(tokenizer, counts_to_tokens(x[:, :tokenizer.codebook_size])))
        names.append(f"{keep} of {M} kept")
    save(grid(torch.cat(rows), 10, names), args.out)
    print(f"{args.out}: images like {args.like}")


def open_like(name, tokenizer):
    """An image file, or a test image such as digits:17 or emoji:17 -> (1, ch, H, W) uint8, and its label or None."""
    size, channels = tokenizer.image_size, tokenizer.channels
    data, _, number = name.partition(":")
    if data not in EMBEDDED:
        return torch.from_numpy(read_image(name, size, channels)).permute(2, 0, 1)[None], None
    dataset = open_dataset(data, "test", size)
    if channels != dataset.channels or not number.isdigit() or int(number) >= len(dataset):
        raise ValueError(f"--like must be an image file, or for a model of {data} {data}:0 to "
                         f"{data}:{len(dataset) - 1}, got {name}")
    return dataset.images[int(number)][None], dataset.labels[int(number)].item()


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", default=default_checkpoint(), help="checkpoint of train_fsdd.py (%(default)s)")
    parser.add_argument("--out", default="samples.png", help=".png: a labelled grid, .npz: ADM's sample batch, arr_0 "
                        "uint8 (N, H, W, 3) and arr_1 the labels, .gif: the set as it is refined (%(default)s)")
    parser.add_argument("--like", help="an image file, or a test image such as digits:17 or emoji:17: draw images "
                        "that share tokens with it, a row for each number of tokens that are kept")
    parser.add_argument("--keep", type=checked(int, "[0, inf)"), nargs="+",
                        help="for --like: how many tokens to keep (3/4, 1/2, 1/4 and none)")
    parser.add_argument("--labels", help="class numbers or names, such as 3 or 0,1,cat (all; for pictures at most ten)")
    parser.add_argument("--num", "--num_images", type=checked(int, "[1, inf)"), default=100,
                        help="images in all, spread evenly over the labels (100); under torchrun, which has a --num of "
                             "its own, write --num_images")
    add_generation_options(parser)
    args = parser.parse_args(argv)
    if not args.out.endswith((".png", ".npz", ".gif")):
        parser.error(f"--out must end in .png, .npz or .gif, got {args.out}")
    if args.like and not args.out.endswith(".png"):
        parser.error(f"with --like, --out must end in .png, got {args.out}")
    if not args.out.endswith(".npz") and args.num > 1000:
        parser.error(f"{args.num} images are too many for a picture; use --out {args.out[:-4]}.npz")
    check_outputs(args.out, inputs=[args.ckpt, args.like])
    return args


if __name__ == "__main__":
    run(main)
