"""Table 7 (Sec. 4.3.2): the size of the denoiser against generation (gFID), with one tokenizer.

    python -m paper.table7_size                           the digits: fsdd.pt, and one of half the width, trained here
    python -m paper.table7_size --ckpt fsdd_S.pt fsdd_B.pt --ref VIRTUAL_imagenet256_labeled.npz    the paper's S and B

Prints a Markdown table, a row for each denoiser; for the digits, with digits FIDs. The paper: S with 36 million
parameters 5.56, B with 137 million 5.09.
"""
import time

import torch

import train_fsdd
from evaluate_fid import NUM_EMBEDDED
from fsdd import Denoiser
from paper import variants
from paper.inputs import DATA, DEVICE, INCEPTION, NUM, REF, read_options
from support.command_line import stop
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.training import run

CKPT, TOKENIZER = "fsdd.pt", "tokenizer.pt"  # of the digits
SMALLER = 2  # width and heads of the other denoiser are divided by this, all else is the same
OPTIONS = [
    ("--ckpt", (), "", f"checkpoints of train_fsdd.py ({CKPT} of the digits, and a smaller one)"),
    (NUM, None, "[2, inf)", f"images to generate (digits: {NUM_EMBEDDED})"),
    ("--steps", None, "[1, inf)", "sampling steps (the checkpoint's)"),
    DATA, REF, INCEPTION, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table7_size", __doc__, argv)
    began = time.time()
    device, rank, world_size = init_distributed(args.device, tf32=False)
    options = {name: getattr(args, name) for name in ("data", "ref", "inception", "num", "steps")}
    rows = [(*size(path), *variants.fid(path, device, rank, world_size, **options))
            for path in args.ckpt or two_sizes(args)]
    if rank == 0:
        fid = "digits FID" if rows[0][2] == "digits FID" else "gFID"
        print(f"| M | C | layers | width | parameters | {fid} |\n|---|---|---|---|---|---|")
        for config, parameters, _, value in rows:
            print(f"| {config['num_tokens']} | {config['codebook_size']} | {config['layers']} | {config['width']} "
                  f"| {parameters / 1e6:.2f} M | {value:.1f} |")
        print(f"{(time.time() - began) / 60:.1f} min")


def size(path):
    """(the arguments of a checkpoint's denoiser, without a null code, and its number of parameters)."""
    checkpoint = load_checkpoint(path, "python train_fsdd.py", "fsdd")
    config, codes = checkpoint["model_config"], checkpoint["tokenizer"]["model_config"]["codebook_size"]
    with torch.device("meta"):  # shapes without values
        parameters = sum(weight.numel() for weight in Denoiser(**config).parameters())
    return config | {"codebook_size": codes}, parameters


def two_sizes(args):
    """The paths of the digits' denoisers: the smaller one, with all other settings of CKPT, trained unless it exists,
    and CKPT. Exits with one sentence if CKPT is not of the digits or not of TOKENIZER."""
    checkpoint = load_checkpoint(CKPT, "python train_fsdd.py", "fsdd")
    tokenizer = load_checkpoint(TOKENIZER, "python train_tokenizer.py", "tokenizer")
    settings = checkpoint.get("config", {})
    if settings.get("data") != "digits":
        stop(f"{CKPT} was not trained on the digits; give two or more denoisers of other images by --ckpt")
    weights, trained_with = tokenizer["weights"], checkpoint["tokenizer"]["weights"]
    if weights.keys() != trained_with.keys() or any(not torch.equal(weights[name], trained_with[name])
                                                    for name in weights):
        stop(f"{CKPT} was trained on the sets of another tokenizer than {TOKENIZER}; train it anew by "
             "python train_fsdd.py")
    changed = {name: settings.get(name, digits) for name, digits, *_ in train_fsdd.HYPERPARAMETERS
               if settings.get(name, digits) != digits and name not in variants.NOT_THE_MODEL}
    smaller = {name: max(1, checkpoint["model_config"][name] // SMALLER) for name in ("width", "heads")}
    return variants.fsdd(TOKENIZER, **changed | smaller, device=args.device), CKPT


if __name__ == "__main__":
    run(main)
