"""MaskGIT-VQGAN: the published file loads, and the network computes what its weights were trained for."""
import numpy as np
import pytest
import torch

from published.maskgit_vqgan import VQGAN, load_vqgan
from tests.scripts import names_and_shapes
from tests.test_release import weights_by_rule


def small_vqgan():
    model = VQGAN(32, 8, 20)
    model.load_state_dict(weights_by_rule({name: weight.shape for name, weight in model.state_dict().items()}))
    return model


def test_the_published_file_is_taken(tmp_path):
    """Fails if the names and shapes of the published file are not the ones that are expected."""
    with torch.device("meta"):
        assert names_and_shapes(VQGAN().state_dict()) == (168, 1860369550)  # the published file's
    weights = small_vqgan().state_dict()
    torch.save(weights, tmp_path / "vqgan.bin")
    assert all(map(torch.equal, load_vqgan(str(tmp_path / "vqgan.bin")).state_dict().values(), weights.values()))


def test_the_encoder_is_titoks():
    """Fails if the proxy codes are not those of MaskGIT-VQGAN as TiTok has it. (tests/test_release.py tests the
    decoder.)"""
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 48, 32), dtype=np.float32)) * 2 - 1
    # what modeling/modules/maskgit_vqgan.py of github.com/bytedance/1d-tokenizer computes with the same weights
    first = [-0.222, -0.6923, -0.1171, -0.0095, 0.5798, -0.1977, -0.3794, 1.1528]
    codes = [[[2, 17], [9, 16], [12, 19]], [[19, 12], [9, 17], [12, 19]]]
    model = small_vqgan()
    assert model.encoder(images)[0, :, 0, 0].tolist() == pytest.approx(first, abs=2e-4)
    assert model.encode(images).tolist() == codes


def test_vqgan_logits_are_negative_squared_distances():
    """Fails if cross-entropy does not pull the map to the codes that the VQGAN's decoder reads."""
    model, code_map = small_vqgan(), torch.randn(2, 8, 3, 3)
    codes = model.quantize["embedding"].weight
    expected = -(code_map[:, None] - codes[None, :, :, None, None]).square().sum(2)
    assert torch.allclose(model.logits(code_map), expected, atol=1e-4)
