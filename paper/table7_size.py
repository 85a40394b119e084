"""Table 7 (Sec. 4.3.2): the size of the denoiser against generation (gFID), on one tokenizer.

    python -m paper.table7_size                           the digits: fsdd.pt, and one half as wide that is trained here
    python -m paper.table7_size --ckpt fsdd_S.pt fsdd_B.pt --ref VIRTUAL_imagenet256_labeled.npz    the paper's S and B

Prints a Markdown table, a row for each denoiser; on the digits the gFID is a digits FID. The paper: S with 36 million
parameters 5.56, B with 137 million 5.09.
"""
import time

import torch

import common
import evaluate_fid
import train_fsdd
from fsdd import Denoiser
from paper import variants

CKPT, TOKENIZER = "fsdd.pt", "tokenizer.pt"  # of the digits
SMALLER = 2  # the other denoiser has so many times less width and heads, all else alike


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, rank, processes = common.init_distributed(args.device, tf32=False)
    options = {name: getattr(args, name) for name in ("data", "ref", "inception", "num", "steps")}
    try:
        rows = [(*size(path), variants.fid(path, device, rank, processes, **options))
                for path in args.ckpt or two_sizes(args)]
    except ValueError as problem:
        common.stop(str(problem))
    if rank == 0:
        print("| M | C | layers | width | parameters | gFID |\n|---|---|---|---|---|---|")
        for config, parameters, gfid in rows:
            print(f"| {config['num_tokens']} | {config['codebook_size']} | {config['layers']} | {config['width']} "
                  f"| {parameters / 1e6:.2f} M | {variants.number(gfid)} |")
        print(f"{(time.time() - began) / 60:.1f} min")


def size(path):
    """(what a checkpoint's denoiser is made from, its number of parameters)."""
    config = common.load_checkpoint(path, "python train_fsdd.py", "fsdd")["model_config"]
    with torch.device("meta"):  # sizes without numbers
        return config, sum(weight.numel() for weight in Denoiser(**config).parameters())


def two_sizes(args):
    """The paths of the digits' denoisers: the smaller one, trained now if it is not there, with all other settings of
    CKPT, and CKPT. ValueError where CKPT is not of the digits or of TOKENIZER."""
    checkpoint = common.load_checkpoint(CKPT, "python train_fsdd.py", "fsdd")
    tokenizer = common.load_checkpoint(TOKENIZER, "python train_tokenizer.py", "tokenizer")
    settings = common.BEFORE | checkpoint.get("config", {})
    if settings.get("data") != "digits":
        raise ValueError(f"{CKPT} was not trained on the digits; give two or more denoisers of other images by --ckpt")
    weights, its = tokenizer["weights"], checkpoint["tokenizer"]["weights"]
    if weights.keys() != its.keys() or any(not torch.equal(weights[name], its[name]) for name in weights):
        raise ValueError(f"{CKPT} was trained on the sets of another tokenizer than {TOKENIZER}; train it anew by "
                         "python train_fsdd.py")
    changed = {name: settings[name] for name, value, *_ in train_fsdd.HYPERPARAMETERS
               if settings.get(name, value) != value and name not in variants.NO_MATTER}
    smaller = {name: max(1, checkpoint["model_config"][name] // SMALLER) for name in ("width", "heads")}
    return variants.fsdd(TOKENIZER, **changed | smaller, device=args.device), CKPT


def parse(argv):
    parser = common.Parser(prog="python -m paper.table7_size", description=__doc__)
    parser.add_argument("--ckpt", nargs="+",
                        help=f"checkpoints of train_fsdd.py ({CKPT} of the digits, and a smaller one)")
    variants.add_options(parser, num=evaluate_fid.NUM_DIGITS)
    parser.add_argument("--steps", type=int, help="from noise to data (the checkpoint's)")
    return variants.check_options(parser, parser.parse_args(argv))


if __name__ == "__main__":
    common.run(main)
