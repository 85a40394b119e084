"""The set tokenizer (Sec. 3.1, Fig. 2): image <-> unordered set of M tokens out of a codebook of C codes.

    images (B, ch, H, W) in [-1, 1]
      -> ViT encoder:  patches and M learned latent tokens attend to each other; the latents come out  (B, M, code_dim)
      -> quantizer:    every latent becomes its nearest code                                           tokens (B, M)
      -> shuffle:      the order of the tokens is thrown away (training only)
      -> ViT decoder:  mask tokens, one a patch place, read the set                                    (B, P, width)
      -> pixel head:   every place becomes its patch of pixels                                         (B, ch, H, W)

The same class serves the digits and ImageNet 256 x 256; only the sizes differ (see train_tokenizer.py).
"""
import torch
import torch.nn.functional as F
from torch import nn

from dual_transform import check_integers, refuse_where


class Attention(nn.Module):
    """Multi-head self-attention without a mask, (B, L, width) -> (B, L, width)."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, L, width = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, L, width / heads)
        if x.is_cuda or L > 256:
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # the same, written out: for short sequences in bfloat16 on a CPU it is several times faster than the fused kernel
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, L, width))


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


class SetTokenizer(nn.Module):
    """Encoder, quantizer and decoder.

    image_size: side of the square images in pixels.  channels: 1 or 3.  patch_size: side of a patch; P patches an image.
    num_tokens: M.  codebook_size: C.  code_dim: dimensions of a code.  width, heads: of both transformers.
    commitment: weight of the commitment loss.
    """

    def __init__(self, image_size, channels, patch_size, num_tokens, codebook_size, code_dim, width, heads,
                 encoder_layers, decoder_layers, commitment=0.25):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.image_size, self.num_tokens, self.codebook_size = image_size, num_tokens, codebook_size
        grid = image_size // patch_size
        self.encoder = Encoder(grid, channels, patch_size, width, heads, encoder_layers, num_tokens, code_dim)
        self.quantizer = Quantizer(codebook_size, code_dim, commitment)
        self.decoder = Decoder(grid, width, heads, decoder_layers, code_dim)
        self.pixel_head = PatchPixels(grid, channels, patch_size, width)
        self.apply(initialize)

    def forward(self, images, uniform=None):
        """One training pass: images (B, ch, H, W) in [-1, 1] -> reconstructions (same shape), tokens (B, M), the encoder's
        latents (B, M, code_dim) of length 1, and the quantizer's loss.

        uniform: (B, M) in [0, 1), the shuffle that the tokens reach the decoder with hangs on it; left out, none.
        """
        latents = F.normalize(self.encoder(images).float(), dim=-1)
        q, tokens, loss = self.quantizer(latents)
        if uniform is not None:
            # The set: tokens reach the decoder in random order (Sec. 3.1, Fig. 2). As no token carries a position there, the
            # decoder could not use the order anyway; the shuffle changes rounding only, and shows what the code is about.
            order = uniform.argsort(1)  # (B, M)
            q = q.gather(1, order[:, :, None].expand_as(q))
        return self.pixel_head(self.decoder(q)), tokens, latents, loss

    @torch.no_grad()
    def encode(self, images):
        """images (B, ch, H, W) in [-1, 1] -> tokens (B, M) int64 in [0, C)."""
        return self.quantizer(F.normalize(self.encoder(images).float(), dim=-1))[1]

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens (B, any number) int64 in [0, C), in any order -> images (B, ch, H, W), about [-1, 1]."""
        check_integers("tokens", tokens, "(B, M)")
        refuse_where("tokens", tokens, (tokens < 0) | (tokens >= self.codebook_size), f"outside [0, {self.codebook_size})")
        return self.pixel_head(self.decoder(self.quantizer.codes()[tokens]))


def initialize(module):
    """Initial values, called for every part of the tokenizer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    if isinstance(module, Block):  # at the start every block is the identity: training gets going sooner (not in the paper)
        nn.init.zeros_(module.attention.proj.weight)
        nn.init.zeros_(module.mlp[2].weight)


class Encoder(nn.Module):
    """ViT encoder: images (B, ch, H, W) in [-1, 1] -> latents (B, M, code_dim)."""

    def __init__(self, grid, channels, patch_size, width, heads, layers, num_tokens, code_dim):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + grid ** 2, width) * width ** -0.5)
        self.latents = nn.Parameter(torch.randn(num_tokens, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)
        self.to_code = nn.Linear(width, code_dim)

    def forward(self, images):
        B, M = len(images), len(self.latents)
        x = self.patches((images + 1) / 2).flatten(2).transpose(1, 2)  # (B, P, width); pixels enter in [0, 1]
        places = torch.cat([self.class_embedding.expand(B, 1, -1).to(x.dtype), x], dim=1) + self.positions.to(x.dtype)
        x = torch.cat([places, self.latents.expand(B, -1, -1).to(x.dtype)], dim=1)  # (B, 1 + P + M, width)
        x = self.blocks(self.norm_in(x))[:, -M:]  # (B, M, width)
        return self.to_code(self.norm_out(x))


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
        """Returns the codes (B, M, code_dim), whose gradient goes straight through to the latents, the tokens (B, M) and the
        loss: latents are pulled to their codes (commitment) and codes to their latents."""
        codes = self.codes()
        with torch.autocast(latents.device.type, enabled=False):
            tokens = (latents.detach() @ codes.detach().t()).argmax(-1)  # on the sphere, nearest is largest inner product
        q = codes[tokens]
        loss = self.commitment * F.mse_loss(latents, q.detach()) + F.mse_loss(q, latents.detach())
        return latents + (q - latents).detach(), tokens, loss


class Decoder(nn.Module):
    """ViT decoder: a set of codes (B, any number, code_dim) -> features of every patch place (B, P, width)."""

    def __init__(self, grid, width, heads, layers, code_dim):
        super().__init__()
        self.from_code = nn.Linear(code_dim, width)  # and no position: nothing tells the first token from the last
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.mask_token = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + grid ** 2, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)

    def forward(self, q):
        x = self.from_code(q)  # (B, M, width)
        P = len(self.positions) - 1
        places = torch.cat([self.class_embedding[None], self.mask_token.expand(P, -1)]) + self.positions  # (1 + P, width)
        x = torch.cat([places.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P + M, width)
        return self.norm_out(self.blocks(self.norm_in(x))[:, 1:1 + P])


class PatchPixels(nn.Module):
    """Pixel head: a linear map from every patch place to its pixels, (B, P, width) -> (B, ch, H, W)."""

    def __init__(self, grid, channels, patch_size, width):
        super().__init__()
        self.grid = grid
        self.to_pixels = nn.Linear(width, channels * patch_size ** 2)
        self.unpatch = nn.PixelShuffle(patch_size)

    def forward(self, x):
        x = self.to_pixels(x).transpose(1, 2)  # (B, ch * patch_size^2, P)
        return self.unpatch(x.unflatten(2, (self.grid, self.grid)))
