"""Quality against the number of sampling steps, by the samplers that a model can have (next to Table 5).

    python -m paper.table5_steps                                 the digits, fsdd.pt (digits.pt if there is none)
    python -m paper.table5_steps --ckpt fsdd.pt --ref VIRTUAL_imagenet256_labeled.npz

Prints a Markdown table and draws steps.png, the FID over the number of steps. Guidance, top-p and top-k are those of
SETTINGS, the same for every number of steps.
"""
import time

from PIL import Image, ImageDraw

import generation
from evaluate_fid import NUM_EMBEDDED
from paper import variants
from paper.inputs import DATA, DEVICE, INCEPTION, NUM, REF, read_options
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.pictures import save
from support.training import run

STEPS = (3, 6, 12, 25, 50)
SETTINGS = {"reveal": {"guidance": "2.5", "top_p": 1.0, "top_k": 0},  # the digits' recipe, for hidden tokens
            "exchange": {"guidance": "0.5:12", "top_p": 1.0, "top_k": 0},  # these two for the paper's noise, with the
            "paper": {"guidance": "4,30,30", "top_p": 1.0, "top_k": 2}}    # best settings found for the digits
COLOURS = {"reveal": "#3a6fd0", "exchange": "#2e9d57", "paper": "#d0473a"}
WIDTH, HEIGHT, MARGIN = 560, 300, 48  # of the figure, pixels
OPTIONS = [
    ("--ckpt", generation.default_checkpoint(), "", "checkpoint of train_fsdd.py"),
    (NUM, None, "[2, inf)", f"images to generate (digits: {NUM_EMBEDDED})"),
    ("--out", "steps.png", "", "the figure"),
    DATA, REF, INCEPTION, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table5_steps", __doc__, argv)
    began = time.time()
    device, rank, world_size = init_distributed(args.device, tf32=False)
    options = {name: getattr(args, name) for name in ("data", "ref", "inception", "num")}
    prior = load_checkpoint(args.ckpt, "python train_fsdd.py", "fsdd")["generation"]["prior"]
    found = {(sampler, steps): variants.evaluate(args.ckpt, device, rank, world_size, **options, **settings,
                                                 sampler=sampler, steps=steps)
             for sampler, settings in SETTINGS.items() for steps in STEPS
             if (sampler == "reveal") == (prior == "hidden")}
    if rank > 0:
        return
    name = variants.named_fid(next(iter(found.values())))[0]
    print(f"| sampler | steps | {name} | precision | recall | classified as their label |\n|---|---|---|---|---|---|")
    for (sampler, steps), results in found.items():
        row = {key.removeprefix("digits_"): value for key, value in results.items()}
        classified = f"{row['classified_as_label']:.1%}" if "classified_as_label" in row else ""
        print(f"| {sampler} | {steps} | {row['fid']:.1f} | {row.get('precision', 0):.2f} | {row.get('recall', 0):.3f} "
              f"| {classified} |")
    save(draw({key: variants.named_fid(results)[1] for key, results in found.items()}, name), args.out)
    print(f"{args.out}: {name} over steps; {(time.time() - began) / 60:.1f} min")


def draw(fids, name):
    """The figure: a line for each sampler. fids: {(sampler, steps): FID}.  name: of the FID."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, largest, floor = ImageDraw.Draw(page), max(fids.values()) * 1.05, HEIGHT - MARGIN
    columns = [MARGIN + i * (WIDTH - 2 * MARGIN) / (len(STEPS) - 1) for i in range(len(STEPS))]
    pen.line((MARGIN, MARGIN, MARGIN, floor, WIDTH - MARGIN, floor), fill="black")
    pen.text((MARGIN - 36, 16), name, fill="black")
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
