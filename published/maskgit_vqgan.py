"""MaskGIT-VQGAN (Chang et al., arXiv 2202.04200): images <-> a map of codes, one for each square of 16 x 16 pixels.

Stage 1 predicts its codes (TiTok's "proxy codes"), and the paper's tokenizer ends in its decoder. The tensors
have the names of the published file, which therefore loads as it is.
"""
import torch
import torch.nn.functional as F
from torch import nn

from published.weights import load_published

ADDRESS = "https://huggingface.co/fun-research/TiTok/resolve/main/maskgit-vqgan-imagenet-f16-256.bin"
WIDTHS = (1, 1, 2, 2, 4)  # of the five levels, in units of the first; each level halves height and width


class VQGAN(nn.Module):
    """Encoder, codebook and decoder.

    width: of the first level.  dim: dimensions of a code.  num_codes: rows of the codebook.
    """

    def __init__(self, width=128, dim=256, num_codes=1024):
        super().__init__()
        self.width, self.dim = width, dim
        self.encoder = VQGANEncoder(width, dim)
        self.decoder = VQGANDecoder(width, dim)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(num_codes, dim)})

    def logits(self, code_map):
        """code_map (B, dim, h, w) -> the negative squared distance to each code, (B, num_codes, h, w)."""
        codes = self.quantize["embedding"].weight  # (num_codes, dim)
        with torch.autocast(code_map.device.type, enabled=False):
            f = code_map.float()
            inner = torch.einsum("bdhw,ed->behw", f, codes)
            return 2 * inner - f.square().sum(1, keepdim=True) - codes.square().sum(1)[:, None, None]

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> the nearest codes (B, H/16, W/16) int64."""
        return self.logits(self.encoder(images)).argmax(1)


class VQGANEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> map of codes (B, dim, H/16, W/16), before quantization."""

    def __init__(self, width, dim):
        super().__init__()
        widths = [width * factor for factor in WIDTHS]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.down = nn.ModuleList([VQGANLevel(before, after) for before, after in zip([width] + widths, widths)])
        self.mid = nn.Sequential(ResidualBlock(widths[-1], widths[-1]), ResidualBlock(widths[-1], widths[-1]))
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, images):
        x = self.conv_in((images + 1) / 2)  # the published weights take pixels in [0, 1]
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQGANDecoder(nn.Module):
    """Map of codes (B, dim, h, w) -> images (B, 3, 16 h, 16 w), about [-1, 1]."""

    def __init__(self, width, dim):
        super().__init__()
        widths = [width * factor for factor in WIDTHS]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(ResidualBlock(widths[-1], widths[-1]), ResidualBlock(widths[-1], widths[-1]))
        self.up = nn.ModuleList([VQGANLevel(before, after, upsample=i > 0)  # up[4] runs first, as in the published file
                                 for i, (before, after) in enumerate(zip(widths[1:] + widths[-1:], widths))])
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return 2 * self.conv_out(F.silu(self.norm_out(x))) - 1  # the published weights give pixels in [0, 1]


class VQGANLevel(nn.Module):
    """Two residual blocks, (B, before, h, w) -> (B, after, h, w), or with upsample (B, after, 2 h, 2 w)."""

    def __init__(self, before, after, upsample=False):
        super().__init__()
        self.block = nn.Sequential(ResidualBlock(before, after), ResidualBlock(after, after))
        self.upsample_conv = nn.Conv2d(after, after, 3, padding=1) if upsample else None

    def forward(self, x):
        x = self.block(x)
        return self.upsample_conv(F.interpolate(x, scale_factor=2, mode="nearest")) if self.upsample_conv else x


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut around them: (B, before, h, w) -> (B, after, h, w).

    Where the width changes, the shortcut acts on the block's output, not on its input; the published weights need that.
    """

    def __init__(self, before, after):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, after, eps=1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(after, after, 1, bias=False) if before != after else None

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(y) if self.nin_shortcut else x)


def load_vqgan(path):
    """A VQGAN with the weights of a published file, in evaluation mode and without gradients."""
    return load_published(path, "MaskGIT-VQGAN", ADDRESS, vqgan_of)


def vqgan_of(weights):
    """A VQGAN whose sizes are those of a published file's tensors."""
    num_codes, dim = weights["quantize.embedding.weight"].shape
    return VQGAN(len(weights["encoder.conv_in.weight"]), dim, num_codes)
