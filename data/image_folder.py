"""Images in a folder of class folders, such as ImageNet's: FOLDER/{train,val}/CLASS/NAME.JPEG."""
import contextlib
import functools
import hashlib
import os
import unicodedata
import warnings
import zlib
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageOps

from support.command_line import list_first
from support.distributed import all_gather, is_main, rank_and_world_size, shard

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")  # in lower or upper case
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # of the contents; Pillow would start Ghostscript for others
# Pillow warns about large images, unusual palettes and metadata, but reads them
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageFolder(torch.utils.data.Dataset):
    """folder: contains train/ and val/.  split: "train", or "test" for val/; None for all images below folder, without
    classes.  image_size: width and height of the images; None: images are not cropped.

    crop: "center" (ADM's) or "random" (the shorter side resized to image_size, a random position).
    flip: mirror half of the images. Crop and flip depend on (seed, epoch, index) only.
    labels: (N,) int64, indices into class_names, the sorted names of the class folders that contain an image.

    Class folders may contain subfolders. Images of any mode become RGB: transparent ones lie on white, 16 bits are
    reduced to the upper 8, only the first image of an animation is read, EXIF rotation is applied. Files and folders
    whose names begin with a dot are ignored.
    """

    channels = 3

    def __init__(self, folder, split, image_size, crop="center", flip=False, seed=0):
        self.root = root = os.path.join(folder, "train" if split == "train" else "val") if split else folder
        names, left_out = find_images(root)
        left_out.update("outside a class" for name in names if split and os.sep not in name)
        names = [name for name in names if os.sep in name or not split]  # in a class folder
        if not names:
            where = f"{root}/CLASS/NAME.JPEG" if split else f"files that end in {', '.join(SUFFIXES)}"
            problem = "are no images in" if os.path.isdir(root) else "is no folder"
            raise ValueError(f"there {problem} {root}; images are expected as {where}")
        classes = [as_text(name.split(os.sep)[0]) if split else "" for name in names]
        self.class_names, labels = np.unique(classes, return_inverse=True)
        self.class_names, self.labels = self.class_names.tolist(), torch.from_numpy(labels)
        # an array of bytes, as a list of a million strings would be copied into every worker process
        self.names = np.array([os.fsencode(name) for name in names])
        self.image_size, self.crop, self.flip, self.seed = image_size, crop, flip, seed
        if is_main():
            others = list_first([f"{number} {kind}" for kind, number in left_out.most_common()], 5)
            inside = f" in {len(self.class_names)} classes" if split else ""
            print(f"{root}: {len(names)} images{inside}; left out: {others}", flush=True)

    def __len__(self):
        return len(self.names)

    def __getitems__(self, items):
        """A batch: items (index, epoch) -> images (n, 3, H, W) uint8, labels (n,). ValueError if one can't be read."""
        images = [self.read(index, epoch) for index, epoch in items]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), self.labels[[index for index, _ in items]]

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def read(self, index, epoch):
        """One image, (H, W, 3) uint8."""
        random, size = np.random.default_rng((self.seed, epoch, index)), self.image_size
        with open_image(self.path(index)) as file:
            image = random_crop(file, size, random) if self.crop == "random" else center_crop(file, size)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if self.flip and random.random() < 0.5 else pixels

    @functools.cache
    def fingerprint(self):
        """Two words. The first changes with the names of the files, the second with their contents: their sizes and up
        to 4 KB from the middle of each. So a copy of a folder has the fingerprint of the folder. Each rank reads its
        share of the files, once; all ranks have to call this together."""
        share = range(len(self))[shard(len(self), *rank_and_world_size())]
        contents = all_gather(np.array([self.checksum(index) for index in share], np.uint32))
        return " ".join(hashlib.sha256(part).hexdigest() for part in (b"\0".join(self.names), np.concatenate(contents)))

    def checksum(self, index):
        with open(self.path(index), "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size // 2 - 2048))
            return zlib.crc32(file.read(4096), size)


def find_images(folder):
    """The image files below a folder, sorted by name, and a Counter of what is left out. Names are relative to the
    folder. Links are followed, but each folder is searched once, by its own name rather than a link's."""
    found, left_out, searched, folders = [], Counter(), set(), [folder]
    while folders:
        path = folders.pop()
        if os.path.realpath(path) in searched or not os.path.isdir(path):
            continue
        searched.add(os.path.realpath(path))
        entries = (entry for entry in os.scandir(path) if entry.name[0] != ".")
        for entry in sorted(entries, key=lambda entry: entry.name):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                folders.insert(0 if entry.is_symlink() else len(folders), entry.path)  # links are popped last
            elif suffix in SUFFIXES and entry.is_file():
                found.append(os.path.relpath(entry.path, folder))
            else:
                left_out[suffix or "without a suffix" if entry.is_file() else "pipes or broken links"] += 1
    return sorted(found, key=lambda name: (name.split(os.sep)[0], name)), left_out


def as_text(name):
    """The name of a file or an argument as it is compared: UTF-8 in any locale, and NFC, as macOS may write NFD."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def read_image(path, size, channels):
    """The center crop of an image file, as ADM crops it, (size, size, ch) uint8. ValueError if it can't be read."""
    with open_image(path) as file:
        image = center_crop(file, size)
    return np.array(image if channels == 3 else image.convert("L")).reshape(size, size, channels)


@contextlib.contextmanager
def open_image(path):
    """Open an image file. A ValueError names the file if it can't be read in this context."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            yield file
    except Exception as problem:  # Pillow raises exceptions of many kinds for damaged files
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ValueError(f"{path} can't be read ({reason}); replace it by an image of the same name") from None


def to_rgb(image):
    """An RGB image from one of any mode."""
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, size):
    """The center square, exactly as ADM crops it: halve with BOX while at least twice too large, resize with BICUBIC,
    crop. Exception: of an image more than 100 times longer than wide, only the middle is used, as ADM would need
    gigabytes. With size None, the whole image."""
    image = to_rgb(image)
    if size is None:
        return image
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
    """Resize the shorter side to size, then crop a square at a random position; only this part of the image is resized.
    JPEGs that are at least twice too large are decoded at 1/2, 1/4 or 1/8 of their size (Pillow's draft)."""
    image.draft(None, (size, size))
    image = to_rgb(image)
    scale = size / min(image.size)
    box = []  # (left, right), (top, bottom), in pixels of the image before resizing
    for side in image.size:
        resized = round(side * scale)
        start = random.integers(resized - size + 1)
        box.append((start * side / resized, min(side, (start + size) * side / resized)))
    (left, right), (top, bottom) = box
    return image.resize((size, size), Image.BICUBIC, (left, top, right, bottom))
