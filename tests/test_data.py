"""The embedded digits and folders of images."""
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_dataset


def test_digits_are_mnist():
    """Broken: the embedded files would be incomplete or read wrongly, or the two splits mixed up."""
    for split, number, first, per_class in (("train", 60000, 5, 5923), ("test", 10000, 7, 980)):
        digits = open_dataset("digits", split, 28)
        assert len(digits) == number and digits.images.shape == (number, 1, 28, 28) and digits.images.dtype == torch.uint8
        assert digits.labels[0] == first and (digits.labels == 0).sum() == per_class
        assert digits.images[:, :, 0].float().mean() < 1 and digits.images[:, :, 14].float().mean() > 50  # ink is in the middle
        images, labels = digits.__getitems__([(3, 0), (0, 9)])
        assert torch.equal(images, digits.images[[3, 0]]) and torch.equal(labels, digits.labels[[3, 0]])


def test_no_test_digit_is_trained_on():
    """Broken: numbers on the test digits would be numbers on training digits."""
    train, test = ({hashlib.md5(image.tobytes()).digest() for image in open_dataset("digits", split, 28).images.numpy()}
                   for split in ("train", "test"))
    assert len(train) > 59990 and not train & test


@pytest.fixture
def folder(tmp_path):
    """Two classes, one image nested deeper, of various kinds; red ones are of the first class, blue ones of the second."""
    for name, mode, size, colour in (("train/n01/a.JPEG", "RGB", (80, 50), (255, 0, 0)), ("train/n01/deep/b.png", "RGBA", (40, 90), (255, 0, 0, 9)),
                                     ("train/n02/c.jpg", "RGB", (33, 32), (0, 0, 255)), ("train/n02/d.png", "L", (200, 131), 0),
                                     ("val/n01/e.jpg", "CMYK", (64, 64), (0, 255, 255, 0)), ("val/n02/f.png", "P", (32, 32), 0)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path)
    (tmp_path / "train" / "n02" / "notes.txt").write_text("no image")
    return str(tmp_path)


def test_folder_of_classes(folder):
    """Broken: labels would not be the places of the sorted class names, or images not be RGB of the size asked for."""
    train = open_dataset(folder, "train", 32, "random", True, seed=1)
    assert train.class_names == ["n01", "n02"] and train.labels.tolist() == [0, 0, 1, 1] and len(train) == 4
    images, labels = train.__getitems__([(2, 0), (0, 0), (1, 0)])
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and labels.tolist() == [1, 0, 0]
    means = images.float().mean((2, 3))
    assert means[0, 2] > 200 and means[1, 0] > 200 and means[2, 0] > 200
    test = open_dataset(folder, "test", 32)
    assert len(test) == 2 and test.__getitems__([(0, 0)])[0].float().mean((0, 2, 3))[0] > 100


def test_crops_hang_on_seed_epoch_and_index(tmp_path):
    """Broken: a resumed run would see other crops, or every epoch the same ones."""
    (tmp_path / "train" / "n01").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "n01" / "a.png")
    def read(seed, epoch):
        return open_dataset(str(tmp_path), "train", 32, "random", True, seed).__getitems__([(0, epoch)])[0]
    assert torch.equal(read(0, 0), read(0, 0))
    assert len({read(seed, epoch).numpy().tobytes() for seed in range(4) for epoch in range(4)}) > 5
    center = open_dataset(str(tmp_path), "train", 32).__getitems__([(0, 0)])[0]
    assert torch.equal(center, open_dataset(str(tmp_path), "train", 32).__getitems__([(0, 5)])[0])


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "train" / "n01").mkdir(parents=True)])
def test_empty_folders_are_refused(make, tmp_path):
    """Broken: a wrong --data would train on nothing."""
    make(tmp_path)
    with pytest.raises(ValueError, match="train.*CLASS/NAME.JPEG"):
        open_dataset(str(tmp_path), "train", 32)
