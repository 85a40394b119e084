"""The embedded digits."""
import torch

from data import open_dataset


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
