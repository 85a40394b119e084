"""Draw images from a trained model (Sec. 3.3.2, Eq. 8-10): noise -> counts -> tokens -> images.

    python sample.py --ckpt digits.pt                              a labelled grid of samples, samples.png
    python sample.py --ckpt fsdd.pt --out samples.gif              the set as it is refined, decoded at every step
    torchrun --nproc_per_node=8 sample.py --ckpt fsdd.pt --num_images 50000 --out samples.npz    for evaluation

The same seed gives the same images for any number of processes. Settings that are not given are the checkpoint's.
"""
import os
import time
from collections import deque

import torch
from tqdm import tqdm

from beyond import SparseDenoiser, exchange_step, exchange_times, guidance_ramp
from dual_transform import counts_to_tokens
from fsdd import Denoiser, paper_step, refine, uniform_times
from support.command_line import Parser, check_outputs, checked, listed, stop
from support.distributed import all_gather, chunks, rank_and_world_size
from support.files import load_checkpoint
from support.hardware import autocast, init_distributed
from support.pictures import save_npz, save_samples, to_uint8
from support.seeds import generator
from support.training import run
from tokenizer import SetTokenizer

# Settings of fsdd.refine(), for the pictures during training and as options of all scripts that generate. To add one,
# add a parameter to refine() and a row here; to add a sampler, an entry of SAMPLERS and its name in the first row.
GENERATION = [
    # name               digits          imagenet256      allowed               meaning
    ("sampler",          "exchange",     "paper",         "paper | exchange",   "Eq. 9-10, or beyond.py's"),
    ("sample_steps",     12,             25,              "[1, inf)",           "steps from noise to data"),
    ("guidance",         "0.5:12",       "4,50,55",       "",                   "one weight, thirds A,B,C, ramp A:B"),
    ("top_p",            1.0,            0.8,             "(0, 1]",             "keep the most probable counts"),
    ("top_k",            0,              0,               "[0, inf)",           "keep so many counts, 0 = all"),
]
SAMPLERS = {  # the arguments of refine() that make it use a sampler
    "paper": {"step": paper_step, "times": uniform_times},
    "exchange": {"step": exchange_step, "times": exchange_times},
}
DENOISERS = {"dense": Denoiser, "sparse": SparseDenoiser}


def main(argv=None):
    args = parse(argv)
    device, rank, _ = init_distributed(args.device)
    denoiser, tokenizer, checkpoint = load(args.ckpt, device)
    class_names = checkpoint["class_names"]
    try:
        at_most = len(class_names) if args.out.endswith(".npz") else 10
        labels = choose_labels(args.labels, args.num, class_names, at_most)
        settings = generation_settings(checkpoint["generation"], args)
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
    return torch.stack([decode(tokenizer, counts_to_tokens(x)) for x in states])


