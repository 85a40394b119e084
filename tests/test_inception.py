"""Inception-v3: the published file loads, and the features are those that FID is defined by."""
import pytest
import torch

from published.inception import InceptionV3, load_inception
from tests.conftest import pictures
from tests.scripts import names_and_shapes


# What torch-fidelity 0.4.0 (FeatureExtractorInceptionV3) computes with the same weights, by the size of the image: each
# 256th feature and each 126th logit.
FIDELITY = {
    40: [0.0114718, 7.76797, 0.557503, 1.9154, 9.57807, 1.0492, 3.66695, 0.00533782,
         -1.22621, -1.00528, 0.703278, -0.509404, 0.711261, -2.45991, 0.826862, -1.62533],
    256: [0.0167454, 8.3468, 0.581752, 2.01942, 10.4815, 1.18532, 3.8075, 0.00886259,
          -1.49877, -0.932931, 1.03902, -0.238604, 1.86563, -2.29222, -0.323005, -0.014822],
    500: [0.0153238, 8.35838, 0.564469, 1.99529, 10.4614, 1.17019, 3.77986, 0.010874,
          -1.47883, -1.06837, 1.07739, -0.0984327, 1.76199, -2.43364, -0.572584, 0.175429],
}


@pytest.mark.parametrize("size", FIDELITY)
def test_features_are_torch_fidelitys(size, weights):
    """Fails if the resizing of TensorFlow 1, a pool, or another layer is not that of the network by which FID is
    defined."""
    features, logits = InceptionV3(weights)(pictures(1, size))
    assert torch.cat([features[0, ::256], logits[0, ::126]]).tolist() == pytest.approx(FIDELITY[size], rel=1e-4,
                                                                                       abs=1e-5)


def test_inception_is_the_published_one(weights):
    """Fails if the published file can't be loaded, a layer has another shape, or grey images are not grey RGB ones."""
    tensors = {name: tensor for name, tensor in weights.items() if "num_batches_tracked" not in name}
    assert names_and_shapes(tensors) == (472, 1913396854)  # the published file's
    net, images = InceptionV3(weights), pictures(2, 40)
    features, logits = net(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and not features.requires_grad
    assert features.std() > 0.1 and (features[0] - features[1]).abs().max() > 0.1  # random weights tell images apart
    grey = images[:1, :1]
    assert torch.equal(net(grey)[0], net(grey.repeat(1, 3, 1, 1))[0])
    for wrong in (images.float(), images[0], images[:, :2], images / 255):
        with pytest.raises(ValueError, match="uint8 in 0..255"):
            net(wrong)


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
