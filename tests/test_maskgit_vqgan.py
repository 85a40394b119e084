"""MaskGIT-VQGAN: the published file loads, and the network computes what its weights were trained for."""
import torch
import torch.nn.functional as F

from published.maskgit_vqgan import VQGAN, vqgan_of


def random_vqgan(num_codes=20):
    model = VQGAN(32, 8, num_codes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3)
                         + ("norm" in name))
    return model


def test_vqgan_has_the_published_sizes():
    """Broken: the published file would not load."""
    with torch.device("meta"):
        model = VQGAN()
    weights = model.state_dict()
    assert len(weights) == 168 and sum(weight.numel() for weight in weights.values()) == 54515587
    for name, shape in {"encoder.conv_in.weight": (128, 3, 3, 3),
                        "encoder.down.2.block.0.nin_shortcut.weight": (256, 256, 1, 1),
                        "encoder.down.4.block.1.conv2.weight": (512, 512, 3, 3), "encoder.conv_out.bias": (256,),
                        "decoder.conv_in.weight": (512, 256, 3, 3),
                        "decoder.up.3.block.0.conv1.weight": (256, 512, 3, 3),
                        "decoder.up.1.upsample_conv.bias": (128,), "decoder.conv_out.weight": (3, 128, 3, 3),
                        "quantize.embedding.weight": (1024, 256)}.items():
        assert weights[name].shape == shape, name
    absent = {"encoder.conv_in.bias", "decoder.up.0.upsample_conv.weight", "decoder.up.4.block.0.nin_shortcut.weight"}
    assert not absent & set(weights)
    assert str(vqgan_of(weights)) == str(model)


def test_vqgan_encoder_is_that_of_the_published_weights():
    """Broken: the proxy codes would not be MaskGIT-VQGAN's."""
    model = random_vqgan()
    w = {name.removeprefix("encoder."): weight for name, weight in model.state_dict().items()
         if name.startswith("encoder.")}
    norm = lambda x, name: F.silu(F.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], 1e-6))  # noqa: E731

    def residual(x, name):
        y = F.conv2d(norm(x, name + ".norm1"), w[name + ".conv1.weight"], padding=1)
        y = F.conv2d(norm(y, name + ".norm2"), w[name + ".conv2.weight"], padding=1)
        return y + (F.conv2d(y, w[name + ".nin_shortcut.weight"]) if name + ".nin_shortcut.weight" in w else x)

    images = torch.rand(2, 3, 48, 32) * 2 - 1
    with torch.no_grad():
        x = F.conv2d(images / 2 + 0.5, w["conv_in.weight"], padding=1)
        for level in range(5):
            x = residual(residual(x, f"down.{level}.block.0"), f"down.{level}.block.1")
            if level < 4:
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        x = norm(residual(residual(x, "mid.0"), "mid.1"), "norm_out")
        x = F.conv2d(x, w["conv_out.weight"], w["conv_out.bias"])
        assert torch.allclose(model.encoder(images), x, atol=1e-4) and x.std() > 0.1
    codes = model.quantize["embedding"].weight
    nearest = torch.cdist(x.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(1).view(2, 3, 2)
    assert torch.equal(model.encode(images), nearest) and len(nearest.unique()) > 1


def test_vqgan_logits_are_negative_squared_distances():
    """Broken: cross-entropy would not pull the map to the codes that the VQGAN's decoder reads."""
    model = random_vqgan()
    code_map = torch.randn(2, 8, 3, 3)
    codes = model.quantize["embedding"].weight
    expected = -(code_map[:, None] - codes[None, :, :, None, None]).square().sum(2)
    assert torch.allclose(model.logits(code_map), expected, atol=1e-4)
    map_of_codes = codes[torch.randint(20, (1, 3, 3))].permute(0, 3, 1, 2)
    assert model.logits(map_of_codes).amax(1).abs().max() < 1e-4  # a code itself is at distance 0
