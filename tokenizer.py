"""The set tokenizer (Sec. 3.1, Fig. 2): image <-> unordered set of M tokens out of a codebook of C codes.

    images (B, ch, H, W) in [-1, 1]
      -> ViT encoder:  patches and M learned latent tokens attend to each other; the latents come out  (B, M, code_dim)
      -> quantizer:    every latent becomes its nearest code                                           tokens (B, M)
      -> shuffle:      the order of the tokens is thrown away (training only)
      -> ViT decoder:  mask tokens, one for each patch position, read the set                          (B, P, width)
      -> pixel head:   every position becomes its patch of pixels, or a code of MaskGIT-VQGAN,
                       whose decoder makes the image from the map of codes                             (B, ch, H, W)

The same class serves the digits and ImageNet 256 x 256; only the sizes differ (see train_tokenizer.py).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dual_transform import check_integers
from published.maskgit_vqgan import VQGANDecoder


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, width) -> (B, L, width)."""

    fused_attention = "auto"  # PyTorch's fused (flash) attention: on, off, auto = on a GPU or for many keys

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, places=None):
        """places (B, N) int64: attend to these positions alone (fsdd.py); left out, to all of them."""
        B, L, width = x.shape
        if places is None:
            q, k, v = self.qkv(x).chunk(3, 2)  # each (B, L, width)
        else:
            attended = x.gather(1, places[:, :, None].expand(-1, -1, width))  # (B, N, width)
            weight, bias = (parameter.split([width, 2 * width]) for parameter in (self.qkv.weight, self.qkv.bias))
            q, (k, v) = F.linear(x, weight[0], bias[0]), F.linear(attended, weight[1], bias[1]).chunk(2, 2)
        q, k, v = (y.view(B, y.shape[1], self.heads, -1).transpose(1, 2) for y in (q, k, v))  # (B, heads, ., d)
        fused = self.fused_attention == "on" or self.fused_attention == "auto" and (x.is_cuda or k.shape[2] > 256)
        x = self.attend(q, k, v, fused)
        return self.proj(x.transpose(1, 2).reshape(B, L, width))

    def attend(self, q, k, v, fused):
        """softmax(q k' / sqrt(d)) v, of q (B, heads, L, d) and k, v (B, heads, N, d)."""
        if fused:
            return F.scaled_dot_product_attention(q, k, v)
        # written out: with few keys in bfloat16 on a CPU this is up to several times faster than the fused kernel
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block of a ViT, (B, L, width) -> (B, L, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def through(blocks, x, *condition, recompute):
    """x through the blocks one after the other, each given the condition.

    recompute: activation checkpointing. Only a block's input is kept for the backward pass, and the rest computed again
    there, which takes about a third more time and a small part of the memory.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *condition, use_reentrant=False)
        else:
            x = block(x, *condition)
    return x


@dataclass
class TokenizerConfig:
    image_size: int         # side of the square images, pixels
    channels: int           # 1 or 3
    patch_size: int         # side of a patch, pixels; an image has P patches
    num_tokens: int         # M, tokens in a set
    codebook_size: int      # C, codes in the codebook
    code_dim: int           # dimensions of a code
    width: int              # of both transformers
    heads: int
    encoder_layers: int
    decoder_layers: int
    commitment: float = 0.25        # weight of the commitment loss
    vqgan_width: int = 0            # of the MaskGIT-VQGAN decoder that makes the pixels (the paper); 0: a linear map
    vqgan_dim: int = 256            # dimensions of that VQGAN's codes
    reshaped_latents: bool = False  # see Encoder.project()

    @property
    def grid(self):
        """Patches along a side of the image; P = grid ** 2."""
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self.image_size // self.patch_size


class SetTokenizer(nn.Module):
    """Encoder, quantizer and decoder. Its arguments are the fields of TokenizerConfig."""

    def __init__(self, *sizes, **options):
        super().__init__()
        self.config = cfg = TokenizerConfig(*sizes, **options)
        if cfg.vqgan_width and (cfg.patch_size != 16 or cfg.channels != 3):
            raise ValueError("MaskGIT-VQGAN makes patches of 16 pixels in 3 channels, "
                             f"not of {cfg.patch_size} in {cfg.channels}; vqgan_width 0 does without it")
        self.image_size, self.num_tokens, self.codebook_size = cfg.image_size, cfg.num_tokens, cfg.codebook_size
        self.encoder = Encoder(cfg)
        self.quantizer = Quantizer(cfg.codebook_size, cfg.code_dim, cfg.commitment)
        self.decoder = Decoder(cfg)
        if cfg.vqgan_width:
            self.pixel_head = CodeMap(cfg.grid, cfg.width, cfg.vqgan_dim)
        else:
            self.pixel_head = PatchPixels(cfg.grid, cfg.channels, cfg.patch_size, cfg.width)
        self.apply(initialize)
        self.pixel_decoder = VQGANDecoder(cfg.vqgan_width, cfg.vqgan_dim) if cfg.vqgan_width else nn.Identity()

    def forward(self, images, shuffle=None, proxy=False, unquantized=None):
        """One training pass: images (B, ch, H, W) in [-1, 1] -> reconstructions (same shape), tokens (B, M), the
        encoder's latents (B, M, code_dim) of length 1, and the quantizer's loss.

        shuffle: (B, M) in [0, 1), determines the order in which tokens reach the decoder; None: the encoder's order.
        proxy: return the map of codes (B, vqgan_dim, H / 16, W / 16) that MaskGIT-VQGAN's decoder would be given, in
        place of the reconstructions.
        unquantized: (B,) bool, the images whose latents reach the decoder as they are; lets the decoder learn from
        exact latents too, so that both learn sooner; not in the paper.
        """
        latents = F.normalize(self.encoder(images).float(), dim=-1)
        q, tokens, loss = self.quantizer(latents)
        if unquantized is not None:
            q = torch.where(unquantized[:, None, None], latents, q)
        if shuffle is not None:
            # The set: tokens reach the decoder in random order (Sec. 3.1, Fig. 2). As no token carries a position
            # there, the decoder could not use the order anyway: the shuffle changes rounding only.
            order = shuffle.argsort(1)  # (B, M)
            q = q.gather(1, order[:, :, None].expand_as(q))
        decoded = self.pixel_head(self.decoder(q))
        return decoded if proxy else self.pixel_decoder(decoded), tokens, latents, loss

    @torch.no_grad()
    def encode(self, images):
        """Images (B, ch, H, W) in [-1, 1] -> tokens (B, M) int64 in [0, C)."""
        return self.quantizer(F.normalize(self.encoder(images).float(), dim=-1))[1]

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens (B, any number) int64 in [0, C), in any order -> images (B, ch, H, W), about [-1, 1].

        Raises ValueError for another dtype or shape, or a token outside [0, C).
        """
        check_integers("tokens", tokens, "(B, M)")
        outside = (tokens < 0) | (tokens >= self.codebook_size)
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(f"tokens[{row}, {column}] = {int(tokens[row, column])} "
                             f"is outside [0, {self.codebook_size})")
        return self.pixel_decoder(self.pixel_head(self.decoder(self.quantizer.codes()[tokens])))


def initialize(module):
    """Initial values, applied to every part of the tokenizer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    if isinstance(module, Block):  # every block starts as the identity: early training is faster (not in the paper)
        nn.init.zeros_(module.attention.proj.weight)
        nn.init.zeros_(module.mlp[2].weight)


class Encoder(nn.Module):
    """ViT encoder: images (B, ch, H, W) in [-1, 1] -> latents (B, M, code_dim)."""

    recompute = False  # see through()

    def __init__(self, cfg):
        super().__init__()
        self.reshaped_latents = cfg.reshaped_latents
        width = cfg.width
        self.patches = nn.Conv2d(cfg.channels, width, cfg.patch_size, stride=cfg.patch_size)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + cfg.grid ** 2, width) * width ** -0.5)
        self.latents = nn.Parameter(torch.randn(cfg.num_tokens, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, cfg.heads) for _ in range(cfg.encoder_layers)])
        self.norm_out = nn.LayerNorm(width)
        self.to_code = nn.Linear(width, cfg.code_dim)

    def forward(self, images):
        return self.project(self.features(images))

    def features(self, images):
        """What the latents are computed from, (B, M, width)."""
        B = len(images)
        x = self.patches((images + 1) / 2).flatten(2).transpose(1, 2)  # (B, P, width); pixels enter in [0, 1]
        x = torch.cat([self.class_embedding.expand(B, 1, -1).to(x.dtype), x], dim=1) + self.positions.to(x.dtype)
        x = torch.cat([x, self.latents.expand(B, -1, -1).to(x.dtype)], dim=1)  # (B, 1 + P + M, width)
        x = through(self.blocks, self.norm_in(x), recompute=self.recompute)
        return self.norm_out(x[:, -len(self.latents):])

    def project(self, x):
        """Features (B, M, width) -> latents (B, M, code_dim).

        With reshaped_latents, as in the authors' release, the M rows of length width are read in memory order as width
        rows of length M, which mixes many rows in every latent. Its weights need that; our own training does not.
        """
        if self.reshaped_latents:
            x = x.reshape(len(x), -1, x.shape[1]).transpose(1, 2)
        return self.to_code(x)


class Quantizer(nn.Module):
    """Latents (B, M, code_dim) of length 1 -> the nearest of C codes, which have length 1 too."""

    def __init__(self, codebook_size, code_dim, commitment):
        super().__init__()
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, code_dim), dim=-1))
        self.commitment = commitment

    def codes(self):
        """The codebook with every code at length 1, (C, code_dim)."""
        return F.normalize(self.codebook, dim=-1)

    def forward(self, latents):
        """Returns the codes (B, M, code_dim), whose gradient goes straight through to the latents, the tokens (B, M)
        and the loss: latents are pulled to their codes (commitment) and codes to their latents."""
        codes = self.codes()
        with torch.autocast(latents.device.type, enabled=False):
            # on the sphere, the nearest code has the largest inner product
            tokens = (latents.detach() @ codes.detach().t()).argmax(-1)
        q = codes[tokens]
        loss = self.commitment * F.mse_loss(latents, q.detach()) + F.mse_loss(q, latents.detach())
        return latents + (q - latents).detach(), tokens, loss


class Decoder(nn.Module):
    """ViT decoder: a set of codes (B, any number, code_dim) -> features of every patch position (B, P, width)."""

    recompute = False  # see through()

    def __init__(self, cfg):
        super().__init__()
        width = cfg.width
        self.from_code = nn.Linear(cfg.code_dim, width)  # and no position: nothing tells the first token from the last
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.mask_token = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + cfg.grid ** 2, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, cfg.heads) for _ in range(cfg.decoder_layers)])
        self.norm_out = nn.LayerNorm(width)

    def embed(self, q):
        """Codes (B, M, code_dim) -> (B, M, width)."""
        return self.from_code(q)

    def forward(self, q):
        x = self.embed(q)
        P = len(self.positions) - 1
        masks = torch.cat([self.class_embedding[None], self.mask_token.expand(P, -1)])  # (1 + P, width)
        masks = masks + self.positions
        x = torch.cat([masks.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P + M, width)
        x = through(self.blocks, self.norm_in(x), recompute=self.recompute)
        return self.norm_out(x[:, 1:1 + P])


class PatchPixels(nn.Module):
    """Pixel head: a linear map from every patch position to its pixels, (B, P, width) -> (B, ch, H, W)."""

    def __init__(self, grid, channels, patch_size, width):
        super().__init__()
        self.grid = grid
        self.to_pixels = nn.Linear(width, channels * patch_size ** 2)
        self.unpatch = nn.PixelShuffle(patch_size)

    def forward(self, x):
        x = self.to_pixels(x).transpose(1, 2)  # (B, ch * patch_size^2, P)
        return self.unpatch(x.unflatten(2, (self.grid, self.grid)))


class CodeMap(nn.Module):
    """Pixel head of the paper: from every patch position to a code of MaskGIT-VQGAN,
    (B, P, width) -> (B, vqgan_dim, H / 16, W / 16)."""

    def __init__(self, grid, width, vqgan_dim):
        super().__init__()
        self.grid = grid
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, vqgan_dim))

    def forward(self, x):
        return self.mlp(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
