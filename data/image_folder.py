"""Images in a folder of class folders, as ImageNet's: FOLDER/{train,val}/CLASS/NAME.JPEG."""
import hashlib
import os
import warnings

import numpy as np
import torch
from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")  # in small or capital letters
# of large images, of odd palettes and metadata: they are read all the same
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageFolder(torch.utils.data.Dataset):
    """folder: holds train/ and val/.  split: "train", or "test" for val/.  image_size: side of the square images.

    crop: "center" (ADM's) or "random" (shorter side to image_size, then a random position).
    flip: mirror half of the images. Crop and flip depend on (seed, epoch, index) and on nothing else.
    labels: (N,) int64, indices into class_names, which are the sorted names of the class folders.

    Class folders may hold folders. Files of any mode become RGB: alpha is left out, 16 bits lose the lower 8, of an
    animation the first image counts, EXIF rotation is not applied (as in ADM's statistics). Names that begin with a dot
    are left out.
    """

    channels = 3

    def __init__(self, folder, split, image_size, crop="center", flip=False, seed=0):
        self.root = root = os.path.join(folder, "train" if split == "train" else "val")
        if not os.path.isdir(root):
            raise ValueError(f"there is no folder {root}; images are expected as {root}/CLASS/NAME.JPEG")
        self.class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        found = [sorted(find_images(os.path.join(root, name), name)) for name in self.class_names]
        # arrays of bytes and numbers: a list of a million texts would be copied into every process that reads images

        self.names = np.array([os.fsencode(name) for files in found for name, _ in files])
        self.sizes = np.array([size for files in found for _, size in files])
        self.labels = torch.repeat_interleave(torch.tensor([len(files) for files in found], dtype=torch.int64))
        if not len(self.names):
            raise ValueError(f"there are no images in {root}; they are expected as {root}/CLASS/NAME.JPEG")
        self.image_size, self.crop, self.flip, self.seed = image_size, crop, flip, seed

    def __len__(self):
        return len(self.names)

    def __getitems__(self, items):
        """A batch: items (index, epoch) -> images (n, 3, H, W) uint8, labels (n,). ValueError where one is broken."""
        images = [self.read(index, epoch) for index, epoch in items]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), self.labels[[index for index, _ in items]]

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def read(self, index, epoch):
        """One image, (H, W, 3) uint8."""
        random = np.random.default_rng((self.seed, epoch, index))
        try:
            with Image.open(self.path(index)) as file:
                size = self.image_size
                image = center_crop(file, size) if self.crop == "center" else random_crop(file, size, random)
        except Exception as problem:  # broken files make Pillow raise exceptions of many kinds
            raise ValueError(f"{self.path(index)} can't be read ({reason(problem)})") from None
        pixels = np.asarray(image)
        return pixels[:, ::-1] if self.flip and random.random() < 0.5 else pixels

    def unreadable(self, indices):
        """Those of some files that can't be read: {name: reason}. All data are read; JPEGs at an eighth of the size."""
        found = {}
        for index in indices:
            try:
                with Image.open(self.path(index)) as file:
                    file.draft(None, (1, 1))
                    to_rgb(file)
            except Exception as problem:  # as above
                found[os.fsdecode(self.names[index])] = reason(problem)
        return found

    def drop(self, names):
        """Leave out the files of these names."""
        keep = ~np.isin(self.names, [os.fsencode(name) for name in names])
        self.names, self.sizes, self.labels = self.names[keep], self.sizes[keep], self.labels[torch.from_numpy(keep)]

    def fingerprint(self):
        """A text that changes when the names, within the split's folder, or the sizes of the files do."""
        return hashlib.sha256(b"\0".join(self.names.tolist()) + self.sizes.tobytes()).hexdigest()


def find_images(folder, name):
    """Pairs (name, size in bytes) of the image files below a folder; names begin with the folder's."""
    for entry in os.scandir(folder):
        inner = os.path.join(name, entry.name)
        if entry.name[0] == ".":  # such as ._a.jpg, which macOS makes and which is no image
            continue
        if entry.is_dir():
            yield from find_images(entry.path, inner)
        elif entry.name.lower().endswith(SUFFIXES):
            yield inner, entry.stat().st_size if entry.is_file() else -1  # -1: a broken link, which can't be read


def reason(problem):
    return " ".join(f"{type(problem).__name__}: {problem}".split())


def to_rgb(image):
    """An RGB image from one of any mode."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, size):
    """The middle square, exactly as ADM cuts it: halve with BOX while twice too large, BICUBIC, crop.

    But of a strip, longer than 100 times its width, only the middle is taken, for which ADM would need gigabytes.
    """
    image = to_rgb(image)
    longest = 100 * min(image.size)
    left, top = (max(0, side - longest) // 2 for side in image.size)
    if left or top:
        image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, random):
    """Shorter side to size, then a square at a random position; only what the square shows is resized.

    JPEGs at least twice too large are decoded at 1/2, 1/4 or 1/8 of their size (Pillow's draft).
    """
    image.draft(None, (size, size))
    image = to_rgb(image)
    scale = size / min(image.size)
    box = []  # left, top, right, bottom in the image as it is
    for side in image.size:
        resized = round(side * scale)
        start = random.integers(resized - size + 1)
        box.append((start * side / resized, min(side, (start + size) * side / resized)))
    (left, right), (top, bottom) = box
    return image.resize((size, size), Image.BICUBIC, (left, top, right, bottom))
