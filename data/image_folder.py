"""Images in a folder of class folders, as ImageNet's: FOLDER/{train,val}/CLASS/NAME.JPEG."""
import hashlib
import os
import warnings
from collections import Counter

import numpy as np
import torch
from PIL import Image

from data.command_line import listed

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")  # in small or capital letters
NOT_DATA = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # folders of systems
# of large images, of odd palettes and metadata: they are read all the same
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageFolder(torch.utils.data.Dataset):
    """folder: holds train/ and val/.  split: "train", or "test" for val/; None for all images below folder, without
    classes.  image_size: side of the square images; None for all of each image.

    crop: "center" (ADM's) or "random" (shorter side to image_size, then a random position).
    flip: mirror half of the images. Crop and flip depend on (seed, epoch, index) and on nothing else.
    labels: (N,) int64, indices into class_names, which are the sorted names of the class folders that hold an image.
    passed_over: how many files of a kind are no images.  no_classes: the other folders' names, see summary().

    Class folders may hold folders. Files of any mode become RGB: alpha is left out, 16 bits lose the lower 8, of an
    animation the first image counts, EXIF rotation is not applied (as in ADM's statistics). Names that begin with a dot
    are left out, and so are the folders NOT_DATA and what is no regular file, such as a named pipe.
    """

    channels = 3

    def __init__(self, folder, split, image_size, crop="center", flip=False, seed=0):
        self.root = root = os.path.join(folder, "train" if split == "train" else "val") if split else folder
        if not os.path.isdir(root):
            raise ValueError(f"there is no folder {root}; images are expected as {root}/CLASS/NAME.JPEG")
        self.passed_over, self.no_classes, self.contents = Counter(), [], ""
        classes = {entry.name: [] for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."}
        classes = classes if split else {"": []}
        for file in find_images(root, "", self.passed_over):
            place = file[0].split(os.sep)[0] if split else ""
            if place in classes:
                classes[place].append(file)
            else:
                self.passed_over["outside the class folders"] += 1
        self.class_names = sorted(classes)
        found = [sorted(classes[name]) for name in self.class_names]
        # arrays of bytes and numbers: a list of a million texts would be copied into every process that reads images
        self.names = np.array([os.fsencode(name) for files in found for name, *_ in files])
        self.sizes, self.times = (np.array([file[i] for files in found for file in files]) for i in (1, 2))
        self.labels = torch.repeat_interleave(torch.tensor([len(files) for files in found], dtype=torch.int64))
        if not len(self.names):
            where = f"{root}/CLASS/NAME.JPEG" if split else f"names that end in {', '.join(SUFFIXES)}"
            raise ValueError(f"there are no images in {root}; they are expected as {where}{self.all_passed_over()}")
        self.drop([])
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
                if size is None:
                    image = to_rgb(file)
                else:
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

    def check(self, indices):
        """(unreadable(indices), the sum of a hash of the name and content of each of the others)."""
        found, contents = self.unreadable(indices), 0
        for index in indices:
            if os.fsdecode(self.names[index]) not in found:
                with open(self.path(index), "rb") as file:
                    content = hashlib.blake2b(self.names[index] + b"\0" + file.read(), digest_size=8)
                contents += int.from_bytes(content.digest(), "big")
        return found, contents

    def drop(self, names):
        """Leave out the files of these names, and the classes that no image is left of."""
        keep = ~np.isin(self.names, [os.fsencode(name) for name in names])
        labels = self.labels[torch.from_numpy(keep)]
        self.names, self.sizes, self.times = self.names[keep], self.sizes[keep], self.times[keep]
        held = labels.bincount(minlength=len(self.class_names)) > 0  # (classes,)
        self.no_classes += [name for name, holds in zip(self.class_names, held) if not holds]
        self.class_names = [name for name, holds in zip(self.class_names, held) if holds]
        self.labels = (held.cumsum(0) - 1)[labels]

    def fingerprint(self, contents=True):
        """A text that changes when the names, within the split's folder, or the sizes of the files do; with contents
        also when the classes or the contents do. Before drop_unreadable() has read the files, their times stand for
        the contents."""
        text = b"\0".join(self.names.tolist()) + self.sizes.tobytes()
        if contents:
            text += repr(self.class_names).encode() + (self.contents.encode() or self.times.tobytes())
        return hashlib.sha256(text).hexdigest()

    def summary(self):
        """One line: how many images and classes there are, and what was passed over."""
        classes = f" in {len(self.class_names)} classes" if self.class_names != [""] else ""
        names = f"; no class, for want of a readable image: {listed(self.no_classes)}" if self.no_classes else ""
        return f"{self.root}: {len(self)} images{classes}{self.all_passed_over()}{names}"

    def all_passed_over(self):
        kinds = [f"{number} {kind}" for kind, number in self.passed_over.most_common()]
        return f"; files passed over: {listed(kinds)}" if kinds else ""


def hidden(name):
    return name[0] == "." or name in NOT_DATA  # a dot: such as ._a.jpg, which macOS makes and which is no image


def find_images(folder, name, passed_over):
    """(name, size in bytes, (time of the content, time of the file)) of the image files below a folder; names begin
    with the folder's. passed_over: a Counter, to which the other files are added by their kind."""
    for entry in os.scandir(folder):
        inner = os.path.join(name, entry.name)
        if hidden(entry.name):
            passed_over["hidden"] += sum(len(files) for *_, files in os.walk(entry.path)) if entry.is_dir() else 1
        elif entry.is_dir():
            yield from find_images(entry.path, inner, passed_over)
        elif not entry.name.lower().endswith(SUFFIXES):
            passed_over[os.path.splitext(entry.name)[1].lower() or "without a suffix"] += 1
        elif entry.is_file():
            stat = entry.stat()
            yield inner, stat.st_size, (stat.st_mtime_ns, stat.st_ctime_ns)
        elif not os.path.exists(entry.path):  # a broken link, which can't be read
            yield inner, -1, (0, 0)
        else:
            passed_over["no regular file"] += 1


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
