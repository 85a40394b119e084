"""Images in a folder of class folders, as ImageNet's: FOLDER/{train,val}/CLASS/NAME.JPEG."""
import hashlib
import os

import numpy as np
import torch
from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


class ImageFolder(torch.utils.data.Dataset):
    """folder: holds train/ and val/.  split: "train", or "test" for val/.  image_size: side of the square images.

    crop: "center" (ADM's) or "random" (shorter side to image_size, then a random place).  flip: mirror half of the images.
    Crop and flip hang on (seed, epoch, index) and on nothing else.
    labels: (N,) int64, places in class_names, which are the sorted names of the class folders.
    """

    channels = 3

    def __init__(self, folder, split, image_size, crop="center", flip=False, seed=0):
        self.root = root = os.path.join(folder, "train" if split == "train" else "val")
        if not os.path.isdir(root):
            raise ValueError(f"there is no folder {root}; images are expected as {root}/CLASS/NAME.JPEG")
        self.class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.paths, labels = [], []
        for label, name in enumerate(self.class_names):
            found = sorted(os.path.join(place, file) for place, _, files in os.walk(os.path.join(root, name), followlinks=True)
                           for file in files if file.lower().endswith(SUFFIXES))
            self.paths += found
            labels += [label] * len(found)
        if not self.paths:
            raise ValueError(f"there are no images in {root}; they are expected as {root}/CLASS/NAME.JPEG")
        self.labels = torch.tensor(labels)
        self.image_size, self.crop, self.flip, self.seed = image_size, crop, flip, seed

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, items):
        """A batch: items are (index, epoch) -> images (n, 3, H, W) uint8, labels (n,)."""
        images = [self.read(index, epoch) for index, epoch in items]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), self.labels[[index for index, _ in items]]

    def read(self, index, epoch):
        """One image, (H, W, 3) uint8."""
        size = self.image_size
        random = np.random.default_rng((self.seed, epoch, index))
        with Image.open(self.paths[index]) as file:
            image = resize_shorter_side(file.convert("RGB"), size)
        across, down = image.width - size, image.height - size
        if self.crop == "random":
            left, top = random.integers(across + 1), random.integers(down + 1)
        else:
            left, top = across // 2, down // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        return pixels[:, ::-1] if self.flip and random.random() < 0.5 else pixels

    def fingerprint(self):
        """A text that changes when the names or the sizes of the files do."""
        names = [f"{os.path.relpath(path, self.root)} {os.path.getsize(path)}" for path in self.paths]
        return hashlib.sha256("\n".join([str(self.image_size), *names]).encode()).hexdigest()


def resize_shorter_side(image, size):
    """Shorter side to size as ADM does it: halve with BOX while it is twice too large, then BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
