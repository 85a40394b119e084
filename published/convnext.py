"""ConvNeXt (Liu et al., arXiv 2201.03545), whose logits the perceptual loss of stage 1 compares, as in TiTok.

The tensors have the names of torchvision's file of ConvNeXt-S, which therefore loads as it is.
"""
import torch
import torch.nn.functional as F
from torch import nn

from published.weights import load_published

ADDRESS = "https://download.pytorch.org/models/convnext_small-0c510722.pth"


class ConvNeXt(nn.Module):
    """Images (B, 3, 224, 224), normalized -> logits (B, num_classes).

    widths, depths: of the four stages; the defaults are those of ConvNeXt-S.
    """

    def __init__(self, widths=(96, 192, 384, 768), depths=(3, 3, 27, 3), num_classes=1000):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6))
        self.features = nn.Sequential(stem)
        for i, (width, depth) in enumerate(zip(widths, depths)):
            if i:
                self.features.append(nn.Sequential(ChannelNorm(widths[i - 1], eps=1e-6),
                                                   nn.Conv2d(widths[i - 1], width, 2, stride=2)))
            self.features.append(nn.Sequential(*[ConvNeXtBlock(width) for _ in range(depth)]))
        self.classifier = nn.Sequential(ChannelNorm(widths[-1], eps=1e-6), nn.Flatten(),
                                        nn.Linear(widths[-1], num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))

    def logits_of(self, images):
        """Images (B, ch, H, W) in [-1, 1] -> logits (B, num_classes), resized and normalized as in its training."""
        x = F.interpolate((images.expand(-1, 3, -1, -1) + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self((x - mean) / std)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7 convolution, norm and an MLP at every position, (B, width, h, w) -> the same shape."""

    def __init__(self, width):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))
        self.block = nn.ModuleDict({
            "0": nn.Conv2d(width, width, 7, padding=3, groups=width), "2": nn.LayerNorm(width, eps=1e-6),
            "3": nn.Linear(width, 4 * width), "5": nn.Linear(4 * width, width)})

    def forward(self, x):
        y = self.block["2"](self.block["0"](x).movedim(1, -1))  # (B, h, w, width)
        y = self.block["5"](F.gelu(self.block["3"](y)))
        return x + self.layer_scale * y.movedim(-1, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, channels, h, w)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def load_convnext(path):
    """A ConvNeXt with the weights of a published file, in evaluation mode and without gradients."""
    return load_published(path, "ConvNeXt-S", ADDRESS, convnext_of)


def convnext_of(weights):
    """A ConvNeXt whose sizes are those of a published file's tensors."""
    stages = [f"features.{i}." for i in (1, 3, 5, 7)]
    depths = [sum(name.startswith(stage) and "layer_scale" in name for name in weights) for stage in stages]
    widths = [len(weights[f"{stage}0.layer_scale"]) for stage in stages]
    return ConvNeXt(widths, depths, len(weights["classifier.2.bias"]))
