"""Tokenizers whose tokens have an order, which the paper compares the set with (Sec. 4.2.2, 4.2.3).

    sequence   as TiTok: the decoder adds a learned position to every token
    grid       as VQGAN: in addition, the encoder has no latents; every patch position becomes a token, so that M = P

    python -m paper.layouts grid --num_tokens 16        trains one; its options are those of train_tokenizer.py

Its checkpoint is of the kind "sequence tokenizer" or "grid tokenizer". train_fsdd.py refuses both, as counts would lose
the order.
"""
import argparse

import torch
from torch import nn

import train_tokenizer
from support.command_line import Parser
from support.training import run
from tokenizer import Decoder, Encoder, SetTokenizer, initialize


class SequenceDecoder(Decoder):
    """A Decoder of exactly M codes, each with an embedding of its position."""

    def __init__(self, num_patches, num_tokens, code_dim, width, heads, layers):
        super().__init__(num_patches, code_dim, width, heads, layers)
        self.token_positions = nn.Parameter(torch.randn(num_tokens, width) * width ** -0.5)

    def embed(self, q):
        x = super().embed(q)
        return x + self.token_positions.to(x.dtype)


class SequenceTokenizer(SetTokenizer):
    """Image <-> sequence of M tokens. sizes: the arguments of SetTokenizer."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.num_patches = len(self.decoder.positions) - 1
        self.decoder = SequenceDecoder(self.num_patches, self.num_tokens, sizes["code_dim"], sizes["width"],
                                       sizes["heads"], sizes["decoder_layers"]).apply(initialize)

    def forward(self, images, shuffle=None, proxy=False, unquantized=None):
        return super().forward(images, None, proxy, unquantized)  # no shuffle: the order matters

    def decode(self, tokens):
        """Tokens (B, M) int64 in [0, C), in their order -> images (B, ch, H, W). ValueError for another number of
        tokens, or a token outside [0, C)."""
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(f"a {layout_of(self)} has {self.num_tokens} tokens, got {tokens.shape[1]}")
        return super().decode(tokens)


class GridEncoder(Encoder):
    """An Encoder with num_tokens = 0 latents: the patch positions become the tokens."""

    def features(self, images):
        return super().features(images)[:, 1:]  # with 0 latents, [:, -0:] gives all positions; the class comes first


class GridTokenizer(SequenceTokenizer):
    """Image <-> grid of P tokens, row by row."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        if self.num_tokens != self.num_patches:
            raise ValueError(f"a grid has a token for each of the {self.num_patches} patches, "
                             f"got num_tokens {self.num_tokens}")
        self.encoder = GridEncoder(self.channels, sizes["patch_size"], self.num_patches, 0, sizes["code_dim"],
                                   sizes["width"], sizes["heads"], sizes["encoder_layers"]).apply(initialize)


KINDS = {"tokenizer": SetTokenizer, "sequence tokenizer": SequenceTokenizer, "grid tokenizer": GridTokenizer}


def layout_of(tokenizer):
    """The word for what a tokenizer's tokens form: set, sequence or grid."""
    return {SetTokenizer: "set", SequenceTokenizer: "sequence", GridTokenizer: "grid"}[type(tokenizer)]


def main(argv=None):
    parser = Parser(prog="python -m paper.layouts", description=__doc__)
    parser.add_argument("layout", choices=("sequence", "grid"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of train_tokenizer.py")
    args = parser.parse_args(argv)
    kind = f"{args.layout} tokenizer"
    train_tokenizer.main(args.options, KINDS[kind], kind)


if __name__ == "__main__":
    run(main)
