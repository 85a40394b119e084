"""A folder of small real image files to test with, made from the digits: FOLDER/{train,val}/CLASS/... as ImageNet's."""
import os

import numpy as np
from PIL import Image

from data import open_dataset

# the odd ones; the others are RGB, JPEG
KINDS = {3: ("L", "jpg"), 7: ("CMYK", "JPG"), 11: ("P", "png"), 15: ("RGBA", "PNG")}


def make_image_folder(path, number=300, classes=10):
    """Write number readable images to path/train and a quarter of that to path/val, spread evenly over the classes d0,
    d1, ...

    Coloured digits, both sides 20 to 90 pixels; most are JPEGs, a few of other kinds (KINDS), some nested deeper. In
    train/ stand also one truncated JPEG (below 1 % where number is 100 or more), a hidden file and a text.
    Returns the path of the truncated file.
    """
    random = np.random.default_rng(0)
    for split, folder, count in (("train", "train", number), ("test", "val", number // 4)):
        digits = open_dataset("digits", split, 28)
        of_class = [(digits.labels == digit).nonzero().flatten().tolist() for digit in range(classes)]
        for i in range(count):
            digit = digits.images[of_class[i % classes][i // classes], 0].numpy()
            mode, suffix = KINDS.get(i, ("RGB", "JPEG"))
            place = os.path.join(path, folder, f"d{i % classes}", *["more", "deep"] * (i % 7 == 5))
            os.makedirs(place, exist_ok=True)
            coloured_digit(digit, random).convert(mode).save(os.path.join(place, f"{i:05}.{suffix}"))
    cut = os.path.join(path, "train", "d0", "cut.jpg")
    coloured_digit(digit, random).save(cut, "JPEG")
    os.truncate(cut, os.path.getsize(cut) * 9 // 10)
    for name, content in (("._00000.JPEG", b"\0\5\x16\7"), ("notes.txt", b"no image")):
        with open(os.path.join(path, "train", "d0", name), "wb") as file:
            file.write(content)
    return cut


def coloured_digit(digit, random):
    """A digit (28, 28) uint8 in a colour of its own on paper of another, of a size of its own."""
    paper, ink = random.integers(0, 120, 3), random.integers(136, 256, 3)
    pixels = paper + (ink - paper) * (digit[..., None] / 255)  # (28, 28, 3)
    return Image.fromarray(pixels.astype(np.uint8)).resize([int(side) for side in random.integers(20, 91, 2)],
                                                           Image.BICUBIC)
