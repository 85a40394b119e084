"""ConvNeXt: the published file loads, and the network computes what torchvision's does."""
import numpy as np
import pytest
import torch

from published.convnext import ConvNeXt, load_convnext
from tests.scripts import names_and_shapes
from tests.test_release import weights_by_rule


def small_convnext():
    model = ConvNeXt((4, 6, 8, 8), (1, 2, 1, 1), 10)
    model.load_state_dict(weights_by_rule({name: weight.shape for name, weight in model.state_dict().items()}))
    return model


def test_the_published_file_is_taken(tmp_path):
    """Fails if the names and shapes of the published file are not the ones that are expected, or if a damaged file is
    taken."""
    with torch.device("meta"):
        assert names_and_shapes(ConvNeXt().state_dict()) == (344, 640832928)  # the published file's
    weights, path = small_convnext().state_dict(), str(tmp_path / "convnext.pth")
    torch.save(weights, path)
    assert all(map(torch.equal, load_convnext(path).state_dict().values(), weights.values()))
    name = "features.1.0.block.3.weight"
    torch.save(weights | {name: weights[name] / 0}, path)
    with pytest.raises(ValueError, match=f"is damaged: {name}"):
        load_convnext(path)


def test_convnext_is_torchvisions():
    """Fails if the perceptual loss is not that of the published ConvNeXt-S."""
    images = torch.from_numpy(np.random.default_rng(0).random((1, 1, 300, 180), dtype=np.float32)) * 2 - 1
    logits = small_convnext().logits_of(images)[0].tolist()
    # of torchvision 0.29.1 with the same weights, the image resized and normalized by torchvision.transforms
    assert logits == pytest.approx([-0.4009, 1.041, 0.5639, 0.7783, -0.582, 0.1903, 1.6079, -0.1997, 0.0379, -1.1005],
                                   abs=2e-4)
