"""The discriminator of the adversarial loss: TiTok's architecture (arXiv 2406.07550), trained here from scratch."""
import torch.nn.functional as F
from torch import nn


class Discriminator(nn.Module):
    """Tells images from reconstructions, patch by patch: (B, ch, H, W) in [-1, 1] -> logits (B, 1, 16, 16).

    width: of the first layer, a multiple of 32.
    """

    def __init__(self, width):
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 5, padding=2)
        widths = [width, width, 2 * width, 4 * width]
        self.convs = nn.ModuleList([nn.Conv2d(before, after, 3, padding=1)
                                    for before, after in zip(widths, widths[1:])])
        self.norms = nn.ModuleList([nn.GroupNorm(32, after) for after in widths[1:]])
        self.to_logits = nn.Sequential(nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1),
                                       nn.Conv2d(widths[-1], 1, 5, padding=2))

    def forward(self, images):
        x = F.leaky_relu(self.conv_in((images.expand(-1, 3, -1, -1) + 1) / 2), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(halve(conv(x))), 0.1)
        return self.to_logits(F.adaptive_max_pool2d(x, 16))


def halve(x):
    """Blur with (1, 3, 3, 1) / 8 and take every second row and column, (B, ch, h, w) -> (B, ch, h/2, w/2)."""
    kernel = x.new_tensor([1, 3, 3, 1]) / 8
    kernel = (kernel[:, None] * kernel).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
