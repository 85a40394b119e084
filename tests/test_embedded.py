"""The embedded digits and emoji."""
import gzip
import os
import shutil

import pytest
import torch

from data import embedded, open_dataset


def test_digits_are_mnist():
    """Fails if the embedded files are incomplete, read wrongly or mixed up, or if a test digit is trained on."""
    contents = []
    for split, number, first, zeros in (("train", 60000, 5, 5923), ("test", 10000, 7, 980)):
        digits = open_dataset("digits", split, 28)
        assert len(digits) == number and digits.images.shape == (number, 1, 28, 28)
        assert digits.images.dtype == torch.uint8 and digits.class_names == list("0123456789")
        assert digits.labels[0] == first and (digits.labels == 0).sum() == zeros
        ink = digits.images.float().mean((0, 1, 3))  # of each row of pixels
        assert ink[0] < 1 and ink[14] > 50
        images, labels = digits.__getitems__([(3, 0), (0, 9)])
        assert torch.equal(images, digits.images[[3, 0]]) and torch.equal(labels, digits.labels[[3, 0]])
        contents.append({image.tobytes() for image in digits.images.numpy()})
    assert len(contents[0]) > 59990 and not contents[0] & contents[1]


def test_emoji_are_split_by_emoji():
    """Fails if the sheets, their table and the labels do not fit together, or if a held-out emoji is trained on."""
    train, test = (open_dataset("emoji", split, 32) for split in ("train", "test"))
    assert train.images.shape == (4006, 3, 32, 32) and test.images.shape == (452, 3, 32, 32)
    assert len(train.class_names) == 98 and train.class_names == test.class_names
    country = train.images[train.labels == train.class_names.index("country-flag")].float()
    assert country[:, :, :3].min() > 240 and country[:, :, 16].mean() < 200  # flags are wide, on white
    contents = [{image.tobytes() for image in dataset.images.numpy()} for dataset in (train, test)]
    assert len(contents[0] & contents[1]) <= 5  # flags of different countries that look the same
    with pytest.raises(ValueError, match="32 pixels wide, the model's images 28; give"):
        open_dataset("emoji", "train", 28)


def test_embedded_images_are_mirrored():
    """Fails if mirror images are not drawn anew in every epoch, or depend on the batch that an image is in."""
    plain, mirrored = open_dataset("emoji", "test", 32), open_dataset("emoji", "test", 32, flip=True, seed=3)
    items = [(i, epoch) for epoch in (0, 1) for i in range(100)]
    images, flipped = plain.__getitems__(items)[0], mirrored.__getitems__(items)[0]
    is_flipped = (flipped == images.flip(3)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) | is_flipped).all()
    assert 70 < is_flipped.sum() < 130 and not torch.equal(is_flipped[:100], is_flipped[100:])
    assert torch.equal(mirrored.__getitems__(items[50:])[0], flipped[50:])


@pytest.mark.parametrize("name, damage", [
    *[(name, damage) for name in ("mnist/t10k-labels-idx1-ubyte.gz", "emoji/emoji.tsv", "emoji/twemoji.webp")
      for damage in (lambda content: content[:len(content) // 2], lambda content: b"",
                     lambda content: b"version https://git-lfs.github.com/spec/v1\n")],
    ("mnist/t10k-labels-idx1-ubyte.gz", lambda content: gzip.compress(b"\0\0\x08")),
    ("mnist/t10k-labels-idx1-ubyte.gz", lambda content: gzip.compress(gzip.decompress(content)[:-1])),
])
def test_a_broken_file_is_named(name, damage, tmp_path, monkeypatch):
    """Fails if a file that is cut, empty or a pointer of Git LFS ends in a traceback, or is not named."""
    for folder in ("mnist", "emoji"):
        shutil.copytree(os.path.join(embedded.FOLDER, folder), tmp_path / folder)
    monkeypatch.setattr(embedded, "FOLDER", str(tmp_path))
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"^{tmp_path / name} can't be read [(][^\n]*[)]; download it again$"):
        open_dataset({"mnist": "digits"}.get(name.split("/")[0], "emoji"), "test", None)
