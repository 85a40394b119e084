"""Inception-v3: the published file loads, and the features are those that FID is defined in (see also the yardstick
tests of test_evaluate_fid.py)."""
import math
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch

import evaluate_fid
from published import inception
from published.inception import InceptionV3, resize
from tests.conftest import pictures


def test_resize_is_tensorflow_1s():
    """Broken: images would be resized with half-pixel centres, antialiasing or another rounding, which moves every
    FID."""
    for H, W, size in ((1, 1, 5), (2, 3, 7), (7, 5, 3), (32, 20, 37), (29, 41, 13), (40, 30, 30), (64, 64, 64)):
        image = torch.randint(256, (1, 1, H, W)).float()
        x = image[0, 0].numpy()
        expected = np.empty((size, size), np.float32)
        for i in range(size):
            y_position = np.float32(i) * np.float32(H / size)
            top, bottom = int(y_position), min(int(y_position) + 1, H - 1)
            for j in range(size):
                x_position = np.float32(j) * np.float32(W / size)
                left, right = int(x_position), min(int(x_position) + 1, W - 1)
                dy, dx = y_position - np.float32(top), x_position - np.float32(left)
                above = x[top, left] + (x[top, right] - x[top, left]) * dx
                below = x[bottom, left] + (x[bottom, right] - x[bottom, left]) * dx
                expected[i, j] = above + (below - above) * dy
        assert (resize(image, size)[0, 0].numpy() == expected).all(), (H, W, size)


def test_pools():
    """Broken: the average would count the padding, or the last block pool as the one before it, and every FID would
    move."""
    image = torch.tensor([[[[1.0, -2, 3], [4, 5, -6], [7, 8, 9]]]])
    average = torch.tensor([[8 / 4, 5 / 6, 0 / 4], [23 / 6, 29 / 9, 17 / 6], [24 / 4, 27 / 6, 16 / 4]])
    assert torch.allclose(inception.POOLS["average"](image)[0, 0], average)
    assert inception.POOLS["max"](image)[0, 0].tolist() == [[5, 5, 5], [8, 9, 9], [8, 9, 9]]
    below = inception.POOLS["max"](-1 - image.abs())[0, 0].tolist()  # no zeros from the padding
    assert below == [[-2, -2, -3], [-2, -2, -3], [-5, -5, -6]]
    assert inception.POOLS["halve"](image)[0, 0].tolist() == [[9]]
    with torch.device("meta"):
        net = InceptionV3()
    pools = {name: [step for branch in block.branches for step in branch if isinstance(step, str)]
             for name, block in net.named_children() if isinstance(block, inception.Block)}
    assert pools == {f"Mixed_{name}": [pool] for pool, names in {
        "average": ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"), "halve": ("6a", "7a"), "max": ("7c",)}.items()
        for name in names}


def test_inception_has_the_published_tensors(weights):
    """Broken: the published file could not be loaded, or a layer would have another shape than its."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if "num_batches_tracked" not in name}
    assert len(shapes) == 94 * 5 + 2  # 94 convolutions with four tensors of batch norm each, and the classes
    assert sum(math.prod(shape) for shape in shapes.values()) == 23885392
    for name, shape in {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
                        "Mixed_6a.branch3x3dbl_3.bn.running_var": (96,),
                        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
                        "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7), "fc.weight": (1008, 2048),
                        "fc.bias": (1008,),
                        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
                        "Mixed_7b.branch_pool.conv.weight": (192, 1280, 1, 1)}.items():
        assert shapes[name] == shape


def test_inception(weights):
    """Broken: the fast form of the network would not be the network, or grey images would not be grey RGB ones."""
    plain, fast = InceptionV3(), InceptionV3(weights)
    plain.load_state_dict(weights)
    images = pictures(3, 40)
    features, logits = fast(images)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008) and not features.requires_grad
    assert features.std() > 0.1 and (features[0] - features[1]).abs().max() > 0.1  # the test sees something
    for ours, theirs, close in zip((features, logits), plain(images), (1e-5, 1e-4)):
        assert (ours - theirs).abs().max() < close * theirs.abs().max()
    grey = images[:, :1]
    assert torch.equal(fast(grey)[0], fast(grey.repeat(1, 3, 1, 1))[0])
    for wrong in (images.float(), images[0], images[:, :2], images / 255):
        with pytest.raises(ValueError, match="uint8 in 0..255"):
            fast(wrong)


def test_weights_without_a_tensor_or_with_another(weights, weight_file, tmp_path):
    """Broken: a foreign file would be taken for Inception's; or one written by an old PyTorch would be refused."""
    old = {name: tensor for name, tensor in weights.items() if "num_batches_tracked" not in name}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    images = pictures(1, 16)
    found = evaluate_fid.inception(str(tmp_path / "old.pth"), "cpu", 0)(images)[0]
    assert torch.equal(found, InceptionV3(weights)(images)[0])
    foreign = {"less": {name: tensor for name, tensor in old.items() if name != "fc.bias"},
               "more": old | {"x": torch.zeros(1)},
               "shape": old | {"fc.bias": torch.zeros(1000)}, "list": [1, 2]}
    for name, state in foreign.items():
        torch.save(state, tmp_path / "foreign.pth")
        with pytest.raises(ValueError, match="foreign.pth does not hold Inception's weights .* --inception"):
            evaluate_fid.inception(str(tmp_path / "foreign.pth"), "cpu", 0)


def test_download(weights, weight_file, tmp_path, monkeypatch):
    """Broken: without a network there would be a traceback, or a damaged download would be taken for the weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with monkeypatch.context() as offline:
        offline.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=URLError("no network")))
        with pytest.raises(ValueError) as refused:
            inception.download()
    address, path = inception.ADDRESSES[0], tmp_path / "hub" / "checkpoints" / weight_file.name
    assert all(word in str(refused.value) for word in (address, str(path), "no network"))
    assert address.endswith(weight_file.name)

    monkeypatch.setattr(inception, "ADDRESSES", (weight_file.as_uri(),))  # not the weights of that hash
    with pytest.raises(ValueError, match="invalid hash value"):
        inception.download()
    assert not path.exists()
    path.write_bytes(weight_file.read_bytes())  # brought here by other means
    assert inception.download().keys() == weights.keys()
