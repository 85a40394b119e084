"""Fig. 1: one image on its way through the method: image -> set of tokens -> counts -> set of tokens -> image.

    python -m paper.fig1_pipeline                              a test digit, fsdd.pt
    python -m paper.fig1_pipeline --ckpt fsdd.pt --images photo.jpg

Writes figure1.png: the image, its tokens as an unordered set, the count of every code as bars (Eq. 2), and the image
that is decoded from them.
"""
import torch
from PIL import Image, ImageDraw

import common
import sample
from data import pictures
from dual_transform import counts_to_tokens, tokens_to_counts
from paper.reconstruct import read_images

CKPT = "fsdd.pt"
IMAGES = "digits"  # an image file, or the word digits: the first test digit
OUT = "figure1.png"
SIDE, SET, BARS, GAP, TOP = 140, 200, 440, 40, 24  # pixels: images, the text of the set, the bars, arrows, titles


def main(argv=None):
    args = parse(argv)
    _, tokenizer, checkpoint = sample.load(args.ckpt, torch.device("cpu"))
    channels = checkpoint["tokenizer"]["model_config"]["channels"]
    try:
        image = read_images([args.images], 1, tokenizer.image_size, channels)  # (1, ch, H, W) uint8
    except ValueError as problem:
        common.stop(str(problem))
    tokens = tokenizer.encode(image / 127.5 - 1)  # (1, M)
    counts = tokens_to_counts(tokens, tokenizer.codebook_size)  # (1, C)
    decoded = pictures.to_uint8(tokenizer.decode(counts_to_tokens(counts)))
    pictures.save(draw(image[0], tokens[0].tolist(), counts[0].tolist(), decoded[0]), args.out)
    print(f"{args.out}: {len(tokens[0])} tokens, {int((counts > 0).sum())} of {counts.shape[1]} codes")


def draw(image, tokens, counts, decoded):
    """The picture. image, decoded: (ch, H, W) uint8.  tokens: M integers.  counts: C integers."""
    page = Image.new("RGB", (2 * SIDE + SET + BARS + 3 * GAP + 16, TOP + SIDE + 8), "white")
    pen, middle = ImageDraw.Draw(page), TOP + SIDE // 2
    left = 8
    for title, width in (("image", SIDE), (f"set of M = {len(tokens)} tokens", SET),
                         (f"counts X of the C = {len(counts)} codes", BARS), ("image again", SIDE)):
        pen.text((left, 6), title, fill="black")
        if title.startswith("image"):
            page.paste(picture(image if left == 8 else decoded), (left, TOP))
        elif title.startswith("set"):
            pen.multiline_text((left, TOP + 8), wrapped(tokens), fill="black", spacing=4)
        else:
            bars(pen, counts, left, width)
        left += width
        if left + GAP < page.width:
            pen.line((left + 10, middle, left + 30, middle), fill="black")
            pen.polygon([(left + 30, middle - 4), (left + 36, middle), (left + 30, middle + 4)], fill="black")
        left += GAP
    return page


def picture(image):
    """(ch, H, W) uint8 -> a PIL image of SIDE pixels."""
    pixels = image.numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).resize((SIDE, SIDE), 0)


def wrapped(tokens, columns=8, at_most=7):
    """The tokens as text in rows, in braces, as a set has no order."""
    rows = [", ".join(map(str, tokens[i:i + columns])) for i in range(0, len(tokens), columns)]
    return "{" + ",\n ".join(rows[:at_most]) + (", ..." if len(rows) > at_most else "") + "}"


def bars(pen, counts, left, width):
    """A bar for every code, as tall as its count."""
    floor, unit = TOP + SIDE, (SIDE - 12) / max(counts)
    for j, count in enumerate(counts):
        if count:
            pen.rectangle((left + j * width / len(counts), floor - count * unit,
                           left + max((j + 1) * width / len(counts) - 1, j * width / len(counts) + 1), floor),
                          fill="#3a6ea5")
    pen.line((left, floor, left + width, floor), fill="black")


def parse(argv):
    parser = common.Parser(prog="python -m paper.fig1_pipeline", description=__doc__)
    parser.add_argument("--ckpt", default=CKPT, help=f"checkpoint of train_fsdd.py ({CKPT})")
    parser.add_argument("--images", default=IMAGES, help=f"an image file, or the word digits ({IMAGES})")
    parser.add_argument("--out", default=OUT, help=f"the picture, .png ({OUT})")
    args = parser.parse_args(argv)
    pictures.check_picture(parser, args.out)
    return args


if __name__ == "__main__":
    common.run(main)
