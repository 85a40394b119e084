"""Beside Table 5: quality against the number of sampling steps, by both samplers, on one model.

    python -m paper.table5_steps                                 the digits, fsdd.pt
    python -m paper.table5_steps --ckpt fsdd.pt --ref VIRTUAL_imagenet256_labeled.npz

Prints a Markdown table and draws steps.png, FID over steps. Guidance and cuts are those of SETTINGS, the same at every
number of steps.
"""
import argparse
import time

from PIL import Image, ImageDraw

import common
import evaluate_fid
from data import pictures
from paper import variants

CKPT, OUT = "fsdd.pt", "steps.png"
STEPS = (3, 6, 12, 25, 50)
SETTINGS = {"exchange": {"guidance": "0.5,12", "top_p": 1.0, "top_k": 0},    # the digits' recipe
            "paper": {"guidance": "4,30,30", "top_p": 1.0, "top_k": 2}}  # what the digits' recipe had before it
COLOURS = {"exchange": "#2e9d57", "paper": "#d0473a"}
WIDTH, HEIGHT, MARGIN = 560, 300, 48  # of the figure, pixels


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, rank, processes = common.init_distributed(args.device, tf32=False)
    try:
        found = {(sampler, steps): measure(sampler, steps, args, device, rank, processes)
                 for sampler in SETTINGS for steps in STEPS}
    except ValueError as problem:
        common.stop(str(problem))
    if rank > 0:
        return
    print("| sampler | steps | FID | precision | recall | classified as requested |\n|---|---|---|---|---|---|")
    for (sampler, steps), row in found.items():
        read = f"{row['read']:.1%}" if row["read"] is not None else ""
        print(f"| {sampler} | {steps} | {row['fid']:.1f} | {row['precision']:.2f} | {row['recall']:.3f} | {read} |")
    pictures.save(draw({key: row["fid"] for key, row in found.items()}), args.out)
    print(f"{args.out}: FID over steps; {(time.time() - began) / 60:.1f} min")


def measure(sampler, steps, args, device, rank, processes):
    """{"fid", "precision", "recall", "read"} of samples, on rank 0. ValueError as evaluate_fid.evaluate()."""
    given = {name: getattr(args, name) for name in ("data", "ref", "inception", "num")}
    options = given | SETTINGS[sampler] | {"sampler": sampler, "steps": steps, "device": device.type}
    options = [f"--{name}={value}" for name, value in options.items() if value is not None]
    found = evaluate_fid.evaluate(
        evaluate_fid.parse([f"--ckpt={args.ckpt}", f"--classifier={variants.CLASSIFIER}", *options]),
        device, rank, processes)
    if rank > 0:
        return None
    named = {name.removeprefix("digits_"): value for name, value in found.items()}
    return {"fid": named["fid"], "precision": named.get("precision", 0.0), "recall": named.get("recall", 0.0),
            "read": named.get("read_as_label")}


def draw(fids):
    """The figure: a line for each sampler. fids: {(sampler, steps): FID}."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, top = ImageDraw.Draw(page), max(fids.values()) * 1.05
    across = lambda steps: MARGIN + STEPS.index(steps) * (WIDTH - 2 * MARGIN) / (len(STEPS) - 1)  # noqa: E731
    up = lambda fid: HEIGHT - MARGIN - fid / top * (HEIGHT - 2 * MARGIN)  # noqa: E731
    pen.line((MARGIN, up(top), MARGIN, up(0), WIDTH - MARGIN, up(0)), fill="black")
    pen.text((MARGIN - 36, 16), "FID", fill="black")
    pen.text((WIDTH // 2 - 20, HEIGHT - 20), "steps", fill="black")
    for steps in STEPS:
        pen.text((across(steps) - 6, up(0) + 6), str(steps), fill="black")
    for i, sampler in enumerate(SETTINGS):
        points = [(across(steps), up(fids[sampler, steps])) for steps in STEPS]
        pen.line(points, fill=COLOURS[sampler], width=3)
        pen.text((WIDTH - MARGIN - 80, 16 + 14 * i), sampler, fill=COLOURS[sampler])
        for (x, y), steps in zip(points, STEPS):
            pen.text((x - 8, y - 16 if sampler == "paper" else y + 6), f"{fids[sampler, steps]:.0f}",
                     fill=COLOURS[sampler])
    return page


def parse(argv):
    parser = common.Parser(prog="python -m paper.table5_steps", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=CKPT, help=f"checkpoint of train_fsdd.py ({CKPT})")
    parser.add_argument("--out", default=OUT, help=f"the figure, .png ({OUT})")
    variants.add_options(parser, evaluate_fid.NUM_DIGITS)
    args = parser.parse_args(argv)
    pictures.check_picture(parser, args.out)
    args.steps = None
    return variants.check_options(parser, args)


if __name__ == "__main__":
    common.run(main)
