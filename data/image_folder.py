"""Images in a folder of class folders, such as ImageNet's: FOLDER/{train,val}/CLASS/NAME.JPEG."""
import contextlib
import hashlib
import os
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")  # in lower or upper case
# Pillow warns about large images, unusual palettes and metadata, but reads them
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageFolder(torch.utils.data.Dataset):
    """folder: contains train/ and val/.  split: "train", or "test" for val/; None for all images below folder, without
    classes.  image_size: width and height of the images; None: images are not cropped.

    crop: "center" (ADM's) or "random" (the shorter side resized to image_size, a random position).
    flip: mirror half of the images. Crop and flip depend on (seed, epoch, index) only.
    labels: (N,) int64, indices into class_names, the sorted names of the class folders that contain an image.

    Class folders may contain subfolders. Images of any mode become RGB: alpha is dropped, 16 bits are reduced to the
    upper 8, only the first image of an animation is read, EXIF rotation is not applied (as in ADM's statistics). Files
    and folders whose names begin with a dot are ignored.
    """

    channels = 3

    def __init__(self, folder, split, image_size, crop="center", flip=False, seed=0):
        self.root = root = os.path.join(folder, "train" if split == "train" else "val") if split else folder
        where = f"{root}/CLASS/NAME.JPEG" if split else f"files that end in {', '.join(SUFFIXES)}"
        if not os.path.isdir(root):
            raise ValueError(f"there is no folder {root}; images are expected as {where}")
        names = [name for name in find_images(root) if os.sep in name or not split]  # in a class folder
        if not names:
            raise ValueError(f"there are no images in {root}; they are expected as {where}")
        classes = [name.split(os.sep)[0] if split else "" for name in names]
        self.class_names, labels = np.unique(classes, return_inverse=True)
        self.class_names, self.labels = self.class_names.tolist(), torch.from_numpy(labels)
        # an array of bytes, as a list of a million strings would be copied into every worker process
        self.names = np.array([os.fsencode(name) for name in names])
        self.image_size, self.crop, self.flip, self.seed = image_size, crop, flip, seed

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
        random = np.random.default_rng((self.seed, epoch, index))
        try:
            with Image.open(self.path(index)) as file:
                size = self.image_size
                if size is None:
                    image = to_rgb(file)
                else:
                    image = center_crop(file, size) if self.crop == "center" else random_crop(file, size, random)
        except Exception as problem:  # Pillow raises exceptions of many kinds for damaged files
            raise ValueError(f"{self.path(index)} can't be read ({reason(problem)})") from None
        pixels = np.asarray(image)
        return pixels[:, ::-1] if self.flip and random.random() < 0.5 else pixels

    def not_applied(self, most=1000):
        """A sentence about alpha and EXIF rotation in at most so many of the images, spread evenly; "" if there is
        none."""
        paths = [self.path(index) for index in range(0, len(self), -(-len(self) // most))]
        alpha = rotated = 0
        for path in paths:
            with contextlib.suppress(Exception), Image.open(path) as file:  # damaged ones are reported by read()
                alpha += file.has_transparency_data
                rotated += file.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return (f"of {len(paths)} images looked at, {alpha} are transparent and {rotated} are rotated by EXIF, neither "
                "of which is applied" if alpha or rotated else "")

    def fingerprint(self):
        """A text that changes when the names, classes or sizes of the files do."""
        sizes = np.array([os.path.getsize(self.path(index)) for index in range(len(self))])
        return hashlib.sha256(b"\0".join(self.names.tolist()) + sizes.tobytes()).hexdigest()


def find_images(folder):
    """The image files below a folder, sorted by name; names are relative to the folder."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in files
                  if name[0] != "." and name.lower().endswith(SUFFIXES)]
    return sorted(found, key=lambda name: (name.split(os.sep)[0], name))


def read_image(path, size, channels):
    """The center crop of an image file, as ADM crops it, (size, size, ch) uint8. ValueError if it can't be read."""
    try:
        with Image.open(path) as file:
            image = center_crop(file, size)
    except Exception as problem:  # as in ImageFolder.read()
        raise ValueError(f"{path} can't be read ({reason(problem)})") from None
    return np.array(image if channels == 3 else image.convert("L")).reshape(size, size, channels)


def reason(problem):
    return " ".join(f"{type(problem).__name__}: {problem}".split())


def to_rgb(image):
    """An RGB image from one of any mode."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, size):
    """The center square, exactly as ADM crops it: halve with BOX while at least twice too large, resize with BICUBIC,
    crop.

    Exception: of an image more than 100 times longer than wide, only the middle is used, as ADM would need gigabytes.
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
    """Resize the shorter side to size, then crop a square at a random position; only this part of the image is resized.

    JPEGs that are at least twice too large are decoded at 1/2, 1/4 or 1/8 of their size (Pillow's draft).
    """
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
