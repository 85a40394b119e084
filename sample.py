"""Draw images from a trained model (Sec. 3.3.2, Eq. 8-10): noise -> counts -> tokens -> images.

    python sample.py --ckpt digits.pt                              a labelled grid of samples, samples.png
    python sample.py --ckpt fsdd.pt --out samples.gif              the counts step by step, decoded at every step
    python sample.py --ckpt digits.pt --like digits:17             images that start from tokens of an image
    torchrun --nproc_per_node=8 sample.py --ckpt fsdd.pt --num_images 50000 --out samples.npz    for evaluation

The same seed gives the same images for any number of processes. Settings that are not given are the checkpoint's.
train_fsdd.py, evaluate_fid.py, play.py and the scripts of paper/ use the functions below.
"""
import os
import time
from functools import partial

import torch
from tqdm import tqdm

import fsdd
import masked
from beyond import SparseDenoiser, flip_times, refine_by_exchange
from data import open_example
from data.evaluation_inputs import save_npz
from data.image_folder import as_text
from dual_transform import counts_to_tokens, tokens_to_counts
from support.command_line import Parser, list_first, parse_as, stop
from support.distributed import all_gather, chunks, rank_and_world_size
from support.files import check_outputs, load_checkpoint
from support.hardware import autocast, init_distributed
from support.pictures import grid, save, save_samples, to_uint8
from support.seeds import generator
from support.training import run
from tokenizer import SetTokenizer

SAMPLERS = {"paper": fsdd.refine, "exchange": refine_by_exchange, "masked": masked.refine}
NOISES = {  # the modules that draw X_1 and X_t, by the prior
    "multinomial": fsdd,  # the paper
    "distinct": fsdd,     # the authors' release
    "masked": masked,     # the denoiser has one more code, the mask code
}
DENOISERS = {"dense": fsdd.Denoiser, "sparse": SparseDenoiser}
GENERATION = [  # settings of generation. A checkpoint keeps the column of its recipe, or of its noise if that is masked
    # name       digits    emoji    imagenet256  masked    exchange    allowed                  meaning
    ("sampler",  "paper",  "paper", "paper",     "masked", "exchange", " | ".join(SAMPLERS), "which sampler"),
    ("steps",    36,       36,      25,          12,       12,         "[1, inf)",           "sampling steps"),
    ("times",    "middle", "middle", "even",     "even",   "middle",   "even | middle",      "spacing of their times"),
    ("guidance", "2,8,12", "2,8,12", "4,50,55",  "2.5",    "1,6,12",   "",                   "one, or several along t"),
    ("top_p",    1.0,      1.0,     0.8,         1.0,      1.0,        "(0, 1]",             "top-p sampling, 1 = off"),
    ("top_k",    2,        2,       0,           0,        0,          "[0, inf)",           "top-k sampling, 0 = off"),
]
COLUMNS = ("digits", "emoji", "imagenet256", "masked", "exchange")


