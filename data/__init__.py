"""Images: the embedded digits or a folder of class folders, batches of them, token sets, inputs of an evaluation."""
from data.digits import Digits
from data.image_folder import ImageFolder


def open_dataset(where, split, image_size, crop="center", flip=False, seed=0):
    """where: "digits", or a folder that holds train/ and val/.  split: "train" or "test" (test is val/ in a folder).

    A dataset has a length, root (a text for messages), channels, class_names, labels (N,) int64, fingerprint(), and
    __getitems__([(index, epoch), ...]) -> images (n, ch, H, W) uint8, labels (n,).
    crop, flip, seed: see ImageFolder; the digits are neither cropped nor mirrored.
    """
    if where == "digits":
        if image_size != 28 or flip:
            raise ValueError("the digits are 28 pixels wide and not mirrored, "
                             f"got image_size {image_size} and flip {flip}")
        return Digits(split)
    return ImageFolder(where, split, image_size, crop, flip, seed)
