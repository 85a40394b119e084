"""The embedded digits."""
import gzip
import shutil

import pytest
import torch

from data import digits, open_dataset


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


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"",
                                    lambda content: b"version https://git-lfs.github.com/spec/v1\n",
                                    lambda content: gzip.compress(b"\0\0\x08"),
                                    lambda content: gzip.compress(gzip.decompress(content)[:-1])])
def test_a_broken_file_is_named(damage, tmp_path, monkeypatch):
    """Fails if a file that is cut, empty or a pointer of Git LFS ends in a traceback, or is not named."""
    shutil.copytree(digits.FOLDER, tmp_path / "mnist")
    monkeypatch.setattr(digits, "FOLDER", str(tmp_path / "mnist"))
    broken = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    broken.write_bytes(damage(broken.read_bytes()))
    with pytest.raises(ValueError, match=f"^{broken} can't be read [(][^\n]*[)]; download it again$"):
        open_dataset("digits", "test", 28)
