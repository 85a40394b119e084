"""What several scripts of this folder read: options, tokenizers with their test images, images in files and folders."""
import os

import numpy as np
import torch
from tqdm import tqdm

import evaluate_fid
from data import open_dataset
from data.image_folder import SUFFIXES, find_images, read_image
from data.loader import read_ahead
from paper.layouts import KINDS
from support.command_line import Parser, parse_as, stop
from support.distributed import chunks
from support.files import check_outputs, load_checkpoint

# Rows of OPTIONS, see read_options()
DATA = ("--data", None, "", "digits, emoji, or a folder with train/ and val/ (what the checkpoint was trained on)")
INCEPTION = ("--inception", None, "", "file of Inception's weights (downloaded to torch's cache)")
WORKERS = ("--workers", 0, "[0, inf)", "processes that read images")
SEED = ("--seed", 0, "[0, inf)", "another seed gives other random numbers")
DEVICE = ("--device", "auto", "", "auto, cpu or cuda")


def read_options(table, script, description, argv):
    """The options of a script, from a table of them and its command line.

    A row: the name, the default (a tuple for an option with several values), for an integer the interval that it must
    lie in, else "", and the meaning, which for the default None says what is done without the option.
    """
    parser = Parser(prog=f"python -m paper.{script}", description=description)
    for name, default, interval, meaning in table:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(name, default=default, type=parse_as(int if interval else str, interval),
                            nargs="+" if isinstance(default, tuple) else None,
                            help=meaning if shown in (None, "") else f"{meaning} ({shown})")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        parser.error("this script runs in one process; leave out torchrun")
    if "out" in args and not args.out.endswith(".png"):
        parser.error(f"--out must end in .png, got {args.out}")
    read = [vars(args).get(name) or [] for name in ("ckpt", "images")]  # one path, or several
    check_outputs(vars(args).get("out"), inputs=[path for paths in read for path in np.atleast_1d(paths)])
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and their test images


def open_tokenizer(path, data, device, kinds=("tokenizer",)):
    """(the tokenizer of a checkpoint of one of these kinds, without gradients; the test images of data; data).

    data: None for what the tokenizer was trained on. Exits with one sentence if the images do not fit the tokenizer.
    """
    checkpoint = load_checkpoint(path, "python train_tokenizer.py (or -m paper.layouts)", *kinds)
    data = data or checkpoint.get("config", {}).get("data")
    try:
        tokenizer, dataset = evaluate_fid.open_tokenizer(path, checkpoint, data, device, KINDS[checkpoint["kind"]])
    except ValueError as problem:
        stop(str(problem))
    return tokenizer.requires_grad_(False), dataset, data


def read_batches(dataset, num, image_size, device, workers):
    """num images spread evenly over a dataset: yields their indices, a list, and the images (n, ch, H, W) uint8."""
    at_once = min(250, max(1, 2 ** 20 // image_size ** 2))  # a million pixels, to bound memory
    chosen = evaluate_fid.evenly(len(dataset), num).tolist()
    indices = [chosen[part] for part in chunks(slice(0, len(chosen)), at_once)]
    images = read_ahead(dataset, ([(i, 0) for i in batch] for batch in indices), workers)
    for batch, (pixels, _) in zip(indices, tqdm(images, total=len(indices), disable=None)):
        yield batch, pixels.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Images in files and folders


def read_images(paths, num, tokenizer):
    """The first num images in files and folders, or the word digits, as a tokenizer takes them: (N, ch, H, W) uint8.

    Exits with one sentence if there are none, or one can't be read.
    """
    size, channels = tokenizer.image_size, tokenizer.channels
    if list(paths) == ["digits"]:
        if (size, channels) != (28, 1):
            stop(f"the digits are 28 pixels wide and grey, the tokenizer's images {size} with {channels} channels")
        return open_dataset("digits", "test", 28).images[:num]
    files = [file for path in paths for file in find_files(path)]
    try:
        images = np.stack([read_image(file, size, channels) for file in files[:num]])
    except ValueError as problem:
        stop(str(problem))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def find_files(path):
    """A file, or the images in a folder and its subfolders."""
    found = [path] if os.path.isfile(path) else [os.path.join(path, name) for name in find_images(path)[0]]
    if not found:
        stop(f"there is no image {path}, and no folder of that name with images ({', '.join(SUFFIXES)})")
    return found
