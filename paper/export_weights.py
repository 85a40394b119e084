"""A checkpoint for publication: what generation needs, in half precision, without the state of the training.

    python -m paper.export_weights --ckpt fsdd.pt --out digits.pt

sample.py, evaluate_fid.py and the figures take it like any other checkpoint; --resume does not.
"""
import os

import torch

from support.command_line import Parser
from support.files import check_outputs, load_checkpoint, save_checkpoint
from support.training import run


def main(argv=None):
    parser = Parser(prog="python -m paper.export_weights", description=__doc__)
    parser.add_argument("--ckpt", default="fsdd.pt", help="checkpoint of train_fsdd.py (%(default)s)")
    parser.add_argument("--out", default="digits.pt", help="the checkpoint to write (%(default)s)")
    args = parser.parse_args(argv)
    check_outputs(args.out, inputs=[args.ckpt])
    checkpoint = load_checkpoint(args.ckpt, "python train_fsdd.py", "fsdd")
    names = ("kind", "denoiser", "model_config", "class_names", "images", "generation")
    exported = {name: checkpoint[name] for name in names if name in checkpoint}  # imported weights have no images
    exported |= {"weights": half(checkpoint["weights"]), "config": {"data": checkpoint.get("config", {}).get("data")},
                 "tokenizer": {"model_config": checkpoint["tokenizer"]["model_config"],
                               "weights": half(checkpoint["tokenizer"]["weights"])}}
    save_checkpoint(exported, args.out)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB")


def half(weights):
    """The state dict with all floating-point numbers in float16."""
    return {name: weight.half() if torch.is_floating_point(weight) else weight for name, weight in weights.items()}


if __name__ == "__main__":
    run(main)
