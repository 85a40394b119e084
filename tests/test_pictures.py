"""Pages of images."""
import torch

from support import pictures


def test_a_grid_shows_every_image_in_its_row_and_column():
    """Fails if pictures show images in the wrong row or column, with wrong colours or without labels."""
    images = torch.zeros(6, 3, 56, 56, dtype=torch.uint8)
    images[4, 0] = 255  # the fifth image is red
    page = pictures.grid(images, 3)
    assert page.size == (168, 112)
    assert page.getpixel((84, 84)) == (255, 0, 0) and page.getpixel((28, 84)) == (0, 0, 0)
    grey = pictures.grid(torch.full((2, 1, 28, 28), 7, dtype=torch.uint8), 2, ["row"], ["a", "b"])  # at twice the size
    assert grey.getpixel((grey.width - 5, 25)) == (7, 7, 7) and grey.height == 18 + 56
    for labels in (grey.crop((0, 18, grey.width - 112, 74)), grey.crop((grey.width - 112, 0, grey.width, 18))):
        assert labels.convert("L").getextrema()[0] < 128  # there is black on white


def test_pixels_to_bytes():
    """Fails if [-1, 1] does not become 0..255, or wraps around outside."""
    assert pictures.to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(pictures.to_uint8(torch.arange(256) / 127.5 - 1).long(), torch.arange(256))
