"""Fig. 1: one image through the method: image -> set of tokens -> counts -> set of tokens -> image.

    python -m paper.fig1_pipeline                              a test digit, fsdd.pt (digits.pt if there is none)
    python -m paper.fig1_pipeline --ckpt fsdd.pt --images photo.jpg

Writes figure1.png: the image, its tokens as an unordered set, the count of every code as a bar (Eq. 2), and the image
decoded from them.
"""
import torch
from PIL import Image, ImageDraw

import sample
from dual_transform import counts_to_tokens, tokens_to_counts
from paper.inputs import read_images, read_options
from support.pictures import save, to_pil
from support.training import run

SIDE, SET, BARS, GAP, TOP = 140, 200, 440, 40, 24  # pixels: images, the text of the set, the bars, arrows, titles
BLUE = "#3a6ea5"
OPTIONS = [
    ("--ckpt", sample.default_checkpoint(), "", "checkpoint of train_fsdd.py"),
    ("--images", "digits", "", "an image file, or the word digits: the first test digit"),
    ("--out", "figure1.png", "", "the picture"),
]


def main(argv=None):
    args = read_options(OPTIONS, "fig1_pipeline", __doc__, argv)
    _, tokenizer, _ = sample.load(args.ckpt, torch.device("cpu"))
    image = read_images([args.images], 1, tokenizer)  # (1, ch, H, W) uint8
    tokens = tokenizer.encode(image / 127.5 - 1)  # (1, M)
    counts = tokens_to_counts(tokens, tokenizer.codebook_size)  # (1, C)
    decoded = sample.decode(tokenizer, counts_to_tokens(counts))
    save(draw(image[0], tokens[0].tolist(), counts[0].tolist(), decoded[0]), args.out)
    print(f"{args.out}: {len(tokens[0])} tokens, {int((counts > 0).sum())} of {counts.shape[1]} codes")


def draw(image, tokens, counts, decoded):
    """The figure. image, decoded: (ch, H, W) uint8.  tokens: M integers.  counts: C integers."""
    page = Image.new("RGB", (2 * SIDE + SET + BARS + 3 * GAP + 16, TOP + SIDE + 8), "white")
    pen, middle, floor = ImageDraw.Draw(page), TOP + SIDE // 2, TOP + SIDE
    lefts = [8, 8 + SIDE + GAP, 8 + SIDE + SET + 2 * GAP, 8 + SIDE + SET + BARS + 3 * GAP]
    titles = ["image", f"set of M = {len(tokens)} tokens", f"counts X of the C = {len(counts)} codes", "image again"]
    for left, title in zip(lefts, titles):
        pen.text((left, 6), title, fill="black")
    for left in lefts[1:]:
        pen.line((left - 30, middle, left - 10, middle), fill="black")
        pen.polygon([(left - 10, middle - 4), (left - 4, middle), (left - 10, middle + 4)], fill="black")
    page.paste(to_pil(image).resize((SIDE, SIDE), Image.NEAREST), (lefts[0], TOP))
    pen.multiline_text((lefts[1], TOP + 8), set_as_text(tokens), fill="black", spacing=4)
    for code, count in enumerate(counts):
        bar(pen, (lefts[2], floor, BARS), code, len(counts), 0, count * (SIDE - 12) / max(counts), fill=BLUE)
    pen.line((lefts[2], floor, lefts[2] + BARS, floor), fill="black")
    page.paste(to_pil(decoded).resize((SIDE, SIDE), Image.NEAREST), (lefts[3], TOP))
    return page


def bar(pen, axis, code, codes, low, high, **colour):
    """Draw the bar of a code, one of codes, from low to high pixels above the axis (left, floor, width), if it is not
    empty; at least one pixel wide."""
    left, floor, width = axis
    if high > low:
        begin, end = left + code * width / codes, left + (code + 1) * width / codes
        pen.rectangle((begin, floor - high, max(end - 1, begin + 1), floor - low), **colour)


def set_as_text(tokens, columns=8, rows=7):
    """The tokens in rows of text, in braces, as a set has no order."""
    lines = [", ".join(map(str, tokens[i:i + columns])) for i in range(0, len(tokens), columns)]
    return "{" + ",\n ".join(lines[:rows]) + (", ..." if len(lines) > rows else "") + "}"


if __name__ == "__main__":
    run(main)
