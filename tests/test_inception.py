"""Inception-v3: the published file loads, and the features are those that FID is defined in (see also the yardstick
tests of test_evaluate_fid.py)."""
import math
import os

import numpy as np
import pytest
import torch

from published import inception
from published.inception import InceptionV3, load_inception, resize
from tests.conftest import pictures


@pytest.mark.parametrize("H, W, size", [(1, 1, 5), (2, 3, 7), (7, 5, 3), (32, 20, 37), (29, 41, 13), (64, 64, 64)])
def test_resize_is_tensorflow_1s(H, W, size):
    """Broken: images would be resized with half-pixel centres, antialiasing or another rounding, which moves every
    FID."""
    x = np.random.default_rng(0).integers(256, size=(H, W)).astype(np.float32)
    y_position, x_position = (np.arange(size, dtype=np.float32) * np.float32(side / size) for side in (H, W))
    expected = np.empty((size, size), np.float32)
    for i, j in np.ndindex(size, size):
        top, left = int(y_position[i]), int(x_position[j])
        bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
        dy, dx = y_position[i] - np.float32(top), x_position[j] - np.float32(left)
        above = x[top, left] + (x[top, right] - x[top, left]) * dx
        expected[i, j] = above + (x[bottom, left] + (x[bottom, right] - x[bottom, left]) * dx - above) * dy
    assert (resize(torch.from_numpy(x)[None, None], size)[0, 0].numpy() == expected).all()


def test_pools():
    """Broken: the average would count the padding, or the last block pool as the one before it, and every FID would
    move."""
    image = torch.tensor([[[[1.0, -2, 3], [4, 5, -6], [7, 8, 9]]]])
    average = torch.tensor([[8 / 4, 5 / 6, 0 / 4], [23 / 6, 29 / 9, 17 / 6], [24 / 4, 27 / 6, 16 / 4]])
    assert torch.allclose(inception.POOLS["average"](image)[0, 0], average)
    below = inception.POOLS["max"](-1 - image.abs())[0, 0].tolist()  # no zeros from the padding
    assert below == [[-2, -2, -3], [-2, -2, -3], [-5, -5, -6]]
    assert inception.POOLS["halve"](image)[0, 0].tolist() == [[9]]
    with torch.device("meta"):
        blocks = [block for block in InceptionV3().children() if isinstance(block, inception.Block)]
    pools = [step for block in blocks for branch in block.branches for step in branch if isinstance(step, str)]
    assert pools == ["average"] * 3 + ["halve"] + ["average"] * 4 + ["halve", "average", "max"]


def test_inception_is_the_published_one(weights):
    """Broken: the published file could not be loaded, a layer would have another shape, the fast form of the network
    would not be the network, or grey images would not be grey RGB ones."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if "num_batches_tracked" not in name}
    assert len(shapes) == 94 * 5 + 2  # 94 convolutions with four tensors of batch norm each, and the classes
    assert sum(math.prod(shape) for shape in shapes.values()) == 23885392
    assert shapes["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    plain, fast = InceptionV3(), InceptionV3(weights)
    plain.load_state_dict(weights)
    images = pictures(2, 40)
    features, logits = fast(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and not features.requires_grad
    assert features.std() > 0.1 and (features[0] - features[1]).abs().max() > 0.1  # random weights tell images apart
    seen = []
    plain.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for ours, theirs, close in zip((features, logits), plain(images), (1e-5, 1e-4)):
        assert (ours - theirs).abs().max() < close * theirs.abs().max()
    assert torch.equal(seen[0], (resize(images.float(), 299) - 128) / 128)
    grey = images[:1, :1]
    assert torch.equal(fast(grey)[0], fast(grey.repeat(1, 3, 1, 1))[0])
    for wrong in (images.float(), images[0], images[:, :2], images / 255):
        with pytest.raises(ValueError, match="uint8 in 0..255"):
            fast(wrong)


def test_files_of_weights(weights, tmp_path):
    """Broken: another file would be taken for Inception's, or one written by an old PyTorch would be refused."""
    old = {name: tensor for name, tensor in weights.items() if "num_batches_tracked" not in name}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_inception(str(tmp_path / "old.pth")).fc.weight, weights["fc.weight"])
    torch.save({"fc.bias": weights["fc.bias"]}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, words in (("text.pth", "can't be read as weights"), ("none.pth", "there is no file"),
                        ("other.pth", "does not hold Inception's weights .*missing Conv2d_1a_3x3.conv.weight")):
        with pytest.raises(ValueError, match=words):
            load_inception(str(tmp_path / name))


def test_download(weight_file, tmp_path, monkeypatch):
    """Fails if a failed download ends in a traceback, or if a damaged one is taken for the weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for address, words in (((tmp_path / "none.pth").as_uri(), "copy it to .*checkpoints/none.pth"),
                           (weight_file.as_uri(), "invalid hash value")):
        monkeypatch.setattr(inception, "ADDRESSES", (address,))
        with pytest.raises(ValueError, match=words):
            inception.download()
    assert os.listdir(tmp_path / "checkpoints") == []
