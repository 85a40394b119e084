"""The data sets in this repository: MNIST's digits (data/mnist/README.md) and emoji (data/emoji/README.md)."""
import gzip
import hashlib
import os

import numpy as np
import torch
from PIL import Image

FOLDER = os.path.dirname(__file__)


class Embedded(torch.utils.data.Dataset):
    """An embedded data set, held in memory.

    name: "digits" or "emoji".  split: "train" or "test".
    flip: mirror half of the images; which of them depends on (seed, epoch, index) only.
    images: (N, ch, H, W) uint8.  labels: (N,) int64, indices into class_names.
    """

    def __init__(self, name, split, flip=False, seed=0):
        self.root, self.flip, self.seed = f"the embedded {name}", flip, seed
        self.images, self.labels, self.class_names = EMBEDDED[name](split)
        self.channels, self.image_size = self.images.shape[1], self.images.shape[3]

    def __len__(self):
        return len(self.images)

    def __getitems__(self, items):
        """A batch: items are (index, epoch) -> images (n, ch, H, W) uint8, labels (n,)."""
        indices = [index for index, _ in items]
        images = self.images[indices]
        if self.flip:
            mirrored = torch.tensor([np.random.default_rng((self.seed, epoch, index)).random() < 0.5
                                     for index, epoch in items])
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images, self.labels[indices]

    def fingerprint(self):
        """A text that changes when the images or their order do."""
        return hashlib.sha256(self.images.numpy()).hexdigest()


def read(name, decode):
    """What decode returns for an open file of this folder. ValueError if the file is damaged."""
    path = os.path.join(FOLDER, name)
    try:
        with open(path, "rb") as file:
            return decode(file)
    except Exception as problem:  # it is cut, or a pointer of Git LFS
        raise ValueError(f"{path} can't be read ({type(problem).__name__}: {problem}); download it again") from None


def digits(split):
    """60,000 digits to train on and 10,000 to test on, (N, 1, 28, 28), ink 255 on background 0."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read(f"mnist/{prefix}-images-idx3-ubyte.gz", idx)  # (N, 28, 28)
    labels = read(f"mnist/{prefix}-labels-idx1-ubyte.gz", idx)
    return images[:, None], labels.long(), [str(digit) for digit in range(10)]


def idx(file):
    """A gzipped idx file of bytes -> uint8 tensor. The file: type and number of axes, the sizes, the data."""
    raw = gzip.decompress(file.read())
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(*sizes).copy())


def emoji(split):
    """4006 pictures to train on and 452 to test on, (N, 3, 32, 32), in 98 classes.

    The pictures of an emoji are two drawings, by Noto and by Twemoji, and where it comes in skin tones, both in one of
    the tones as well. All pictures of every tenth emoji are to test on.
    """
    emoji, classes = read("emoji/emoji.tsv", emoji_and_classes)
    class_names = list(dict.fromkeys(classes))
    labels = torch.tensor([class_names.index(name) for name in classes])
    number = np.unique(emoji, return_inverse=True)[1]  # of the emoji, the same for all its skin tones
    chosen = torch.from_numpy((number % 10 == 0) == (split == "test"))
    images = [read(f"emoji/{drawn_by}.webp", cells)[:len(labels)][chosen] for drawn_by in ("noto", "twemoji")]
    return torch.cat(images), labels[chosen].repeat(2), class_names


def emoji_and_classes(file):
    """emoji.tsv -> the code points without skin tone and the subcategory of each line."""
    _, emoji, _, classes, _ = zip(*[line.decode().rstrip("\n").split("\t") for line in file])
    return emoji, classes


def cells(file):
    """A sheet of 64 columns -> its cells, row by row, (N, 3, 32, 32) uint8."""
    with Image.open(file) as sheet:
        rows = torch.from_numpy(np.array(sheet)).unflatten(0, (-1, 32)).unflatten(2, (64, 32))
    return rows.permute(0, 2, 4, 1, 3).flatten(0, 1)


EMBEDDED = {"digits": digits, "emoji": emoji}
