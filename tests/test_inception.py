"""Inception-v3: the published file loads, and the features are those that FID is defined by. See also the yardstick
tests of test_evaluate_fid.py."""
import os

import pytest
import torch

from published import inception
from published.inception import InceptionV3, load_inception, resize
from tests.conftest import pictures
from tests.scripts import names_and_shapes


# what torch-fidelity 0.4.0 computes with the same weights, by the size of the image: 8 features and 8 logits
FIDELITY = {
    40: [0.011472, 7.768, 0.5575, 1.9154, 9.5781, 1.0492, 3.6669, 0.0053378,
         -1.2262, -1.0053, 0.70328, -0.5094, 0.71126, -2.4599, 0.82686, -1.6253],
    500: [0.015324, 8.3584, 0.56447, 1.9953, 10.461, 1.1702, 3.7799, 0.010874,
          -1.4788, -1.0684, 1.0774, -0.098433, 1.762, -2.4336, -0.57258, 0.17543],
}


@pytest.mark.parametrize("size", FIDELITY)
def test_features_are_torch_fidelitys(size, weights):
    """Fails if the resizing of TensorFlow 1, a pool, or another layer is not that of the network by which FID is
    defined."""
    features, logits = InceptionV3(weights)(pictures(1, size))
    assert torch.cat([features[0, ::256], logits[0, ::126]]).tolist() == pytest.approx(FIDELITY[size], rel=1e-3)


def test_inception_is_the_published_one(weights):
    """Fails if the published file can't be loaded, a layer has another shape, the fast form of the network is not the
    network, or grey images are not grey RGB ones."""
    tensors = {name: tensor for name, tensor in weights.items() if "num_batches_tracked" not in name}
    assert names_and_shapes(tensors) == (472, 1913396854)  # the published file's
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
    """Fails if another file is taken for Inception's, or if one written by an old PyTorch is refused."""
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
