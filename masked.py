"""Another noise for sets of tokens: masking. A sibling of fsdd.py, with the same three names.

    sample_noise()     X_1: all M tokens are masked
    forward_process()  X_t: every token of X_0 is masked with probability t
    refine()           generation: tokens are unmasked step by step

In the paper's X_t some tokens are real and some are random, and the denoiser has to find out which. Here noise masks
tokens. The counts get one more code, the mask code, whose count is the number of masked tokens:

    X_1 = M on the mask code,     X_t[j] ~ Binomial(X_0[j], 1 - t),     X_t[mask] = M - the sum of the others.

This is the absorbing state of D3PM (Austin et al., arXiv 2107.03006), which MaskGIT (arXiv 2202.04200) and MDLM (Sahoo
et al., arXiv 2406.07524) use for sequences. Unmasking one token at a time is any-order autoregression (Uria et al.,
arXiv 1310.1757; Hoogeboom et al., arXiv 2110.02037). What is different here is the multiset. A sequence has a
distribution over codes at every masked position; a set has no positions. The denoiser predicts the count of every code
instead, with the loss of fsdd.py. Given X_t, a masked token is of code j with the probability

    E[x_0[j] - X_t[j] | X_t] / (number of masked tokens),

so M steps that unmask one token each draw from the denoiser's distribution exactly. When a step unmasks several, every
count is drawn from p(x_0[j] | X_t) independently, and Algorithm 1 makes them sum to M. The forward process does not
need it.

With the exact p(x_0 | X_t) of a toy problem (C = 6, M = 4), samples in 2 and 4 steps differ from the data by a total
variation of 0.233 and 0.011, those of beyond.refine_by_exchange() at its own times by 0.348 and 0.056, and samples of
the data itself by 0.017 (pytest --slow -rP tests/test_masked.py -k oracle).

train_fsdd.py --noise masked trains such a denoiser. Results are in the README, and more of them in beyond.md. In the
shapes below, C is the number of codes without the mask code.
"""
from itertools import pairwise

import torch

from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import greedy_adjust, guidance_weight, guided_probabilities, sample_categorical, sampling_times


def sample_noise(batch, codebook_size, num_tokens, prior="masked", generator=None, device="cpu"):
    """X_1: all tokens are on the mask code, the last one. Arguments as for fsdd.sample_noise(), but codebook_size is
    C + 1, and nothing is random. Returns counts (batch, C + 1)."""
    x = torch.zeros(batch, codebook_size, dtype=torch.int64, device=device)
    x[:, -1] = num_tokens
    return x


def forward_process(x0, x1, t, uniform=None):
    """X_t: every token of X_0 is masked with probability t.

    x0, x1: (B, C + 1) int64, every row sums to M; no token of x0 is masked, all of x1 are.
    t: (B,) in [0, 1], 0 = data, 1 = noise.
    uniform: (B, C + 1) in [0, 1), the random number that decides each count; drawn here by default.
    Returns x_t (B, C + 1) int64, every row sums to M.
    """
    uniform = torch.rand(x0.shape, device=x0.device) if uniform is None else uniform
    k = torch.arange(int(x0.max()) + 1, device=x0.device)
    visible = torch.distributions.Binomial(k[:, None], (1 - t)[:, None, None], validate_args=False)
    p = visible.log_prob(k).exp()  # (B, K + 1, K + 1): of n = 0..K tokens, k stay visible
    x = sample_categorical(p[torch.arange(len(t))[:, None], x0], uniform)  # (B, C + 1)
    x[:, -1] = x1[:, -1] - x.sum(1)
    return x


@torch.no_grad()
def refine(denoiser, labels, prior="masked", steps=12, times="even", guidance=(2.5,), top_p=1.0, top_k=0,
           generator=None, start=None):
    """Generate count vectors by unmasking: yields X_1, then X_t after each step, finally X_0. Arguments as for
    fsdd.refine(). Every state is (B, C + 1) and every row sums to M; at time t, M t tokens are masked (rounded). In a
    start, all rows must have the same number of masked tokens.

    top_p, top_k: applied to p(x_0 | X_t) where several tokens are unmasked at once.
    """
    M = denoiser.num_tokens
    x, t_start = start or (sample_noise(len(labels), denoiser.codebook_size, M, device=labels.device), 1.0)
    yield x
    for t, s in pairwise([t_start] + [t for t in sampling_times(steps, times) if t < t_start]):
        number = int(x[0, -1]) - round(M * s)  # of tokens to unmask, the same in every row
        if number > 0:
            p = guided_probabilities(denoiser, x, t, labels, guidance_weight(guidance, t))  # (B, C + 1, M + 1)
            x = unmask(x, p, number, top_p, top_k, generator)
        yield x


def unmask(x, p, number, top_p=1.0, top_k=0, generator=None):
    """Unmask a number of tokens in every row. x: X_t (B, C + 1).  p: p(x_0 | X_t) (B, C + 1, M + 1).  Returns X_s."""
    visible, k = x[:, :-1], torch.arange(p.shape[2], device=x.device)  # (B, C), (M + 1,)
    p = p[:, :-1].clamp(min=1e-30) * (k >= visible[:, :, None])  # without the mask code; visible tokens stay
    p = p / p.sum(2, keepdim=True)  # (B, C, M + 1)
    if number == 1:  # the distribution of a masked token's code: E[x_0 - X_t | X_t], not normalized
        expected = (p * k).sum(2)  # no matrix product: autocast would compute that in bfloat16
        tokens = torch.multinomial((expected - visible).clamp(min=1e-30), 1, generator=generator)  # (B, 1)
    else:
        def log_p(new):  # of each count of masked tokens
            return p.gather(2, (visible + new)[:, :, None])[:, :, 0].log()

        uniform = torch.rand(visible.shape, generator=generator, device=x.device)
        new = sample_categorical(p, uniform, top_p, top_k) - visible
        tokens = counts_to_tokens(greedy_adjust(new, log_p, int(x[0, -1])))  # all masked tokens, (B, M t)
        chosen = torch.rand(tokens.shape, generator=generator, device=x.device).topk(number).indices
        tokens = tokens.gather(1, chosen)  # (B, number)
    x = x + tokens_to_counts(tokens, x.shape[1])
    x[:, -1] -= number
    return x
