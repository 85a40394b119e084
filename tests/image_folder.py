"""A folder of small real image files made from the digits, arranged as ImageNet's: FOLDER/{train,val}/CLASS/..."""
import os

import numpy as np
from PIL import Image

from data import open_dataset

# modes and suffixes of a few images; the others are RGB and JPEG
KINDS = {3: ("L", "jpg"), 7: ("CMYK", "JPG"), 11: ("P", "png"), 15: ("RGBA", "PNG")}


def make_image_folder(path, number=300, classes=10):
    """Write number images to path/train and a quarter as many to path/val, spread evenly over the classes d0, d1, ...

    Coloured digits, both sides 20 to 90 pixels, some in subfolders of their class. train/d0 also contains a hidden file
    and a text file, which are no images.
    """
    random = np.random.default_rng(0)
    for split, folder, count in (("train", "train", number), ("test", "val", number // 4)):
        digits = open_dataset("digits", split, 28)
        of_class = [(digits.labels == digit).nonzero().flatten().tolist() for digit in range(classes)]
        for i in range(count):
            digit = digits.images[of_class[i % classes][i // classes], 0].numpy()
            mode, suffix = KINDS.get(i, ("RGB", "JPEG"))
            subfolder = os.path.join(path, folder, f"d{i % classes}", *["more", "deep"] * (i % 7 == 5))
            os.makedirs(subfolder, exist_ok=True)
            coloured_digit(digit, random).convert(mode).save(os.path.join(subfolder, f"{i:05}.{suffix}"))
    for name, content in (("._00000.JPEG", b"\0\5\x16\7"), ("notes.txt", b"no image")):
        with open(os.path.join(path, "train", "d0", name), "wb") as file:
            file.write(content)


def add_truncated_image(path):
    """Write a JPEG without its last tenth to path/train/d0; returns the path of the file."""
    digit = open_dataset("digits", "train", 28).images[0, 0].numpy()
    truncated = os.path.join(path, "train", "d0", "truncated.jpg")
    coloured_digit(digit, np.random.default_rng(1)).save(truncated, "JPEG")
    os.truncate(truncated, os.path.getsize(truncated) * 9 // 10)
    return truncated


def coloured_digit(digit, random):
    """A digit (28, 28) uint8 in one random colour on another, resized to a random width and height."""
    background, ink = random.integers(0, 120, 3), random.integers(136, 256, 3)
    pixels = background + (ink - background) * (digit[..., None] / 255)  # (28, 28, 3)
    size = [int(side) for side in random.integers(20, 91, 2)]
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.BICUBIC)
