"""Quality against the number of sampling steps, by both samplers for the paper's noise (next to Table 5).

    python -m paper.table5_steps                          the digits, fsdd.pt (digits.pt if there is none)

Prints a Markdown table and draws steps.png, the digits FID over the number of steps. All other settings of generation
are those of sample.GENERATION, the same for every number of steps. For a denoiser of masked tokens, the only sampler is
its own.
"""
import time

from PIL import Image, ImageDraw

import sample
from evaluate_fid import NUM_DIGITS
from paper import variants
from paper.inputs import DEVICE, read_options
from support.command_line import stop
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.pictures import save
from support.training import run

STEPS = (3, 6, 12, 25, 50)
COLOURS = {"masked": "#3a6fd0", "exchange": "#2e9d57", "paper": "#d0473a"}
WIDTH, HEIGHT, MARGIN = 560, 300, 48  # of the figure, pixels
OPTIONS = [
    ("--ckpt", sample.default_checkpoint(), "", "checkpoint of train_fsdd.py"),
    ("--num", NUM_DIGITS, "[2, inf)", "images to generate"),
    ("--out", "steps.png", "", "the figure"),
    DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table5_steps", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)
    checkpoint = load_checkpoint(args.ckpt, "python train_fsdd.py", "fsdd")
    if checkpoint.get("config", {}).get("data") != "digits":
        stop(f"{args.ckpt} was not trained on the digits; measure others by evaluate_fid.py --steps")
    samplers = ("masked",) if checkpoint["generation"]["prior"] == "masked" else ("exchange", "paper")
    found = {(sampler, steps): variants.evaluate(args.ckpt, device, num=args.num, sampler=sampler, steps=steps)
             for sampler in samplers for steps in STEPS}
    print("| sampler | steps | digits FID | precision | recall | classified as their label |\n|---|---|---|---|---|---|")
    for (sampler, steps), row in found.items():
        print(f"| {sampler} | {steps} | {row['digits_fid']:.1f} | {row['digits_precision']:.2f} "
              f"| {row['digits_recall']:.3f} | {row['classified_as_label']:.1%} |")
    save(draw({key: row["digits_fid"] for key, row in found.items()}), args.out)
    print(f"{args.out}: digits FID over steps; {(time.time() - began) / 60:.1f} min")


def draw(fids):
    """The figure: a line for each sampler. fids: {(sampler, steps): digits FID}."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, largest, floor = ImageDraw.Draw(page), max(fids.values()) * 1.05, HEIGHT - MARGIN
    columns = [MARGIN + i * (WIDTH - 2 * MARGIN) / (len(STEPS) - 1) for i in range(len(STEPS))]
    pen.line((MARGIN, MARGIN, MARGIN, floor, WIDTH - MARGIN, floor), fill="black")
    pen.text((MARGIN - 36, 16), "digits FID", fill="black")
    pen.text((WIDTH // 2 - 20, HEIGHT - 20), "steps", fill="black")
    for x, steps in zip(columns, STEPS):
        pen.text((x - 6, floor + 6), str(steps), fill="black")
    for i, sampler in enumerate(dict.fromkeys(sampler for sampler, _ in fids)):
        colour = COLOURS[sampler]
        pen.text((WIDTH - MARGIN - 80, 16 + 14 * i), sampler, fill=colour)
        points = [(x, floor - fids[sampler, steps] / largest * (floor - MARGIN)) for x, steps in zip(columns, STEPS)]
        pen.line(points, fill=colour, width=3)
        for (x, y), steps in zip(points, STEPS):
            pen.text((x - 8, y - 16 if sampler == "paper" else y + 6), f"{fids[sampler, steps]:.0f}", fill=colour)
    return page


if __name__ == "__main__":
    run(main)
