"""Quality against the number of sampling steps, by both samplers for the paper's noise (next to Table 5).

    python -m paper.table5_steps                          the digits, fsdd.pt (digits.pt if there is none)

Prints a Markdown table. All other settings of generation are the checkpoint's; another sampler has those of its column
in sample.GENERATION. For a denoiser of masked tokens, the only sampler is its own.
"""
import time

import sample
from paper import variants
from paper.inputs import DEVICE, read_options
from support.command_line import stop
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.training import run

STEPS = (3, 6, 12, 25, 50)
OPTIONS = [
    ("--ckpt", sample.default_checkpoint(), "", "checkpoint of train_fsdd.py"),
    ("--num", 2000, "[2, inf)", "images to generate"),
    DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table5_steps", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)
    checkpoint = load_checkpoint(args.ckpt, "python train_fsdd.py", "fsdd")
    if checkpoint.get("config", {}).get("data") != "digits":
        stop(f"{args.ckpt} was not trained on the digits; measure it by evaluate_fid.py --steps")
    samplers = ("masked",) if checkpoint["generation"]["prior"] == "masked" else ("paper", "exchange")
    print("| sampler | steps | digits FID | precision | recall | classified as their label |\n|" + "---|" * 6)
    for sampler in samplers:
        for steps in STEPS:
            found = variants.evaluate(args.ckpt, device, num=args.num, sampler=sampler, steps=steps)
            print(f"| {sampler} | {steps} | {found['digits_fid']:.1f} | {found['digits_precision']:.2f} "
                  f"| {found['digits_recall']:.3f} | {found['classified_as_label']:.1%} |", flush=True)
    print(f"{(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    run(main)
