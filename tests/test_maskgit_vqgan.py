"""MaskGIT-VQGAN: the published file loads, and the network computes what its weights were trained for."""
import zlib

import torch
import torch.nn.functional as F

from published.maskgit_vqgan import VQGAN, load_vqgan


def random_vqgan(num_codes=20):
    model = VQGAN(32, 8, num_codes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3)
                         + ("norm" in name))
    return model


def test_the_published_file_is_taken(tmp_path):
    """Fails if the names and shapes of the published file are not the ones that are expected."""
    with torch.device("meta"):
        lines = sorted(f"{name}\t{'x'.join(map(str, weight.shape))}" for name, weight in VQGAN().state_dict().items())
    assert len(lines) == 168 and zlib.crc32("\n".join(lines).encode()) == 1860369550  # of the published file's
    weights = random_vqgan().state_dict()
    torch.save(weights, tmp_path / "vqgan.bin")
    assert all(map(torch.equal, load_vqgan(str(tmp_path / "vqgan.bin")).state_dict().values(), weights.values()))


# The published encoder as plain operations on its tensors w, by their names.


def norm(x, w, name):
    return F.silu(F.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], 1e-6))


def conv(x, w, name):
    return F.conv2d(x, w[name + ".weight"], w.get(name + ".bias"), padding=w[name + ".weight"].shape[2] // 2)


def two_blocks(x, w, name):
    for block in (name + ".0", name + ".1"):
        y = conv(norm(x, w, block + ".norm1"), w, block + ".conv1")
        y = conv(norm(y, w, block + ".norm2"), w, block + ".conv2")
        x = y + (conv(y, w, block + ".nin_shortcut") if block + ".nin_shortcut.weight" in w else x)
    return x


def test_encoder_is_that_of_the_published_weights():
    """Fails if the proxy codes are not MaskGIT-VQGAN's. (tests/test_release.py tests the decoder.)"""
    model = random_vqgan()
    w = model.state_dict()
    images = torch.rand(2, 3, 48, 32) * 2 - 1
    with torch.no_grad():
        x = conv(images / 2 + 0.5, w, "encoder.conv_in")
        for level in range(5):
            x = two_blocks(x, w, f"encoder.down.{level}.block")
            if level < 4:
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        x = conv(norm(two_blocks(x, w, "encoder.mid"), w, "encoder.norm_out"), w, "encoder.conv_out")
        assert torch.allclose(model.encoder(images), x, atol=1e-4) and x.std() > 0.1
    codes = model.quantize["embedding"].weight
    nearest = torch.cdist(x.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(1).view(2, 3, 2)
    assert torch.equal(model.encode(images), nearest) and len(nearest.unique()) > 1


def test_vqgan_logits_are_negative_squared_distances():
    """Broken: cross-entropy would not pull the map to the codes that the VQGAN's decoder reads."""
    model, code_map = random_vqgan(), torch.randn(2, 8, 3, 3)
    codes = model.quantize["embedding"].weight
    expected = -(code_map[:, None] - codes[None, :, :, None, None]).square().sum(2)
    assert torch.allclose(model.logits(code_map), expected, atol=1e-4)
