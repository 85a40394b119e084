"""ConvNeXt: the published file loads, and the network computes what torchvision's does."""
import pytest
import torch
import torch.nn.functional as F

from published.convnext import ConvNeXt, load_convnext


def random_convnext():
    model = ConvNeXt((4, 6, 8, 8), (1, 2, 1, 1), 10)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3
            weight.copy_(torch.randn(weight.shape) * scale + (weight.ndim == 1))
            if "layer_scale" in name:
                weight.fill_(0.7)
    return model


def test_published_files(tmp_path):
    """Broken: the published file would not load, or another one be taken for it."""
    with torch.device("meta"):
        small = ConvNeXt()
    assert len(small.state_dict()) == 344 and sum(weight.numel() for weight in small.parameters()) == 50223688
    assert small.state_dict()["features.5.26.block.3.weight"].shape == (1536, 384)
    weights, path = random_convnext().state_dict(), str(tmp_path / "convnext.pth")
    torch.save(weights, path)
    assert all(map(torch.equal, load_convnext(path).state_dict().values(), weights.values()))
    name = "features.1.0.block.3.weight"
    torch.save(weights | {name: weights[name] / 0}, path)
    with pytest.raises(ValueError, match=f"is damaged: {name}"):
        load_convnext(path)


def test_convnext_is_torchvisions():
    """Broken: the perceptual loss would not be that of the published ConvNeXt-S."""
    model = random_convnext()
    w = model.state_dict()

    def norm(x, name):  # over the channels of (B, channels, h, w)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]

    def pointwise(x, name):  # a linear layer as a convolution of 1 x 1
        return F.conv2d(x, w[name + ".weight"][:, :, None, None], w[name + ".bias"])

    images = torch.rand(2, 1, 300, 180) * 2 - 1
    x = F.interpolate(images.repeat(1, 3, 1, 1) / 2 + 0.5, (224, 224), mode="bilinear", antialias=True)
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        x = norm(F.conv2d(x, w["features.0.0.weight"], w["features.0.0.bias"], stride=4), "features.0.1")
        for stage, depth in ((1, 1), (3, 2), (5, 1), (7, 1)):
            if stage > 1:
                x = norm(x, f"features.{stage - 1}.0")
                x = F.conv2d(x, w[f"features.{stage - 1}.1.weight"], w[f"features.{stage - 1}.1.bias"], stride=2)
            for i in range(depth):
                name = f"features.{stage}.{i}."
                y = F.conv2d(x, w[name + "block.0.weight"], w[name + "block.0.bias"], padding=3, groups=x.shape[1])
                y = pointwise(F.gelu(pointwise(norm(y, name + "block.2"), name + "block.3")), name + "block.5")
                x = x + w[name + "layer_scale"] * y
        x = norm(x.mean((2, 3), keepdim=True), "classifier.0")
        assert torch.allclose(model.logits_of(images), pointwise(x, "classifier.2")[:, :, 0, 0], atol=1e-4)
