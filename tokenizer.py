"""The set tokenizer (Sec. 3.1, Fig. 2): image <-> unordered set of M tokens out of a codebook of C codes.

    images (B, ch, H, W) in [-1, 1]
      -> ViT encoder:  patches and M learned latent tokens attend to each other; the latents come out  (B, M, code_dim)
      -> quantizer:    every latent becomes its nearest code                                           tokens (B, M)
      -> shuffle:      the order of the tokens is thrown away (training only)
      -> ViT decoder:  mask tokens, one a patch place, read the set                                    (B, P, width)
      -> pixel head:   every place becomes its patch of pixels, or a code of MaskGIT-VQGAN,
                       whose decoder draws the image from the map of codes                             (B, ch, H, W)

The same class serves the digits and ImageNet 256 x 256; only the sizes differ (see train_tokenizer.py). MaskGIT-VQGAN, the
convolutional tokenizer that the paper's training builds on, stands at the end.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dual_transform import check_integers, refuse_where


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, width) -> (B, L, width)."""

    causal = False  # whether a place sees only itself and those before it; sets have no before (paper/baselines.py)
    fused_attention = "auto"  # PyTorch's fused (flash) attention: on, off, auto = on a GPU or for long sequences

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
        if self.fused_attention == "on" or self.fused_attention == "auto" and (x.is_cuda or L > 256):
            x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:  # the same, written out: for short sequences in bfloat16 on a CPU it is several times faster than the fused kernel
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, heads, L, L)
            if self.causal:
                scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1), -torch.inf)
            x = scores.softmax(-1) @ v
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


def through(blocks, x, *condition, recompute):
    """x through the blocks one after the other, each given the condition.

    recompute: keep only what enters a block for the backward pass and compute the rest again there, which takes about a
    third more time and a small part of the memory (activation checkpointing).
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *condition, use_reentrant=False)
        else:
            x = block(x, *condition)
    return x


class SetTokenizer(nn.Module):
    """Encoder, quantizer and decoder.

    image_size: side of the square images in pixels.  channels: 1 or 3.  patch_size: side of a patch; P patches an image.
    num_tokens: M.  codebook_size: C.  code_dim: dimensions of a code.  width, heads: of both transformers.
    commitment: weight of the commitment loss.
    vqgan_width: width of the MaskGIT-VQGAN decoder that draws the pixels (the paper; patch_size must be 16, channels 3), or 0:
    a linear map from every place to its patch.  vqgan_dim: dimensions of that VQGAN's codes.
    reshaped_latents: see Encoder.
    layout: what a token's place says. "set" (the paper): nothing. "sequence" and "grid" are what the paper compares with:
    in a sequence (TiTok) the decoder adds a learned position to every token; in a grid (VQGAN) moreover the encoder has no
    latents, every patch place becomes a token, so that M = P.
    """

    def __init__(self, image_size, channels, patch_size, num_tokens, codebook_size, code_dim, width, heads, encoder_layers,
                 decoder_layers, commitment=0.25, vqgan_width=0, vqgan_dim=256, reshaped_latents=False, layout="set"):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if vqgan_width and (patch_size != 16 or channels != 3):
            raise ValueError(f"MaskGIT-VQGAN draws patches of 16 pixels in 3 channels, not of {patch_size} in {channels}; "
                             f"vqgan_width 0 does without it")
        self.image_size, self.num_tokens, self.codebook_size, self.layout = image_size, num_tokens, codebook_size, layout
        grid = image_size // patch_size
        if layout not in ("set", "sequence", "grid"):
            raise ValueError(f"layout must be set, sequence or grid, got {layout!r}")
        if layout == "grid" and num_tokens != grid ** 2:
            raise ValueError(f"a grid has a token for each of the {grid ** 2} patches, got num_tokens {num_tokens}")
        self.encoder = Encoder(grid, channels, patch_size, width, heads, encoder_layers, num_tokens * (layout != "grid"), code_dim,
                               reshaped_latents)
        self.quantizer = Quantizer(codebook_size, code_dim, commitment)
        self.decoder = Decoder(grid, width, heads, decoder_layers, code_dim, num_tokens * (layout != "set"))
        self.pixel_head = CodeMap(grid, width, vqgan_dim) if vqgan_width else PatchPixels(grid, channels, patch_size, width)
        self.apply(initialize)
        self.pixel_decoder = VQGANDecoder(vqgan_width, vqgan_dim) if vqgan_width else nn.Identity()

    def forward(self, images, uniform=None, proxy=False):
        """One training pass: images (B, ch, H, W) in [-1, 1] -> reconstructions (same shape), tokens (B, M), the encoder's
        latents (B, M, code_dim) of length 1, and the quantizer's loss.

        uniform: (B, M) in [0, 1), the shuffle that a set's tokens reach the decoder with hangs on it; left out, none.
        proxy: give the map of codes (B, vqgan_dim, H / 16, W / 16) that MaskGIT-VQGAN would draw, in place of reconstructions.
        """
        latents = F.normalize(self.encoder(images).float(), dim=-1)
        q, tokens, loss = self.quantizer(latents)
        if uniform is not None and self.layout == "set":
            # The set: tokens reach the decoder in random order (Sec. 3.1, Fig. 2). As no token carries a position there, the
            # decoder could not use the order anyway; the shuffle changes rounding only, and shows what the code is about.
            order = uniform.argsort(1)  # (B, M)
            q = q.gather(1, order[:, :, None].expand_as(q))
        drawn = self.pixel_head(self.decoder(q))
        return drawn if proxy else self.pixel_decoder(drawn), tokens, latents, loss

    @torch.no_grad()
    def encode(self, images):
        """images (B, ch, H, W) in [-1, 1] -> tokens (B, M) int64 in [0, C)."""
        return self.quantizer(F.normalize(self.encoder(images).float(), dim=-1))[1]

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens (B, any number) int64 in [0, C), in any order -> images (B, ch, H, W), about [-1, 1].

        Of a sequence or a grid, M tokens in their order. ValueError for anything else.
        """
        check_integers("tokens", tokens, "(B, M)")
        if self.layout != "set" and tokens.shape[1] != self.num_tokens:
            raise ValueError(f"a {self.layout} has {self.num_tokens} tokens, got {tokens.shape[1]}")
        refuse_where("tokens", tokens, (tokens < 0) | (tokens >= self.codebook_size), f"outside [0, {self.codebook_size})")
        return self.pixel_decoder(self.pixel_head(self.decoder(self.quantizer.codes()[tokens])))


