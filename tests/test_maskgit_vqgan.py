"""MaskGIT-VQGAN: the published file loads, and the network computes what its weights were trained for."""
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


def test_vqgan_has_the_published_sizes(tmp_path):
    """Broken: the published file would not load."""
    with torch.device("meta"):
        weights = VQGAN().state_dict()
    assert len(weights) == 168 and sum(weight.numel() for weight in weights.values()) == 54515587
    assert weights["encoder.down.2.block.0.nin_shortcut.weight"].shape == (256, 256, 1, 1)
    assert weights["decoder.up.3.block.0.conv1.weight"].shape == (256, 512, 3, 3)
    assert not {"encoder.conv_in.bias", "decoder.up.0.upsample_conv.weight"} & set(weights)
    weights = random_vqgan().state_dict()
    torch.save(weights, tmp_path / "vqgan.bin")
    assert all(map(torch.equal, load_vqgan(str(tmp_path / "vqgan.bin")).state_dict().values(), weights.values()))


# The published network as plain operations on its tensors w, which lie under a name.


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


def decoder_pixels(x, w, name):
    """Codes (B, dim, h, w) -> images in [0, 1] but for overshoots."""
    x = two_blocks(conv(x, w, name + ".conv_in"), w, name + ".mid")
    for level in (4, 3, 2, 1, 0):
        x = two_blocks(x, w, f"{name}.up.{level}.block")
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w, f"{name}.up.{level}.upsample_conv")
    return conv(norm(x, w, name + ".norm_out"), w, name + ".conv_out")


def test_vqgan_is_that_of_the_published_weights():
    """Broken: the proxy codes would not be MaskGIT-VQGAN's, or the decoder not make its images."""
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
        y = 2 * decoder_pixels(x, w, "decoder") - 1
        assert torch.allclose(model.decoder(x), y, atol=1e-4) and y.shape == images.shape
    codes = model.quantize["embedding"].weight
    nearest = torch.cdist(x.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(1).view(2, 3, 2)
    assert torch.equal(model.encode(images), nearest) and len(nearest.unique()) > 1


def test_vqgan_logits_are_negative_squared_distances():
    """Broken: cross-entropy would not pull the map to the codes that the VQGAN's decoder reads."""
    model, code_map = random_vqgan(), torch.randn(2, 8, 3, 3)
    codes = model.quantize["embedding"].weight
    expected = -(code_map[:, None] - codes[None, :, :, None, None]).square().sum(2)
    assert torch.allclose(model.logits(code_map), expected, atol=1e-4)
