"""The set tokenizer (Sec. 3.1, Fig. 2): image <-> unordered set of M tokens out of a codebook of C codes.

    images (B, ch, H, W) in [-1, 1]
      -> ViT encoder:  patches and M learned latent tokens attend to each other; the latents come out  (B, M, code_dim)
      -> quantizer:    every latent is replaced by its nearest code                                    tokens (B, M)
      -> shuffle:      the order of the tokens is discarded (training only)
      -> ViT decoder:  mask tokens, one for each patch position, attend to the set                     (B, P, width)
      -> pixel head:   every position becomes its patch of pixels, or a code of MaskGIT-VQGAN,
                       whose decoder turns the map of codes into the image                             (B, ch, H, W)

Digits, emoji and ImageNet 256 x 256 use the same class, with other sizes and another pixel head (see
train_tokenizer.py).
"""
import torch
import torch.nn.functional as F
from torch import nn

from published.maskgit_vqgan import VQGANDecoder


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, width) -> (B, L, width).

    rows: a slice, the positions that attend; they attend to all L, and only they are returned.
    """

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rows=slice(None)):
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.attend(q[:, rows], k, v)

    def attend(self, q, k, v, **options):
        """softmax(q k' / sqrt(d)) v for every head, then the output projection. q: (B, L, width); k, v: (B, N, width).

        options: further arguments of F.scaled_dot_product_attention.
        """
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L or N, d)
        if options or q.is_cuda or k.shape[2] > 256:
            x = F.scaled_dot_product_attention(q, k, v, **options)
        else:  # with few keys on a CPU, the fused kernel takes as long in float32, and longer in bfloat16
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, heads, L, N)
            x = scores.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, L, width)


class Block(nn.Module):
    """Pre-norm transformer block of a ViT, (B, L, width) -> (B, L, width).

    rows: a slice, the positions to compute; the last block of a transformer does without those that nothing reads.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, rows=slice(None)):
        x = x[:, rows] + self.attention(self.norm1(x), rows)
        return x + self.mlp(self.norm2(x))


