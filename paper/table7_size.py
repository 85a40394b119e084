"""Table 7 (Sec. 4.3.2): the size of the denoiser against generation, with one tokenizer.

    python -m paper.table7_size            the digits, tokenizer.pt: trains the recipe's denoiser and one half as wide

Prints a Markdown table with a row for each denoiser. The paper: S with 36 million parameters has a gFID of 5.56, B with
137 million 5.09. On ImageNet, each is a run of train_fsdd.py, measured by evaluate_fid.py.
"""
import time

import torch

import sample
from paper import variants
from paper.inputs import DEVICE, read_options
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.training import run

SIZES = ({"width": 48, "heads": 1}, {"width": 96, "heads": 3})  # the second is the recipe's
OPTIONS = [
    ("--ckpt", "tokenizer.pt", "", "checkpoint of train_tokenizer.py"),
    ("--num", 2000, "[2, inf)", "images to generate"),
    DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table7_size", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)
    load_checkpoint(args.ckpt, "python train_tokenizer.py", "tokenizer")  # exits if there is none
    rows = []
    for size in SIZES:
        path = variants.fsdd(args.ckpt, **size, device=args.device)
        denoiser, _, checkpoint = sample.load(path, torch.device("cpu"))
        parameters = sum(weight.numel() for weight in denoiser.parameters())
        rows.append((checkpoint["model_config"], parameters, variants.digits_fid(path, device, num=args.num)))
    print("| M | C | layers | width | parameters | digits FID |\n|---|---|---|---|---|---|")
    for config, parameters, fid in rows:
        print(f"| {config['num_tokens']} | {config['codebook_size']} | {config['layers']} | {config['width']} "
              f"| {parameters / 1e6:.2f} M | {fid:.1f} |")
    print(f"{(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    run(main)
