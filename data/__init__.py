"""Images: the embedded digits and emoji, a folder of class folders, batches of them, token sets, inputs of an
evaluation."""
from data.embedded import EMBEDDED, Embedded
from data.image_folder import ImageFolder


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
