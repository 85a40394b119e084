"""The ways of modelling token sets that Table 5 compares FSDD with (Sec. 4.3.1). All build on the denoiser of fsdd.py.

    AR-order1, AR-order2   autoregressive over the M tokens in one order, the same for all images      autoregressive_*
    AR-random              the same over the tokens in random order                                    autoregressive_*
    AR-sorted              the same over the tokens in the order of their codes                        autoregressive_*
    SetAR                  autoregressive over the C counts                                            autoregressive_*
    Discrete Diffusion     discrete flow matching of the counts (Gat et al., arXiv 2407.15595)         flow_*
    Continuous Diffusion   flow matching of the counts as real numbers, then quantized                 continuous_*

Shapes and time as in fsdd.py: B images, C codes, M tokens, t from data (0) to noise (1). The losses take a
train_fsdd.Batch.
steps, times: see fsdd.sampling_times().  guidance: see fsdd.guidance_weight().  top_p, top_k: see fsdd.truncate().
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from fsdd import (Denoiser, fsdd_loss, greedy_adjust, guidance_weight, guided_probabilities, sample_categorical,
                  sample_noise, sampling_times)


def zero_linear(inputs, outputs):
    """A linear layer of zeros, as the denoiser's last one is at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# Autoregressive: p(x) = product over i of p(x_i | x_0 .. x_{i-1})


class CausalDenoiser(Denoiser):
    """p(x_i | x_0 .. x_{i-1}) of sequences of a length, of symbols 0..symbols - 1.

    The positions take the place of the denoiser's codes (codebook_size), the symbols that of its counts (num_tokens).
    """

    def __init__(self, length, symbols, num_classes, width, layers, heads, gelu="tanh"):
        super().__init__(length, symbols, num_classes, width, layers, heads, gelu=gelu)
        self.to_logits = zero_linear(width, symbols)

    def forward(self, x, t, labels):
        """The first n symbols x (B, n) int64, n < length, labels (B,) -> logits (B, n + 1, symbols) of these and the
        next one. t (B,): 0, as there is no time."""
        c = self.condition(t, labels)
        x = F.pad(x, (1, 0), value=self.num_tokens)  # a sequence starts with a symbol of its own
        x = (self.count_embedding(x) + self.code_embedding[:, :x.shape[1]]).to(c.dtype)  # (B, n + 1, width)
        for block in self.blocks:
            x = causal_block(block, x, c)
        return self.head(x, c)


