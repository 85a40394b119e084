"""The embedded digits: MNIST, 60,000 to train on and 10,000 to test on, 28 x 28, grey (data/mnist/README.md)."""
import gzip
import hashlib
import os

import numpy as np
import torch

FOLDER = os.path.join(os.path.dirname(__file__), "mnist")


class Digits(torch.utils.data.Dataset):
    """split "train" or "test".

    images: (N, 1, 28, 28) uint8, ink 255 on background 0.  labels: (N,) int64 in 0..9.
    """

    channels, root = 1, "data/mnist"
    class_names = [str(digit) for digit in range(10)]

    def __init__(self, split):
        prefix = {"train": "train", "test": "t10k"}[split]
        self.images = read_idx(f"{prefix}-images-idx3-ubyte.gz")[:, None]
        self.labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz").long()

    def __len__(self):
        return len(self.images)

    def __getitems__(self, items):
        """A batch: items are (index, epoch) -> images (n, 1, 28, 28) uint8, labels (n,)."""
        indices = [index for index, _ in items]
        return self.images[indices], self.labels[indices]

    def fingerprint(self):
        """A text that changes when the images or their order do."""
        return hashlib.sha256(self.images.numpy()).hexdigest()


def read_idx(name):
    """A gzipped idx file of bytes -> uint8 tensor. The file: type and number of axes, the sizes, the data."""
    path = os.path.join(FOLDER, name)
    try:
        with gzip.open(path) as file:
            raw = file.read()
        sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(*sizes).copy())
    except Exception as problem:  # it is cut, or a pointer of Git LFS
        raise ValueError(f"{path} can't be read ({type(problem).__name__}: {problem}); download it again") from None
