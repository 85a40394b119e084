"""The data sets in this repository: MNIST's digits (data/mnist/README.md) and emoji (data/emoji/README.md)."""
import gzip
import hashlib
import os

import numpy as np
import torch
from PIL import Image


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

    def not_applied(self):
        return ""


def path(folder, name):
    return os.path.join(os.path.dirname(__file__), folder, name)


def digits(split):
    """60,000 digits to train on and 10,000 to test on, (N, 1, 28, 28), ink 255 on background 0."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (read_idx(path("mnist", f"{prefix}-{name}-ubyte.gz")) for name in ("images-idx3", "labels-idx1"))
    return images[:, None], labels.long(), [str(digit) for digit in range(10)]


def read_idx(name):
    """A gzipped idx file of bytes -> uint8 tensor. The file: type and number of axes, the sizes, the data."""
    with gzip.open(name) as file:
        raw = file.read()
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(*sizes).copy())


def emoji(split):
    """4006 pictures to train on and 452 to test on, (N, 3, 32, 32), in 98 classes.

    The pictures of an emoji are two drawings, by Noto and by Twemoji, and where it comes in skin tones, both in one of
    the tones as well. All pictures of every tenth emoji are to test on.
    """
    with open(path("emoji", "emoji.tsv"), encoding="utf-8") as file:
        _, emoji, _, classes, _ = zip(*[line.rstrip("\n").split("\t") for line in file])
    class_names = list(dict.fromkeys(classes))
    labels = torch.tensor([class_names.index(name) for name in classes])
    number = np.unique(emoji, return_inverse=True)[1]  # of the emoji, the same for all its skin tones
    chosen = torch.from_numpy((number % 10 == 0) == (split == "test"))
    images = []
    for drawn_by in ("noto", "twemoji"):  # sheets of 64 columns
        with Image.open(path("emoji", f"{drawn_by}.webp")) as sheet:
            cells = torch.from_numpy(np.array(sheet)).unflatten(0, (-1, 32)).unflatten(2, (64, 32))
        images.append(cells.permute(0, 2, 4, 1, 3).flatten(0, 1)[:len(labels)][chosen])  # (n, 3, 32, 32)
    return torch.cat(images), labels[chosen].repeat(2), class_names


EMBEDDED = {"digits": digits, "emoji": emoji}
