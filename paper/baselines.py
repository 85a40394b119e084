"""The ways of modelling token sets that Table 5 compares FSDD with (Sec. 4.3.1). All share the denoiser of fsdd.py.

    AR-order1, AR-order2   autoregressive over the M tokens in one order, the same for all images      autoregressive_*
    AR-random              the same over the tokens in random order                                    autoregressive_*
    SetAR                  autoregressive over the C counts                                            autoregressive_*
    Discrete Diffusion     discrete flow matching of the counts (Gat et al., arXiv 2407.15595)         flow_*
    Continuous Diffusion   flow matching of the counts as real numbers, then quantized                 continuous_*

Shapes and time as in fsdd.py: B images, C codes, M tokens, t from data (0) to noise (1). guidance: see
fsdd.guidance_weight(). top_p, top_k: see fsdd.draw().
"""
import torch
import torch.nn.functional as F
from torch import nn

from fsdd import Denoiser, draw, greedy_adjust, guidance_weight, guided_probabilities, sample_noise
from tokenizer import Attention


def zeros(layer):
    """A linear layer whose weights are zero, as the denoiser's last one is at the start."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# Autoregressive: p(x) = product over i of p(x_i | x_0 .. x_{i-1})


class CausalAttention(Attention):
    """Attention in which a position sees only itself and those before it."""

    def attend(self, q, k, v, fused):
        if fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        L = q.shape[2]
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, heads, L, L)
        later = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def autoregressive(length, symbols, num_classes, width, layers, heads, gelu="tanh"):
    """A causal denoiser over sequences of the given length of symbols 0..symbols - 1. Symbol number `symbols` starts a
    sequence.

    To the denoiser the positions are its C codes, and the symbols its counts 0..M.
    """
    model = Denoiser(length, symbols, num_classes, width, layers, heads, gelu=gelu)
    model.to_logits = zeros(nn.Linear(width, symbols))  # none for the symbol that starts a sequence
    for block in model.blocks:
        causal = CausalAttention(width, heads)
        causal.load_state_dict(block.attention.state_dict())
        block.attention = causal
    return model


def autoregressive_logits(model, x, labels, symbols):
    """x (B, L) int64, labels (B,) -> logits (B, L, symbols) of every position; those at i depend on x[:, :i] only."""
    start = x.new_full((len(x), 1), symbols)
    no_time = torch.zeros(len(x), device=x.device)
    return model(torch.cat([start, x[:, :-1]], dim=1), no_time, labels)


def autoregressive_loss(model, x, labels, symbols):
    """Cross-entropy of every symbol given those before it, mean over positions and sequences."""
    return F.cross_entropy(autoregressive_logits(model, x, labels, symbols).float().flatten(0, 1), x.flatten())


@torch.no_grad()
def autoregressive_generate(model, labels, guidance=1.0, top_p=1.0, top_k=0, generator=None):
    """Sequences (B, L) int64 for labels (B,), symbol by symbol."""
    length, symbols = model.codebook_size, model.num_tokens
    x = labels.new_full((len(labels), 1), symbols)
    for i in range(length):
        weight = guidance_weight(guidance, 1 - i / length)
        p = guided_probabilities(model, x, 0.0, labels, weight)[:, -1]  # (B, symbols)
        u = torch.rand(len(x), generator=generator, device=x.device)
        x = torch.cat([x, draw(p, u, top_p, top_k)[:, None]], dim=1)
    return x[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Discrete flow matching: every count is noise or data, and on the way each jumps once. No state has to sum to M.


def flow_process(x0, x1, t, uniform):
    """X_t: every count is that of X_1 with probability t, else that of X_0.

    x0, x1: (B, C).  t: (B,).  uniform: (B, C) in [0, 1).
    """
    return torch.where(uniform < t[:, None], x1, x0)


def flow_loss(denoiser, x0, labels, t, x1, uniform):
    """Cross-entropy of the denoiser's logits at X_t against X_0, as in fsdd.fsdd_loss()."""
    logits = denoiser(flow_process(x0, x1, t, uniform), t, labels)  # (B, C, M + 1)
    return F.cross_entropy(logits.float().flatten(0, 1), x0.flatten())


def flow_generate(denoiser, labels, prior="multinomial", steps=25, guidance=1.0, top_p=1.0, top_k=0,
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
# Continuous: counts as real numbers, of which every state sums to M, but none before the end is whole


def continuous(codebook_size, num_tokens, num_classes, width, layers, heads, gelu="tanh"):
    """A denoiser of real numbers: (B, C, 1), t (B,), labels (B,) -> (B, C, 1)."""
    model = Denoiser(codebook_size, num_tokens, num_classes, width, layers, heads, gelu=gelu)
    model.count_embedding = nn.Linear(1, width)
    nn.init.normal_(model.count_embedding.weight, std=0.02)  # as that of counts
    nn.init.zeros_(model.count_embedding.bias)
    model.to_logits = zeros(nn.Linear(width, 1))
    return model


def standardize(counts, num_tokens):
    """Counts (B, C) -> real numbers of sum 0, and of variance 1 where the M tokens are drawn uniformly."""
    mean = num_tokens / counts.shape[1]
    return (counts - mean) / (mean * (1 - 1 / counts.shape[1])) ** 0.5


def quantize(x, num_tokens):
    """The inverse of standardize, x (B, C) of any values: rounded to whole counts in [0, M], then adjusted until they
    sum to M by the steps that add least to the squared distance."""
    mean = num_tokens / x.shape[1]
    counts = (x * (mean * (1 - 1 / x.shape[1])) ** 0.5 + mean).nan_to_num().clamp(0, num_tokens)
    # with so wide a Gaussian, the differences of probability that it compares are those of the squared distance
    return greedy_adjust(counts.round(), lambda k: -1e-6 * (k - counts.double()) ** 2, num_tokens)


def velocity(model, x_t, t, labels):
    """The estimate of X_1 - X_0 at X_t, (B, C), sum 0. x_t (B, C), t (B,), labels (B,)."""
    v = model(x_t[:, :, None], t, labels)[:, :, 0].float()
    return v - v.mean(1, keepdim=True)


def continuous_noise(normal):
    """X_1: independent Gaussians (B, C), moved to the sum 0."""
    return normal - normal.mean(1, keepdim=True)


def continuous_loss(model, x0, labels, t, normal, num_tokens):
    """Squared error of the velocity at X_t = t X_1 + (1 - t) X_0.

    x0: counts (B, C).  normal: (B, C), standard Gaussian.
    """
    x0, x1 = standardize(x0, num_tokens), continuous_noise(normal)
    return F.mse_loss(velocity(model, t[:, None] * x1 + (1 - t[:, None]) * x0, t, labels), x1 - x0)


@torch.no_grad()
def continuous_generate(model, labels, steps=25, guidance=1.0, generator=None):
    """Counts (B, C) int64 for labels (B,), every row sums to M: Euler's steps from noise to data, then quantized."""
    B, C, device = len(labels), model.codebook_size, labels.device
    x = continuous_noise(torch.randn(B, C, generator=generator, device=device))
    null = torch.full_like(labels, model.num_classes)
    for step in range(steps):
        time = 1 - step / steps
        t, weight = torch.full((2 * B,), time, device=device), guidance_weight(guidance, time)
        v, v_null = velocity(model, x.repeat(2, 1), t, torch.cat([labels, null])).chunk(2)
        x = x - (v_null + weight * (v - v_null)) / steps
    return quantize(x, model.num_tokens)