class SetTokenizer(nn.Module):
    """Encoder, quantizer and decoder.

    image_size: side of the square images, pixels.  channels: 1 or 3.
    patch_size: side of a patch, pixels; an image has P = (image_size / patch_size)^2 patches.
    num_tokens: M, tokens in a set.  codebook_size: C, codes in the codebook.  code_dim: dimensions of a code.
    width, heads: of both transformers.  encoder_layers, decoder_layers: their numbers of blocks.
    commitment: weight of the commitment loss.
    vqgan_width: first width of the MaskGIT-VQGAN decoder that makes the pixels (the paper); 0: a linear map does.
    vqgan_dim: dimensions of that VQGAN's codes.
    reshaped_latents: see Encoder.project().
    """

    def __init__(self, image_size, channels, patch_size, num_tokens, codebook_size, code_dim, width, heads,
                 encoder_layers, decoder_layers, commitment=0.25, vqgan_width=0, vqgan_dim=256,
                 reshaped_latents=False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if vqgan_width and (patch_size != 16 or channels != 3):
            raise ValueError("MaskGIT-VQGAN makes patches of 16 pixels in 3 channels, "
                             f"not of {patch_size} in {channels}; use vqgan_width 0 to do without it")
        self.image_size, self.channels = image_size, channels
        self.num_tokens, self.codebook_size = num_tokens, codebook_size
        side = image_size // patch_size  # in patches; P = side^2
        self.encoder = Encoder(channels, patch_size, side ** 2, num_tokens, code_dim, width, heads, encoder_layers,
                               reshaped_latents)
        self.quantizer = Quantizer(codebook_size, code_dim, commitment)
        self.decoder = Decoder(side ** 2, code_dim, width, heads, decoder_layers)
        if vqgan_width:
            self.pixel_head = CodeMap(side, width, vqgan_dim)
        else:
            self.pixel_head = PatchPixels(side, channels, patch_size, width)
        self.apply(initialize)
        self.pixel_decoder = VQGANDecoder(vqgan_width, vqgan_dim) if vqgan_width else nn.Identity()

    def forward(self, images, shuffle=None, proxy=False, unquantized=None):
        """One training pass.

        images: (B, ch, H, W) in [-1, 1].
        shuffle: (B, M) in [0, 1), determines the order in which tokens reach the decoder; None: the encoder's order.
        proxy: return the map of codes (B, vqgan_dim, H / 16, W / 16) that MaskGIT-VQGAN's decoder would receive, in
        place of the reconstructions.
        unquantized: (B,) bool, the images whose latents skip the quantizer. The decoder then also learns from exact
        latents, which speeds up the training of encoder and decoder (not in the paper).
        Returns reconstructions (B, ch, H, W), tokens (B, M), the encoder's latents (B, M, code_dim) of length 1, and
        the quantizer's loss.
        """
        latents = self.latents(images)
        q, tokens, loss = self.quantizer(latents)
        if unquantized is not None:
            q = torch.where(unquantized[:, None, None], latents, q)
        if shuffle is not None:
            # The set: tokens reach the decoder in random order (Sec. 3.1, Fig. 2). As no token carries a position
            # there, the decoder could not use the order anyway: the shuffle changes nothing but rounding.
            q = q.take_along_dim(shuffle.argsort(1)[:, :, None], dim=1)
        decoded = self.pixel_head(self.decoder(q))
        return decoded if proxy else self.pixel_decoder(decoded), tokens, latents, loss

    def latents(self, images):
        """Images (B, ch, H, W) in [-1, 1] -> latents (B, M, code_dim) of length 1, before quantization."""
        return F.normalize(self.encoder(images).float(), dim=-1)

    @torch.no_grad()
    def encode(self, images):
        """Images (B, ch, H, W) in [-1, 1] -> tokens (B, M) int64 in [0, C)."""
        return self.quantizer(self.latents(images))[1]

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens (B, any number) int64 in [0, C), in any order -> images (B, ch, H, W), about [-1, 1].

        Raises ValueError for a token outside [0, C).
        """
        outside = tokens[(tokens < 0) | (tokens >= self.codebook_size)]
        if len(outside):
            raise ValueError(f"token {outside[0]} is outside [0, {self.codebook_size})")
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

    def __init__(self, channels, patch_size, num_patches, num_tokens, code_dim, width, heads, layers,
                 reshaped_latents=False):
        super().__init__()
        self.reshaped_latents = reshaped_latents
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)  # of a ViT; its output is not used
        self.positions = nn.Parameter(torch.randn(1 + num_patches, width) * width ** -0.5)
        self.latents = nn.Parameter(torch.randn(num_tokens, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)
        self.to_code = nn.Linear(width, code_dim)

    def forward(self, images):
        return self.project(self.features(images))

    def features(self, images):
        """The last hidden states of the latent tokens, (B, M, width)."""
        B = len(images)
        x = self.patches((images + 1) / 2).flatten(2).transpose(1, 2)  # (B, P, width); pixels enter in [0, 1]
        x = torch.cat([self.class_embedding.expand(B, 1, -1).to(x.dtype), x], dim=1) + self.positions.to(x.dtype)
        x = torch.cat([x, self.latents.expand(B, -1, -1).to(x.dtype)], dim=1)  # (B, 1 + P + M, width)
        x = self.blocks[:-1](self.norm_in(x))
        x = self.blocks[-1](x, slice(-len(self.latents), None))  # (B, M, width)
        return self.norm_out(x)

    def project(self, x):
        """Features (B, M, width) -> latents (B, M, code_dim).

        With reshaped_latents, as in the authors' release, the (M, width) numbers are read in memory order as
        (width, M), which mixes many rows into every latent. The released weights need that; our own training does not
        do it.
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
        """The codebook with every code normalized to length 1, (C, code_dim)."""
        return F.normalize(self.codebook, dim=-1)

    def forward(self, latents):
        """Returns the codes (B, M, code_dim), whose gradient goes straight through to the latents, the tokens (B, M)
        and the loss: latents are pulled to their codes (commitment) and codes to their latents."""
        codes = self.codes()
        with torch.autocast(latents.device.type, enabled=False):
            # on the sphere, the nearest code has the largest inner product
            tokens = (latents.detach() @ codes.detach().t()).argmax(-1)
        q = F.embedding(tokens, codes)  # (B, M, code_dim)
        loss = self.commitment * F.mse_loss(latents, q.detach()) + F.mse_loss(q, latents.detach())
        return latents + (q - latents).detach(), tokens, loss


class Decoder(nn.Module):
    """ViT decoder: a set of codes (B, any number, code_dim) -> features of every patch position (B, P, width)."""

    def __init__(self, num_patches, code_dim, width, heads, layers):
        super().__init__()
        self.from_code = nn.Linear(code_dim, width)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.mask_token = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + num_patches, width) * width ** -0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)

    def embed(self, q):
        """Codes (B, M, code_dim) -> (B, M, width). No position is added: nothing distinguishes the first token from
        the last. (A subclass in paper/layouts.py adds one.)"""
        return self.from_code(q)

    def forward(self, q):
        x = self.embed(q)
        P = len(self.positions) - 1
        masks = torch.cat([self.class_embedding[None], self.mask_token.expand(P, -1)])  # (1 + P, width)
        masks = masks + self.positions
        x = torch.cat([masks.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P + M, width)
        x = self.blocks[:-1](self.norm_in(x))
        x = self.blocks[-1](x, slice(1, 1 + P))  # (B, P, width)
        return self.norm_out(x)


class PatchPixels(nn.Module):
    """Pixel head of digits and emoji: a linear map from patch positions to pixels, (B, P, width) -> (B, ch, H, W)."""

    def __init__(self, side, channels, patch_size, width):
        super().__init__()
        self.side = side
        self.to_pixels = nn.Linear(width, channels * patch_size ** 2)
        self.unpatch = nn.PixelShuffle(patch_size)

    def forward(self, x):
        x = self.to_pixels(x).transpose(1, 2)  # (B, ch * patch_size^2, P)
        return self.unpatch(x.unflatten(2, (self.side, self.side)))


class CodeMap(nn.Module):
    """Pixel head of the paper: from every patch position to a code of MaskGIT-VQGAN,
    (B, P, width) -> (B, vqgan_dim, H / 16, W / 16)."""

    def __init__(self, side, width, vqgan_dim):
        super().__init__()
        self.side = side
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, vqgan_dim))

    def forward(self, x):
        return self.mlp(x).transpose(1, 2).unflatten(2, (self.side, self.side))
