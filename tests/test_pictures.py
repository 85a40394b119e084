"""Pages of images."""
import numpy as np
import torch
from PIL import Image

from support import pictures


def test_a_grid_shows_every_image_in_its_row_and_column():
    """Broken: pictures would show images in the wrong row or column, with wrong colours or without labels."""
    images = torch.zeros(6, 3, 56, 56, dtype=torch.uint8)
    images[4, 0] = 255  # the fifth image is red
    page = pictures.grid(images, 3)
    assert page.size == (168, 112)
    assert page.getpixel((84, 84)) == (255, 0, 0) and page.getpixel((28, 84)) == (0, 0, 0)
    grey = pictures.grid(torch.full((2, 1, 28, 28), 7, dtype=torch.uint8), 2, ["row"], ["a", "b"])  # at twice the size
    assert grey.getpixel((grey.width - 5, 25)) == (7, 7, 7) and grey.height == 18 + 56
    for labels in (grey.crop((0, 18, grey.width - 112, 74)), grey.crop((grey.width - 112, 0, grey.width, 18))):
        assert labels.convert("L").getextrema()[0] < 128  # there is black on white


def test_classes_of_different_sizes_have_a_row_each(tmp_path):
    """Broken: samples would be shown in another class's row, or frames of an animation be lost."""
    labels = torch.tensor([2, 2, 2, 0])
    images = torch.arange(4)[:, None, None, None].expand(2, 4, 1, 28, 28).mul(50).to(torch.uint8).clone()
    images[0] = 200
    pictures.save_samples(str(tmp_path / "a.png"), images[1:], labels, ["zero", "one", "two"])
    page = np.asarray(Image.open(tmp_path / "a.png").convert("L"))[28::56, -3 * 56 + 28::56]
    assert page.tolist() == [[0, 50, 100], [150, 255, 255]]
    pictures.save_samples(str(tmp_path / "a.gif"), images, labels, ["zero", "one", "two"])
    film = Image.open(tmp_path / "a.gif")
    assert film.n_frames == 2 and film.convert("L").getpixel((film.width - 140, 28)) == 200


def test_pixels_to_bytes():
    """Broken: [-1, 1] would not become 0..255, or wrap around outside."""
    assert pictures.to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    everything = torch.arange(256)
    assert torch.equal(pictures.to_uint8(everything / 127.5 - 1).long(), everything)