def causal_block(block, x, c):
    """fsdd.DiTBlock.forward() with attention of every position to itself and those before it."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)[:, None].chunk(6, dim=2)  # each (B, 1, width)
    q, k, v = block.attention.qkv(block.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=2)
    x = x + gate1 * block.attention.attend(q, k, v, is_causal=True)
    return x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)


def autoregressive_loss(model, batch):
    """Cross-entropy of every symbol given those before it, mean over positions and sequences.

    batch: x0 (B, length), the sequences, and labels (B,).
    """
    x, no_time = batch.x0, torch.zeros(len(batch.x0), device=batch.x0.device)
    logits = model(x[:, :-1], no_time, batch.labels)  # (B, length, symbols)
    return F.cross_entropy(logits.float().flatten(0, 1), x.flatten())


@torch.no_grad()
def autoregressive_generate(model, labels, guidance=(1.0,), top_p=1.0, top_k=0, generator=None):
    """Sequences (B, length) int64 for labels (B,), symbol by symbol."""
    length = model.codebook_size
    x = labels.new_zeros(len(labels), 0)
    for i in range(length):
        weight = guidance_weight(guidance, 1 - i / length)
        p = guided_probabilities(model, x, 0.0, labels, weight)[:, -1]  # (B, symbols)
        u = torch.rand(len(x), generator=generator, device=x.device)
        x = torch.cat([x, sample_categorical(p, u, top_p, top_k)[:, None]], dim=1)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Discrete flow matching: every count is noise or data, and on the way each jumps once. No state has to sum to M.


def flow_process(x0, x1, t, uniform):
    """X_t: every count is that of X_1 with probability t, else that of X_0.

    x0, x1: (B, C).  t: (B,).  uniform: (B, C) in [0, 1).
    """
    return torch.where(uniform < t[:, None], x1, x0)


def flow_loss(denoiser, batch):
    """fsdd.fsdd_loss() at the X_t of flow_process()."""
    x0 = batch.x0
    x1 = sample_noise(*x0.shape, int(x0[0].sum()), "multinomial", device=x0.device)
    x_t = flow_process(x0, x1, batch.t, torch.rand(x0.shape, device=x0.device))
    return fsdd_loss(denoiser, batch._replace(x_t=x_t))


@torch.no_grad()
def flow_generate(denoiser, labels, steps=25, times="even", guidance=(1.0,), top_p=1.0, top_k=0, generator=None):
    """Counts (B, C) int64 for labels (B,), of any sum.

    From t to s each count jumps to a draw of x_0 with probability (t - s) / t.
    """
    B, C, M, device = len(labels), denoiser.codebook_size, denoiser.num_tokens, labels.device
    x = sample_noise(B, C, M, "multinomial", generator, device)
    for t, s in pairwise(sampling_times(steps, times)):
        u0, u = torch.rand(2, B, C, generator=generator, device=device)
        p = guided_probabilities(denoiser, x, t, labels, guidance_weight(guidance, t))  # (B, C, M + 1)
        x = torch.where(u * t < t - s, sample_categorical(p, u0, top_p, top_k), x)  # in the last step all jump
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Continuous: counts as real numbers. Every state sums to M, but only the last one consists of integers


class ContinuousDenoiser(Denoiser):
    """A denoiser of real numbers: (B, C, 1), t (B,), labels (B,) -> (B, C, 1)."""

    def __init__(self, codebook_size, num_tokens, num_classes, width, layers, heads, gelu="tanh"):
        super().__init__(codebook_size, num_tokens, num_classes, width, layers, heads, gelu=gelu)
        self.count_embedding = nn.Linear(1, width)
        nn.init.normal_(self.count_embedding.weight, std=0.02)  # as that of counts
        nn.init.zeros_(self.count_embedding.bias)
        self.to_logits = zero_linear(width, 1)


def standardize(counts, num_tokens):
    """Counts (B, C) -> real numbers of sum 0, and of variance 1 where the M tokens are drawn uniformly."""
    mean = num_tokens / counts.shape[1]
    return (counts - mean) / (mean * (1 - 1 / counts.shape[1])) ** 0.5


def quantize(x, num_tokens):
    """The inverse of standardize(), x (B, C) of any values: rounded to counts in [0, M], then adjusted until they sum
    to M by the steps that add least to the squared distance."""
    mean = num_tokens / x.shape[1]
    counts = (x * (mean * (1 - 1 / x.shape[1])) ** 0.5 + mean).nan_to_num().clamp(0, num_tokens)
    # greedy_adjust() compares differences of probability; of so wide a Gaussian they are those of the squared distance
    return greedy_adjust(counts.round(), lambda k: -1e-6 * (k - counts.double()) ** 2, num_tokens)


def velocity(model, x_t, t, labels):
    """The estimate of X_1 - X_0 at X_t, (B, C), sum 0. x_t (B, C), t (B,), labels (B,)."""
    v = model(x_t[:, :, None], t, labels)[:, :, 0].float()
    return v - v.mean(1, keepdim=True)


def continuous_noise(normal):
    """X_1: independent Gaussians (B, C), shifted to the sum 0."""
    return normal - normal.mean(1, keepdim=True)


def continuous_loss(model, batch):
    """Squared error of the velocity at X_t = t X_1 + (1 - t) X_0."""
    x0, t = standardize(batch.x0, int(batch.x0[0].sum())), batch.t[:, None]
    x1 = continuous_noise(torch.randn(x0.shape, device=x0.device))
    return F.mse_loss(velocity(model, t * x1 + (1 - t) * x0, batch.t, batch.labels), x1 - x0)


@torch.no_grad()
def continuous_generate(model, labels, steps=25, times="even", guidance=(1.0,), generator=None):
    """Counts (B, C) int64 for labels (B,), every row sums to M: Euler steps from noise to data, then quantize()."""
    B, C, device = len(labels), model.codebook_size, labels.device
    x = continuous_noise(torch.randn(B, C, generator=generator, device=device))
    null = torch.full_like(labels, model.num_classes)
    for t, s in pairwise(sampling_times(steps, times)):
        time, weight = torch.full((2 * B,), t, device=device), guidance_weight(guidance, t)
        v, v_null = velocity(model, x.repeat(2, 1), time, torch.cat([labels, null])).chunk(2)
        x = x - (v_null + weight * (v - v_null)) * (t - s)
    return quantize(x, model.num_tokens)
