"""Table 7 (Sec. 4.3.2): the size of the denoiser against generation, with one tokenizer.

    python -m paper.table7_size          the digits: fsdd.pt, and one of half the width, trained here on tokenizer.pt

Prints a Markdown table with a row for each denoiser. The paper: S with 36 million parameters has a gFID of 5.56, B with
137 million 5.09. On ImageNet, each is a run of train_fsdd.py --model, measured by evaluate_fid.py.
"""
import time

import torch

import sample
import train_fsdd
from evaluate_fid import NUM_DIGITS
from paper import variants
from paper.inputs import DEVICE, read_options
from support.command_line import stop
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.training import run

SMALLER = 2  # width and heads of the other denoiser are divided by this, all else is the same
OPTIONS = [
    ("--ckpt", "fsdd.pt", "", "checkpoint of train_fsdd.py, of the digits"),
    ("--tokenizer", "tokenizer.pt", "", "checkpoint of train_tokenizer.py that it was trained on"),
    ("--num", NUM_DIGITS, "[2, inf)", "images to generate"),
    DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table7_size", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)
    rows = []
    for path in (smaller(args), args.ckpt):
        denoiser, _, checkpoint = sample.load(path, torch.device("cpu"))
        parameters = sum(weight.numel() for weight in denoiser.parameters())
        rows.append((checkpoint["model_config"], parameters, variants.digits_fid(path, device, num=args.num)))
    print("| M | C | layers | width | parameters | digits FID |\n|---|---|---|---|---|---|")
    for config, parameters, fid in rows:
        print(f"| {config['num_tokens']} | {config['codebook_size']} | {config['layers']} | {config['width']} "
              f"| {parameters / 1e6:.2f} M | {fid:.1f} |")
    print(f"{(time.time() - began) / 60:.1f} min")


def smaller(args):
    """The path of a denoiser with all settings of args.ckpt but a smaller width, trained unless it exists. Exits with
    one sentence if args.ckpt is not of the digits or not of args.tokenizer."""
    checkpoint = load_checkpoint(args.ckpt, "python train_fsdd.py", "fsdd")
    tokenizer = load_checkpoint(args.tokenizer, "python train_tokenizer.py", "tokenizer")
    settings = checkpoint.get("config", {})
    if settings.get("data") != "digits":
        stop(f"{args.ckpt} was not trained on the digits; measure other denoisers by evaluate_fid.py")
    weights, trained_with = tokenizer["weights"], checkpoint["tokenizer"]["weights"]
    if weights.keys() != trained_with.keys() or any(not torch.equal(weights[name], trained_with[name])
                                                    for name in weights):
        stop(f"{args.ckpt} was trained on the sets of another tokenizer than {args.tokenizer}; train it anew by "
             "python train_fsdd.py")
    changed = {name: settings.get(name, digits) for name, digits, *_ in train_fsdd.HYPERPARAMETERS
               if settings.get(name, digits) != digits and name not in variants.NOT_THE_MODEL}
    half = {name: max(1, checkpoint["model_config"][name] // SMALLER) for name in ("width", "heads")}
    return variants.fsdd(args.tokenizer, **changed | half, device=args.device)


if __name__ == "__main__":
    run(main)
