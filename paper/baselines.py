"""The ways of modelling token sets that Table 5 compares FSDD with (Sec. 4.3.1). All build on the denoiser of fsdd.py.

    AR-order1, AR-order2   autoregressive over the M tokens in one order, the same for all images      autoregressive_*
    AR-random              the same over the tokens in random order                                    autoregressive_*
    AR-sorted              the same over the tokens in the order of their codes                        autoregressive_*
    SetAR                  autoregressive over the C counts                                            autoregressive_*
    Discrete Diffusion     discrete flow matching of the counts (Gat et al., arXiv 2407.15595)         flow_*
    Continuous Diffusion   flow matching of the counts as real numbers, then quantized                 continuous_*

Shapes and time as in fsdd.py: B images, C codes, M tokens, t from data (0) to noise (1). The losses take a batch with
the fields of train_fsdd.Batch. hidden_log_likelihood() is what Table 5 prints for hidden tokens.
guidance: see fsdd.guidance_weight().  top_p, top_k: see fsdd.truncate().
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from beyond import next_token
from dual_transform import tokens_to_counts
from fsdd import STEPS, Denoiser, draw, greedy_adjust, guidance_weight, guided_probabilities, sample_noise
from tokenizer import Attention


def zero_linear(inputs, outputs):
    """A linear layer of zeros, as the denoiser's last one is at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# Autoregressive: p(x) = product over i of p(x_i | x_0 .. x_{i-1})


class CausalAttention(Attention):
    """Attention of every position to itself and those before it."""

    def forward(self, x):
        return self.attend(*self.qkv(x).chunk(3, dim=2), is_causal=True)


class CausalDenoiser(Denoiser):
    """p(x_i | x_0 .. x_{i-1}) of sequences of a length, of symbols 0..symbols - 1.

    The positions take the place of the denoiser's codes (codebook_size), the symbols that of its counts (num_tokens).
    """

    attention_class = CausalAttention

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
            x = block(x, c)
        return self.head(x, c)


def autoregressive_loss(model, batch):
    """Cross-entropy of every symbol given those before it, mean over positions and sequences.

    batch: x0 (B, length), the sequences, and labels (B,).
    """
    x, no_time = batch.x0, torch.zeros(len(batch.x0), device=batch.x0.device)
    logits = model(x[:, :-1], no_time, batch.labels)  # (B, length, symbols)
    return F.cross_entropy(logits.float().flatten(0, 1), x.flatten())


@torch.no_grad()
def autoregressive_generate(model, labels, guidance=1.0, top_p=1.0, top_k=0, generator=None):
    """Sequences (B, length) int64 for labels (B,), symbol by symbol."""
    length = model.codebook_size
    x = labels.new_zeros(len(labels), 0)
    for i in range(length):
        weight = guidance_weight(guidance, 1 - i / length)
        p = guided_probabilities(model, x, 0.0, labels, weight)[:, -1]  # (B, symbols)
        u = torch.rand(len(x), generator=generator, device=x.device)
        x = torch.cat([x, draw(p, u, top_p, top_k)[:, None]], dim=1)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Discrete flow matching: every count is noise or data, and on the way each jumps once. No state has to sum to M.


def flow_process(x0, x1, t, uniform):
    """X_t: every count is that of X_1 with probability t, else that of X_0.

    x0, x1: (B, C).  t: (B,).  uniform: (B, C) in [0, 1).
    """
    return torch.where(uniform < t[:, None], x1, x0)


def flow_generate(denoiser, labels, prior="multinomial", steps=STEPS, guidance=1.0, top_p=1.0, top_k=0,
                  generator=None):
    """Counts (B, C) int64 for labels (B,), of any sum.

    From t to t - dt each count jumps to a draw of x_0 with probability dt / t.
    """
    B, C, M, device = len(labels), denoiser.codebook_size, denoiser.num_tokens, labels.device
    x = sample_noise(B, C, M, prior, generator, device)
    for step in range(steps):
        u0, u = torch.rand(2, B, C, generator=generator, device=device)
        t = 1 - step / steps
        p = guided_probabilities(denoiser, x, t, labels, guidance_weight(guidance, t))  # (B, C, M + 1)
        jumps = u * (steps - step) < 1  # in the last step all do
        x = torch.where(jumps, draw(p, u0, top_p, top_k), x)
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
    """Squared error of the velocity at X_t = t X_1 + (1 - t) X_0. The noise is made from batch.uniform."""
    normal = torch.special.ndtri(batch.uniform.clamp(1e-7, 1 - 1e-7))  # (B, C), standard Gaussians
    x0, x1, t = standardize(batch.x0, int(batch.x0[0].sum())), continuous_noise(normal), batch.t[:, None]
    return F.mse_loss(velocity(model, t * x1 + (1 - t) * x0, batch.t, batch.labels), x1 - x0)


@torch.no_grad()
def continuous_generate(model, labels, steps=STEPS, guidance=1.0, generator=None):
    """Counts (B, C) int64 for labels (B,), every row sums to M: Euler steps from noise to data, then quantize()."""
    B, C, device = len(labels), model.codebook_size, labels.device
    x = continuous_noise(torch.randn(B, C, generator=generator, device=device))
    null = torch.full_like(labels, model.num_classes)
    for step in range(steps):
        time = 1 - step / steps
        t, weight = torch.full((2 * B,), time, device=device), guidance_weight(guidance, time)
        v, v_null = velocity(model, x.repeat(2, 1), t, torch.cat([labels, null])).chunk(2)
        x = x - (v_null + weight * (v - v_null)) / steps
    return quantize(x, model.num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Hidden tokens (beyond.py): no baseline, but the likelihood that Table 5 compares


@torch.no_grad()
def hidden_log_likelihood(denoiser, tokens, labels, generator=None):
    """A lower bound of log p(set) of a denoiser of hidden tokens, for sets of tokens (B, M), in nats, (B,): an unbiased
    estimate of

        log(number of orders of the set) + mean over orders of the sum of log p(next token | tokens before it).
    """
    B, M = tokens.shape
    null, device = denoiser.codebook_size - 1, tokens.device
    number = torch.randint(1, M + 1, (B, 1), generator=generator, device=device)  # of hidden tokens
    hidden = torch.rand(B, M, generator=generator, device=device).argsort(1).argsort(1) < number  # (B, M)
    x = tokens_to_counts(tokens.masked_fill(hidden, null), null + 1)
    p = denoiser(x, number[:, 0] / M, labels).float().softmax(2)
    log_p = next_token(x, p).log().gather(1, tokens)  # (B, M)
    orders = math.lgamma(M + 1) - (tokens_to_counts(tokens, null) + 1.0).lgamma().sum(1)
    return orders + M * (log_p * hidden).sum(1) / number[:, 0]