def decode(tokenizer, tokens):
    """Tokens (n, M) -> images (n, ch, H, W) uint8 on the CPU; a million pixels at a time, as MaskGIT-VQGAN needs
    memory."""
    at_once = max(1, 2 ** 20 // tokenizer.image_size ** 2)
    return torch.cat([to_uint8(tokenizer.decode(part)).cpu() for part in tokens.split(at_once)])


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", default=default_checkpoint(), help="checkpoint of train_fsdd.py (%(default)s)")
    parser.add_argument("--out", default="samples.png", help=".png: a labelled grid, .npz: ADM's sample batch, arr_0 "
                        "uint8 (N, H, W, 3) and arr_1 the labels, .gif: the set as it is refined (%(default)s)")
    parser.add_argument("--labels", help="class numbers or names, such as 3 or 0,1,cat (all; for pictures at most ten)")
    parser.add_argument("--num", "--num_images", type=checked(int, "[1, inf)"), default=100,
                        help="images in all, spread evenly over the labels (100); under torchrun, which has a --num of "
                             "its own, write --num_images")
    add_generation_options(parser)
    args = parser.parse_args(argv)
    if not args.out.endswith((".png", ".npz", ".gif")):
        parser.error(f"--out must end in .png, .npz or .gif, got {args.out}")
    if not args.out.endswith(".npz") and args.num > 1000:
        parser.error(f"{args.num} images are too many for a picture; use --out {args.out[:-4]}.npz")
    check_outputs(args.out, inputs=[args.ckpt])
    return args


def add_generation_options(parser):
    """The options that generated images depend on, for every script that generates."""
    for name, value, _, allowed, meaning in GENERATION:
        parser.add_argument("--" + name.removeprefix("sample_"), type=checked(type(value), allowed),
                            help=f"{meaning} (the checkpoint's)")
    parser.add_argument("--batch", type=checked(int, "[1, inf)"), default=100,
                        help="images at once (100); another number gives other images")
    parser.add_argument("--seed", type=checked(int, "[0, inf)"), default=0, help="another seed gives other images (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--bf16", default="auto", choices=("auto", "on", "off"),
                        help="bfloat16 autocast of the denoiser; auto: where it is fast (auto)")


def default_checkpoint():
    """fsdd.pt of train_fsdd.py or, as long as there is none, digits.pt, which the repository contains."""
    return "fsdd.pt" if os.path.isfile("fsdd.pt") else "digits.pt"


def load(path, device):
    """fsdd.pt -> (denoiser, tokenizer, the whole checkpoint), both with their averaged weights, on the device."""
    checkpoint = load_checkpoint(path, "python train_fsdd.py", "fsdd")
    return *models(checkpoint, device), checkpoint


def models(checkpoint, device):
    """The denoiser and the tokenizer of a checkpoint of train_fsdd.py, for use."""
    denoiser = DENOISERS[checkpoint["denoiser"]](**checkpoint["model_config"])
    denoiser.load_state_dict(checkpoint["weights"])
    tokenizer = SetTokenizer(**checkpoint["tokenizer"]["model_config"])
    tokenizer.load_state_dict(checkpoint["tokenizer"]["weights"])
    return denoiser.to(device).eval(), tokenizer.to(device).eval()


def choose_labels(text, num, class_names, at_most):
    """Labels (num,) int64, spread evenly over the classes in text, numbers and names such as "0,cat", one class after
    the other.

    Without text: over all classes, or at_most of them. ValueError for what is no class.
    """
    every = len(class_names)
    numbers = {str(i): i for i in range(every)} | {name: i for i, name in enumerate(class_names)}  # names count first
    try:
        classes = [numbers[name.strip()] for name in text.split(",")] if text else range(0, every, -(-every // at_most))
    except KeyError:
        raise ValueError(f"--labels must be numbers from 0 to {every - 1} or names of classes, such as "
                         f"{class_names[0]}, separated by commas, got {text!r}") from None
    return torch.tensor(classes)[torch.arange(num) * len(classes) // num]


def generation_settings(defaults, args):
    """The settings of refine() as a checkpoint has them, plain numbers and words; those of the command line come first.
    ValueError for a guidance that can't be read."""
    names = [name.removeprefix("sample_") for name, *_ in GENERATION]
    settings = defaults | {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    refine_arguments(settings)
    return settings


def refine_arguments(settings):
    """The keyword arguments of refine() for the settings of generation_settings()."""
    arguments = settings | {"guidance": parse_guidance(settings["guidance"])} | SAMPLERS[settings["sampler"]]
    del arguments["sampler"]
    return arguments


def parse_guidance(text):
    """ "4" -> [4.0], "4,50,55" -> [4.0, 50.0, 55.0], "0.5:12" -> guidance_ramp(0.5, 12.0). ValueError for anything
    else."""
    try:
        weights = [float(weight) for weight in text.replace(":", ",").split(",")]
        if not all(0 <= weight <= 1e6 for weight in weights) or ":" in text and (len(weights) != 2 or "," in text):
            raise ValueError
    except ValueError:
        raise ValueError("guidance must be numbers from 0 to 1e6, such as 4, or 4,50,55 for the three thirds of the "
                         f"time, or 0.5:12 for a ramp; got {text!r}") from None
    return guidance_ramp(*weights) if ":" in text else weights


if __name__ == "__main__":
    run(main)
