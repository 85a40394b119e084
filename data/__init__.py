"""Images: the embedded digits and emoji, a folder of class folders, batches of them, token sets, inputs of an
evaluation."""
import torch

from data.embedded import EMBEDDED, Embedded
from data.image_folder import ImageFolder, read_image


def open_dataset(where, split, image_size, crop="center", flip=False, seed=0):
    """where: "digits", "emoji", or a folder that holds train/ and val/.  split: "train" or "test" (test is val/ in a
    folder).  image_size: None stands for the images' own size.

    A dataset has a length, root (a text for messages), channels, class_names, labels (N,) int64, fingerprint(), and
    __getitems__([(index, epoch), ...]) -> images (n, ch, H, W) uint8, labels (n,).
    crop, flip, seed: see ImageFolder; embedded images are not cropped.
    """
    if where not in EMBEDDED:
        return ImageFolder(where, split, image_size, crop, flip, seed)
    dataset = Embedded(where, split, flip, seed)
    if image_size not in (None, dataset.image_size):
        raise ValueError(f"{dataset.root} are {dataset.image_size} pixels wide, the model's images {image_size}; "
                         "give other images as --data or --recipe")
    return dataset


def open_example(name, image_size, channels, trained_on):
    """An image file, or a test image of the embedded data set that a model was trained on, such as digits:17
    -> (1, ch, H, W) uint8, and its label, None for a file. A dark drawing on light paper is inverted for a model of
    grey images. ValueError if there is no such image."""
    data, _, number = name.partition(":")
    if data not in EMBEDDED:
        pixels = read_image(name, image_size, channels)  # (H, W, ch)
        if channels == 1 and pixels.mean() > 127:
            print(f"{name} is dark on light; it is inverted, as the digits are light on dark")
            pixels = 255 - pixels
        return torch.from_numpy(pixels).permute(2, 0, 1)[None], None
    if data != trained_on:
        raise ValueError(f"--like must be an image file, as this model was not trained on the {data}; got {name}")
    dataset = open_dataset(data, "test", image_size)
    if not number.isdecimal() or int(number) >= len(dataset):
        raise ValueError(f"--like must be an image file, or {data}:0 to {data}:{len(dataset) - 1}; got {name}")
    return dataset.images[int(number)][None], dataset.labels[int(number)].item()
