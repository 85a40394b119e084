"""Draw images from a trained model (Sec. 3.3.2, Eq. 8-10): noise -> counts -> tokens -> image.

    python sample.py --ckpt fsdd.pt                                a labelled grid of samples, samples.png
    python sample.py --ckpt fsdd.pt --out samples.gif              the set as it is refined, decoded at every step
    torchrun --nproc_per_node=8 sample.py --ckpt fsdd.pt --num_images 50000 --out samples.npz    for evaluation

The same seed gives the same images for any number of processes. Settings left out are the
checkpoint's; with another sampler than its own, guidance and cuts are those of SAMPLERS.
"""
import time

import torch
from tqdm import tqdm

import common
from data.command_line import listed
from data.pictures import decode
from data.samples import SampleFile
from dual_transform import counts_to_tokens
from fsdd import Denoiser, refine
from tokenizer import SetTokenizer
from train_fsdd import GENERATION

SAMPLERS = {  # settings of a sampler that is not the checkpoint's own
    "paper": {"guidance": [4.0, 50.0, 55.0], "top_p": 0.8, "top_k": 0},  # the authors', for the best FID
    "exchange": {"guidance": [0.5, 12.0], "top_p": 1.0, "top_k": 0},  # the digits'
}


def main(argv=None):
    args = parse(argv)
    device, rank, world_size = common.init_distributed(args.device)
    denoiser, tokenizer, checkpoint = load(args.ckpt, device)
    class_names = checkpoint["class_names"]
    try:
        labels = choose_labels(args.labels, args.num, class_names, len(class_names) if args.out[-3:] == "npz" else 10)
        settings = generation_settings(checkpoint["generation"], args)
        next(refine(denoiser, labels[:1].to(device), **settings))  # checks the settings
        samples = SampleFile(args, labels, checkpoint, settings, device)
    except ValueError as problem:
        common.stop(str(problem))
    if rank == 0:
        shown = listed([f"{label} ({class_names[label]})" for label in labels.unique_consecutive()], 10)
        print(f"generating {len(labels)} images of the classes {shown}:",
              ", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    began = time.time()
    parts = common.chunks(slice(0, len(labels)), args.batch)
    with samples:
        for first in tqdm(range(samples.done, len(parts), world_size), disable=rank > 0):
            mine = [draw_chunk(denoiser, tokenizer, labels[part], settings, first + rank, args, args.out[-3:] == "gif")
                    for part in parts[first + rank:first + rank + 1]]  # one; in the last round none on some ranks
            samples.add(common.all_gather(mine))
    if rank == 0:
        print(f"{args.out}: {len(labels)} images in {time.time() - began:.1f} s")


def parse(argv):
    parser = common.Parser(description=__doc__)
    parser.add_argument("--ckpt", default="fsdd.pt", help="checkpoint of train_fsdd.py (%(default)s)")
    parser.add_argument("--out", default="samples.png", help=".png: a labelled grid, .npz: ADM's sample batch, arr_0 "
                        "uint8 (N, H, W, 3) and arr_1 the labels, .gif: the set as it is refined (%(default)s)")
    parser.add_argument("--labels", help="class numbers or names, such as 3 or 0,1,cat (all; for pictures ten at most)")
    parser.add_argument("--num", "--num_images", type=int, default=100,  # torchrun takes --num for --numa-binding
                        help="images in all, spread evenly over the labels (100); under torchrun write --num_images")
    add_generation_options(parser)
    args = parser.parse_args(argv)
    if not args.out.endswith((".png", ".npz", ".gif")):
        parser.error(f"--out must end in .png, .npz or .gif, got {args.out}")
    check_generation_options(parser, args)
    if not args.out.endswith(".npz") and args.num > 1000:
        parser.error(f"{args.num} images are too many for a picture; use --out {args.out[:-4]}.npz")
    common.check_output(args.out)
    return args


def add_generation_options(parser):
    """The options that generated images depend on, for every script that generates."""
    for name, value, *_, meaning in GENERATION:
        parser.add_argument("--" + name.removeprefix("sample_"), type=type(value), help=f"{meaning} (the checkpoint's)")
    parser.add_argument("--batch", type=int, default=100, help="images at once (100); another gives other images")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--bf16", default="auto", choices=("auto", "on", "off"),
                        help="bfloat16 autocast of the denoiser; auto: where the processor is fast at it (auto)")


def check_generation_options(parser, args):
    """End with one sentence where a number is too small."""
    for name, least in (("num", 1), ("batch", 1), ("steps", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")


def load(path, device):
    """fsdd.pt -> (denoiser, tokenizer, the whole checkpoint), both with their averaged weights, on the device."""
    checkpoint = common.load_checkpoint(path, "python train_fsdd.py", "fsdd")
    return *models(checkpoint, device), checkpoint


def models(checkpoint, device):
    """The denoiser and the tokenizer of a checkpoint of train_fsdd.py, for use."""
    denoiser = Denoiser(**checkpoint["model_config"])
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
    numbers = {name: i for i, name in enumerate(class_names)} | {str(i): i for i in range(every)}
    try:
        classes = [numbers[name.strip()] for name in text.split(",")] if text else range(0, every, -(-every // at_most))
    except KeyError:
        raise ValueError(f"--labels must be numbers from 0 to {every - 1} or names of classes, such as "
                         f"{class_names[0]}, with commas between, got {text!r}") from None
    return torch.tensor(classes)[torch.arange(num) * len(classes) // num]


def generation_settings(defaults, args):
    """The settings of fsdd.refine(): the checkpoint's; where the sampler is not the checkpoint's, guidance and cuts of
    SAMPLERS; over them those of the command line. ValueError as guidance_weights()."""
    settings = {"sampler": "paper"} | defaults  # checkpoints from before there were two samplers
    settings.pop("adjust_from", None)           # and from when this could be set
    if args.sampler and args.sampler != settings["sampler"]:
        settings |= SAMPLERS.get(args.sampler, {})
    names = [name.removeprefix("sample_") for name, *_ in GENERATION]
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings["guidance"] = common.guidance_weights(settings["guidance"])
    return settings


def draw_chunk(denoiser, tokenizer, labels, settings, chunk, args, every_step=False):
    """One chunk of images, (frames, n, ch, H, W) uint8 on the CPU: the samples, or with every_step all states.

    labels: (n,).  settings: of fsdd.refine().  chunk: its number; the noise depends on it and on args.seed.
    """
    device = next(denoiser.parameters()).device
    with common.autocast(device, args.bf16):
        states = list(refine(denoiser, labels.to(device), **settings,
                             generator=common.generator(device, "sample", args.seed, chunk)))
    return torch.stack([decode(tokenizer, counts_to_tokens(x)) for x in states[0 if every_step else -1:]])


if __name__ == "__main__":
    common.run(main)