def main(argv=None):
    args = parse(argv)
    device, rank, _ = init_distributed(args.device)
    denoiser, tokenizer, checkpoint = load(args.ckpt, device)
    class_names = checkpoint["class_names"]
    try:
        at_most = len(class_names) if args.out.endswith(".npz") else 10
        labels = choose_labels(args.labels, args.num, class_names, at_most)
        settings = generation_settings(checkpoint["generation"], args)
        refine = make_sampler(settings)
        if args.like:
            if rank == 0:
                draw_like(denoiser, tokenizer, checkpoint, labels if args.labels else None, refine, args)
            return
    except ValueError as problem:
        stop(str(problem))
    if rank == 0:
        shown = list_first([f"{label} ({class_names[label]})" for label in labels.unique_consecutive()], 10)
        print(f"generating {len(labels)} images of the classes {shown}:",
              ", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    began = time.monotonic()
    images = generate_images(denoiser, tokenizer, labels, refine, args, every_step=args.out.endswith(".gif"))
    if rank > 0:
        for _ in images:  # this rank's share goes to rank 0, which writes the file
            pass
    elif args.out.endswith(".npz"):
        save_npz(args.out, images, labels, tokenizer.image_size)
    else:
        save_samples(args.out, torch.cat(list(images), dim=1), labels, class_names)
    if rank == 0:
        print(f"{args.out}: {len(labels)} images in {time.monotonic() - began:.1f} s")


def generate_images(denoiser, tokenizer, labels, refine, args, every_step=False):
    """Yield the images of labels (N,) in chunks of args.batch, (frames, n, ch, H, W) uint8 on the CPU, on every rank.

    refine: see make_sampler().  every_step: a frame for every state, from noise to data; else only the last.
    """
    rank, world_size = rank_and_world_size()
    parts = chunks(slice(0, len(labels)), args.batch)
    for first in tqdm(range(0, len(parts), world_size), disable=rank > 0):
        images, chunk = None, first + rank  # one chunk for each rank; in the last round some have none
        if chunk < len(parts):
            images = draw_images(denoiser, tokenizer, labels[parts[chunk]], refine, chunk, args, every_step)
        yield from (found for found in all_gather(images) if found is not None)


def draw_images(denoiser, tokenizer, labels, refine, chunk, args, every_step=False):
    """One chunk of generate_images(), labels (n,). chunk: its number, which with args.seed determines the noise."""
    device = next(denoiser.parameters()).device
    random = generator(device, "sample", args.seed, chunk)
    with autocast(device, args.bf16):
        states = list(refine(denoiser, labels.to(device), generator=random))  # each (n, C)
    C = tokenizer.codebook_size  # masked tokens, on a code of their own, are left out
    return torch.stack([decode(tokenizer, counts_to_tokens(x[:, :C])) for x in states[0 if every_step else -1:]])


@torch.no_grad()
def draw_like(denoiser, tokenizer, checkpoint, labels, refine, args):
    """Write a grid of images that start from tokens of the image args.like: the image and its reconstruction, then a
    row for each of 3/4, 1/2, 1/4 and none of its tokens; the others are noise. Masked tokens are added to those that
    are kept. With the paper's noise, generation may also change these.

    labels (n,): the classes of the 10 images in a row; None: the test image's own, or for a file the null class.
    """
    device, M, prior = denoiser.code_embedding.device, tokenizer.num_tokens, checkpoint["generation"]["prior"]
    trained_on = checkpoint.get("config", {}).get("data")
    image, own = open_example(args.like, tokenizer.image_size, tokenizer.channels, trained_on)  # (1, ch, H, W) uint8
    if labels is None:
        labels = torch.tensor([denoiser.num_classes if own is None else own])
    labels = labels[torch.arange(10) * len(labels) // 10].to(device)  # (10,)
    tokens = tokenizer.encode(image.to(device) / 127.5 - 1).expand(len(labels), -1)  # (10, M)
    C, white = denoiser.codebook_size, torch.full_like(image, 255).expand(8, -1, -1, -1)
    rows, names = [image, decode(tokenizer, tokens[:1]), white], ["image, decoded"]
    for keep in (3 * M // 4, M // 2, M // 4, 0):
        random = generator(device, "like", args.seed, keep)
        order = torch.rand(tokens.shape, generator=random, device=device).argsort(1)
        kept = tokens_to_counts(tokens.gather(1, order[:, :keep]), C)  # (10, C)
        x = kept + NOISES[prior].sample_noise(len(labels), C, M - keep, prior, random, device)
        t = flip_times(torch.tensor(1 - keep / M)).item() if keep and prior != "masked" else 1 - keep / M
        with autocast(device, args.bf16):
            *_, x = refine(denoiser, labels, generator=random, start=(x, t))
        rows.append(decode(tokenizer, counts_to_tokens(x[:, :tokenizer.codebook_size])))
        names.append(f"from {keep} of {M}")
    save(grid(torch.cat(rows), 10, names), args.out)
    print(f"{args.out}: images like {args.like}")


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", default=default_checkpoint(), help="checkpoint of train_fsdd.py (%(default)s)")
    parser.add_argument("--out", default="samples.png", help=".png: a labelled grid, .npz: ADM's sample batch, arr_0 "
                        "uint8 (N, H, W, 3) and arr_1 the labels, .gif: the set as it is refined (%(default)s)")
    parser.add_argument("--like", help="an image file, or a test image such as digits:17 or emoji:17: draw images "
                        "from 3/4, 1/2, 1/4 and none of its tokens")
    parser.add_argument("--labels", help="class numbers or names, such as 3 or 0,1,cat (all; for pictures at most ten)")
    parser.add_argument("--num", "--num_images", type=parse_as(int, "[1, inf)"), default=100,
                        help="images in all, spread evenly over the labels (100); under torchrun, which has a --num of "
                             "its own, write --num_images")
    add_generation_options(parser)
    args = parser.parse_args(argv)
    suffixes = (".png",) if args.like else (".png", ".npz", ".gif")
    if os.path.splitext(args.out)[1] not in suffixes:
        parser.error(f"--out must end in {' or '.join(suffixes)}{' with --like' if args.like else ''}, got {args.out}")
    if args.num > 200 and not args.like and not args.out.endswith(".npz"):  # a side of a .gif has at most 65535 pixels
        parser.error(f"a picture has at most 200 images, got {args.num}; use --out {args.out[:-4]}.npz")
    check_outputs(args.out, inputs=[args.ckpt, args.like])
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Settings, labels and models; other scripts use them too


def default_settings(column, prior):
    """The settings of generation of a column of GENERATION, for a denoiser trained with this prior: a dict of numbers
    and words."""
    return {"prior": prior} | {row[0]: row[1 + COLUMNS.index(column)] for row in GENERATION}


def add_generation_options(parser):
    """The options that generated images depend on, for every script that generates."""
    for name, value, *_, allowed, meaning in GENERATION:
        choices = f": {allowed}" if "|" in allowed else ""
        parser.add_argument("--" + name, type=parse_as(type(value), allowed),
                            help=f"{meaning}{choices} (the checkpoint's)")
    parser.add_argument("--batch", type=parse_as(int, "[1, inf)"), default=100,
                        help="images at once (100); another number gives other images")
    parser.add_argument("--seed", type=parse_as(int, "[0, inf)"), default=0, help="another seed gives other images (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--bf16", default="auto", choices=("auto", "on", "off"),
                        help="bfloat16 autocast of the denoiser; auto: where it is fast (auto)")


def generation_settings(settings, args):
    """A checkpoint's settings of generation, changed by the command line. The samplers exchange and masked bring
    settings of their own."""
    if args.sampler in COLUMNS:
        settings = settings | default_settings(args.sampler, settings["prior"])
    given = {name: getattr(args, name) for name, *_ in GENERATION}
    return settings | {name: value for name, value in given.items() if value is not None}


def make_sampler(settings):
    """The sampler of the settings of generation, ready to be called: refine(denoiser, labels, generator=, start=), see
    fsdd.refine(). ValueError if the settings do not fit together."""
    sampler, prior = settings["sampler"], settings["prior"]
    if (sampler == "masked") != (prior == "masked"):
        raise ValueError(f"the sampler masked is for denoisers that were trained with masked tokens, and the only one "
                         f"for them; got sampler {sampler} and a denoiser trained with prior {prior}")
    guidance = parse_guidance(settings["guidance"])
    return partial(SAMPLERS[sampler], prior=prior, steps=settings["steps"], times=settings["times"],
                   guidance=guidance, top_p=settings["top_p"], top_k=settings["top_k"])


def parse_guidance(text):
    """ "4" -> [4.0], "4,50,55" -> [4.0, 50.0, 55.0]. ValueError for anything else."""
    try:
        weights = [float(weight) for weight in text.split(",")]
        if not all(0 <= weight <= 1e6 for weight in weights):
            raise ValueError
    except ValueError:
        raise ValueError("guidance must be numbers from 0 to 1e6, such as 4, or 4,50,55 for the three thirds of the "
                         f"time; got {text!r}") from None
    return weights


def choose_labels(text, num, class_names, at_most):
    """Labels (num,) int64 of the classes in text, numbers or names such as "0,cat": evenly spread, grouped by class.

    Without text: over all classes, or at_most of them. A class name that is also a number takes precedence over that
    number; a class with a comma in its name is given by its number. ValueError for unknown classes.
    """
    every = len(class_names)
    numbers = {str(i): i for i in range(every)} | {as_text(name): i for i, name in enumerate(class_names)}
    try:
        classes = [numbers[name.strip()] for name in as_text(text).split(",")] if text else []
    except KeyError:
        raise ValueError(f"--labels must be numbers from 0 to {every - 1} or names of classes, such as "
                         f"{class_names[0]}, separated by commas, got {text!r}") from None
    classes = classes or range(0, every, -(-every // at_most))
    return torch.tensor(classes)[torch.arange(num) * len(classes) // num]


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
    return denoiser.to(device).eval(), load_tokenizer(checkpoint["tokenizer"], device)


def load_tokenizer(checkpoint, device, model_class=SetTokenizer):
    """The tokenizer of a checkpoint of train_tokenizer.py, for use. model_class: see paper/layouts.py."""
    tokenizer = model_class(**checkpoint["model_config"])
    tokenizer.load_state_dict(checkpoint["weights"])
    return tokenizer.to(device).eval()


def decode(tokenizer, tokens):
    """Tokens (n, M) -> images (n, ch, H, W) uint8 on the CPU, about a million pixels at a time to bound the memory of
    MaskGIT-VQGAN."""
    at_once = max(1, 2 ** 20 // tokenizer.image_size ** 2)
    return torch.cat([to_uint8(tokenizer.decode(part)).cpu() for part in tokens.split(at_once)])


if __name__ == "__main__":
    run(main)