def initialize(module):
    """Initial values, called for every part of the tokenizer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    if isinstance(module, Block):  # at the start every block is the identity: training gets going sooner (not in the paper)
        nn.init.zeros_(module.attention.proj.weight)
        nn.init.zeros_(module.mlp[2].weight)


class Encoder(nn.Module):
    """ViT encoder: images (B, ch, H, W) in [-1, 1] -> latents (B, M, code_dim).

    num_tokens: M, or 0: what comes out stands at the P patch places, one each, and M = P.
    reshaped_latents: read the M latents of length width, in memory, as width rows of M, as the authors' release does (so
    every token mixes many latents); its weights need that, our own training does not.
    """

    recompute = False  # see through()

    def __init__(self, grid, channels, patch_size, width, heads, layers, num_tokens, code_dim, reshaped_latents):
        super().__init__()
        self.reshaped_latents = reshaped_latents
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + grid ** 2, width) * width ** -0.5)
        self.latents = nn.Parameter(torch.randn(num_tokens, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)
        self.to_code = nn.Linear(width, code_dim)

    def forward(self, images):
        return self.project(self.features(images))

    def features(self, images):
        """What the latents come from, (B, M, width)."""
        B = len(images)
        x = self.patches((images + 1) / 2).flatten(2).transpose(1, 2)  # (B, P, width); pixels enter in [0, 1]
        places = torch.cat([self.class_embedding.expand(B, 1, -1).to(x.dtype), x], dim=1) + self.positions.to(x.dtype)
        x = torch.cat([places, self.latents.expand(B, -1, -1).to(x.dtype)], dim=1)  # (B, 1 + P + M, width)
        M = len(self.latents) or places.shape[1] - 1
        return self.norm_out(through(self.blocks, self.norm_in(x), recompute=self.recompute)[:, -M:])

    def project(self, x):
        """(B, M, width) -> latents (B, M, code_dim)."""
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
        """Returns the codes (B, M, code_dim), whose gradient goes straight through to the latents, the tokens (B, M) and the
        loss: latents are pulled to their codes (commitment) and codes to their latents."""
        codes = self.codes()
        with torch.autocast(latents.device.type, enabled=False):
            tokens = (latents.detach() @ codes.detach().t()).argmax(-1)  # on the sphere, nearest is largest inner product
        q = codes[tokens]
        loss = self.commitment * F.mse_loss(latents, q.detach()) + F.mse_loss(q, latents.detach())
        return latents + (q - latents).detach(), tokens, loss


class Decoder(nn.Module):
    """ViT decoder: a set of codes (B, any number, code_dim) -> features of every patch place (B, P, width).

    num_positions: 0, or M: tell the codes by their places, which makes them a sequence.
    """

    recompute = False  # see through()

    def __init__(self, grid, width, heads, layers, code_dim, num_positions=0):
        super().__init__()
        self.from_code = nn.Linear(code_dim, width)  # and no position: nothing tells the first token from the last
        self.token_positions = nn.Parameter(torch.randn(num_positions, width) * width ** -0.5) if num_positions else None
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.mask_token = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + grid ** 2, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)

    def forward(self, q):
        x = self.from_code(q)  # (B, M, width)
        if self.token_positions is not None:
            x = x + self.token_positions.to(x.dtype)
        P = len(self.positions) - 1
        places = torch.cat([self.class_embedding[None], self.mask_token.expand(P, -1)]) + self.positions  # (1 + P, width)
        x = torch.cat([places.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P + M, width)
        return self.norm_out(through(self.blocks, self.norm_in(x), recompute=self.recompute)[:, 1:1 + P])


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


class CodeMap(nn.Module):
    """Pixel head of the paper: from every patch place to a code of MaskGIT-VQGAN, (B, P, width) -> (B, vqgan_dim, H/16, W/16)."""

    def __init__(self, grid, width, vqgan_dim):
        super().__init__()
        self.grid = grid
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, vqgan_dim))

    def forward(self, x):
        return self.mlp(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))


# ---------------------------------------------------------------------------------------------------------------------
# MaskGIT-VQGAN (Chang et al., arXiv 2202.04200): images <-> a map of codes, one a square of 16 x 16 pixels. The tensors have
# the names of the published file maskgit-vqgan-imagenet-f16-256.bin, which therefore loads as it is.

VQGAN_WIDTHS = (1, 1, 2, 2, 4)  # of the five levels, in units of the first; from one level to the next the side halves


class VQGAN(nn.Module):
    """What tells the codes of an image: encoder and codebook, and the decoder.

    width: of the first level.  dim: dimensions of a code.  num_codes: rows of the codebook.
    """

    def __init__(self, width=128, dim=256, num_codes=1024):
        super().__init__()
        self.width, self.dim = width, dim
        self.encoder = VQGANEncoder(width, dim)
        self.decoder = VQGANDecoder(width, dim)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(num_codes, dim)})

    def logits(self, code_map):
        """code_map (B, dim, h, w) -> the negative squared distance to every code, (B, num_codes, h, w)."""
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
    """images (B, 3, H, W) in [-1, 1] -> map (B, dim, H/16, W/16), before quantization."""

    def __init__(self, width, dim):
        super().__init__()
        widths = [width * factor for factor in VQGAN_WIDTHS]
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
    """map (B, dim, h, w) -> images (B, 3, 16 h, 16 w), about [-1, 1]."""

    def __init__(self, width, dim):
        super().__init__()
        widths = [width * factor for factor in VQGAN_WIDTHS]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(ResidualBlock(widths[-1], widths[-1]), ResidualBlock(widths[-1], widths[-1]))
        self.up = nn.ModuleList([VQGANLevel(before, after, doubles=i > 0)  # up[4] comes first, as in the published file
                                 for i, (before, after) in enumerate(zip(widths[1:] + widths[-1:], widths))])
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return 2 * self.conv_out(F.silu(self.norm_out(x))) - 1  # the published weights draw in [0, 1]


class VQGANLevel(nn.Module):
    """Two residual blocks, (B, before, h, w) -> (B, after, h, w); where it doubles the side, (B, after, 2 h, 2 w)."""

    def __init__(self, before, after, doubles=False):
        super().__init__()
        self.block = nn.Sequential(ResidualBlock(before, after), ResidualBlock(after, after))
        self.upsample_conv = nn.Conv2d(after, after, 3, padding=1) if doubles else None

    def forward(self, x):
        x = self.block(x)
        return self.upsample_conv(F.interpolate(x, scale_factor=2, mode="nearest")) if self.upsample_conv else x


class ResidualBlock(nn.Module):
    """(B, before, h, w) -> (B, after, h, w): norm, SiLU, convolution, twice, and around them a shortcut.

    Where the width changes, the published weights want the shortcut to act on the block's output, not on its input.
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
