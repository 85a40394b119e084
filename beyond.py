"""Changes of ours that keep the paper's noise. The digits train with the first three.

    1. training times   flip_times()                   uniform in the share of counts that have changed
    2. start            start_from_codebook()          code embeddings that know which codes decode alike
    3. denoiser         SparseDenoiser, sparse_loss()  attention to the tokens that are there, not to all C codes
    4. sampler          refine_by_exchange()           Eq. 8 with a posterior, and an adjustment that does not stall

They change the denoiser, its training and its sampling, not what FSDD is: noise and forward process are those of
fsdd.py, and sparse_loss() estimates its loss. fsdd.py knows nothing of this file. Each section can be deleted without
touching the others. They are used in train_fsdd.py (1 to 3), sample.py (1 for --like, 3, 4), play.py (1) and paper/.
None of them has been tried on ImageNet, so the column imagenet256 of train_fsdd.py does not use any.
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from fsdd import (Denoiser, fsdd_loss, greedy_adjust, guidance_weight, guided_probabilities, sample_categorical,
                  sample_noise, sampling_times, take_steps, truncate)

# ---------------------------------------------------------------------------------------------------------------------
# 1. Training times
#
# The paper draws t uniformly from (0, 1]. Where X_0 and X_1 differ by 1, Eq. 5-6 give, up to exp(-8),
#
#     P(X_t = X_1) = sigmoid(8 (2 t - 1)),
#
# which is below 2 % for t < 0.25 and above 98 % for t > 0.75. So in half of its training the denoiser sees inputs in
# which nothing is left to predict, or nothing is known yet. We draw the share v of such counts that have changed
# uniformly instead and solve for the time:  v = sigmoid(8 (2 t - 1)), that is  t = 1/2 + logit(v) / 16.
# On the digits, this lowers digits FID from 65.6 to 36.1, or with the start of section 2 from 50.7 to 30.2 (three
# seeds, beyond.md).


def flip_times(uniform):
    """Training times uniform in the share of flips that have happened.

    uniform: (B,) in [0, 1).  Returns t (B,) in [0.068, 0.932].
    """
    return 0.5 + torch.logit(0.001 + 0.998 * uniform) / 16


# ---------------------------------------------------------------------------------------------------------------------
# 2. Start at the codebook
#
# In the authors' release the embedding of the codes starts at zero, so the denoiser has to learn from co-occurrence
# which codes are alike. The tokenizer already knows this: codes that are close decode alike. We start the embedding
# from random Fourier features of the codes,
#
#     embedding(e) = 0.3 cos(e W + b),   W ~ N(0, 2^2),  b ~ U(0, 2 pi),
#
# whose inner products are about proportional to exp(-2 |e - e'|^2).
# On the digits, this lowers digits FID from 65.6 to 50.7, or with the times of section 1 from 36.1 to 30.2 (three
# seeds, beyond.md).


@torch.no_grad()
def start_from_codebook(denoiser, codes):
    """Set the code embedding of a denoiser to features of the tokenizer's codes (C, code_dim) of length 1."""
    w = 2 * torch.randn(codes.shape[1], denoiser.code_embedding.shape[2])  # (code_dim, width)
    denoiser.code_embedding[0, :len(codes)] = 0.3 * torch.cos(codes.cpu() @ w + 2 * math.pi * torch.rand(w.shape[1]))


# ---------------------------------------------------------------------------------------------------------------------
# 3. The sparse denoiser
#
# In the paper's DiT every code attends to all C codes, although at most M counts are not zero. Here every code attends
# to the M tokens of X_t (k times to a code that occurs k times):
#
#     attention(q_j) = softmax over the tokens m = 1..M of (q_j k_m / sqrt(d)) applied to v_m,      j = 1..C
#
# The weights keep their names and shapes. As no code depends on an absent one, the loss can be computed from few codes:
# all those that X_t or X_0 contains, and a random sample of the others, weighted to represent the rest. The cost of a
# training step then grows with M, not with C.
# On the digits, a training step takes a quarter of the time; a step of S at the size of ImageNet takes 46 GFLOPs an
# image in place of 1451 (python -m paper.cost).


class SparseDenoiser(Denoiser):
    """p_theta(X_0 | X_t) in which every code attends to the M tokens of X_t. Arguments and state dict as Denoiser."""

    def forward(self, x_t, t, labels, codes=None):
        """x_t (B, C) int64, every row sums to M, t (B,) in [0, 1], labels (B,) int64 -> logits (B, C, M + 1).

        codes (B, L) int64: compute the logits of these codes only, (B, L, M + 1). They must include all codes that
        x_t contains.
        """
        c = self.condition(t, labels)
        # The set, (B, M), as counts_to_tokens(x_t): token m is the first code whose cumulative count exceeds m.
        m = torch.arange(self.num_tokens, device=x_t.device).expand(len(x_t), -1).contiguous()
        tokens = torch.searchsorted(x_t.cumsum(1), m, right=True)
        counts, embedding, positions = x_t, self.code_embedding, tokens
        if codes is not None:  # L positions, one for each of the codes
            # F.embedding(), as the gradient of an index is added up in any order by several threads
            embedding = F.embedding(codes, self.code_embedding[0])  # (B, L, width)
            counts = x_t.gather(1, codes)  # (B, L)
            position = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
            positions = torch.zeros_like(x_t).scatter(1, codes, position).gather(1, tokens)  # (B, M)
        x = (self.count_embedding(counts) + embedding).to(c.dtype)  # (B, C or L, width)
        for block in self.blocks:
            x = sparse_block(block, x, c, positions)
        return self.head(x, c)


def sparse_block(block, x, c, positions):
    """fsdd.DiTBlock.forward() with attention to some positions only. x: (B, L, width), c: (B, width), positions: (B, N)
    int64 in 0..L - 1, those that are attended to. Returns (B, L, width)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)[:, None].chunk(6, dim=2)  # each (B, 1, width)
    attention, width = block.attention, x.shape[2]
    weight, bias = (parameter.split([width, 2 * width]) for parameter in attention.qkv.parameters())  # q; k and v
    normed = block.norm1(x) * (1 + scale1) + shift1
    attended = normed.gather(1, positions[:, :, None].expand(-1, -1, width))  # (B, N, width)
    k, v = F.linear(attended, weight[1], bias[1]).chunk(2, dim=2)
    x = x + gate1 * attention.attend(F.linear(normed, weight[0], bias[0]), k, v)
    return x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)


def sparse_loss(denoiser, batch, num_codes):
    """fsdd.fsdd_loss() of a SparseDenoiser, estimated from num_codes codes of each vector.

    batch: as for fsdd_loss(), and u_codes (B, C) uniform in [0, 1), which decides the random sample of codes.
    num_codes: L, at least 2 M, as X_t and X_0 contain up to M codes each. With C or more, this is fsdd_loss(). It is
    unbiased for vectors that contain fewer than L codes; with L of them, no other code is left to be sampled.
    """
    x0, x_t = batch.x0, batch.x_t
    if num_codes >= x0.shape[1]:
        return fsdd_loss(denoiser, batch)
    contained = x_t + x0 > 0  # (B, C)
    codes = (batch.u_codes + contained).topk(num_codes, dim=1).indices  # (B, L): the contained first, then by u_codes
    number = contained.sum(1, keepdim=True)  # (B, 1)
    represented = (x0.shape[1] - number) / (num_codes - number).clamp(min=1)  # how many codes each other stands for
    weight = torch.where(contained.gather(1, codes), 1, represented)
    logits = denoiser(x_t, batch.t, batch.labels, codes)  # (B, L, M + 1)
    loss = F.cross_entropy(logits.float().flatten(0, 1), x0.gather(1, codes).flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / x0.numel()


# ---------------------------------------------------------------------------------------------------------------------
# 4. The exchange sampler
#
# The paper's step (Eq. 9-10) is not the posterior of Eq. 5-6. But even with one (posterior() below), Algorithm 1 stalls
# when steps are small: if one count goes up and none down, the most probable repair undoes that very change. Of the
# changes up and down only min(up, down) survive a step, and everything is left to the last step. Our step draws
#
#     y ~ p(X_s | X_t) = sum over a of q(X_s | X_t, x_0 = a) p(x_0 = a | X_t)     for every code by itself (Eq. 8)
#
# and then, if y sums to M + delta, undoes |delta| / 2 of the surplus changes and offsets the other half by opposite
# changes of other codes. In the limit of small steps this exchanges tokens as often as independent codes would change.
#
# With the exact p(x_0 | X_t) of a toy problem (C = 6, M = 4), samples in 100 steps differ from the data by a total
# variation of 0.168 with the paper's step, 0.218 with the posterior and Algorithm 1, and 0.043 with exchange. Samples
# of the data itself differ by 0.017 (pytest --slow -rP tests/test_beyond.py -k oracle).


@torch.no_grad()
def refine_by_exchange(denoiser, labels, prior="multinomial", steps=12, times="middle", guidance=(1.0, 6.0, 12.0),
                       top_p=1.0, top_k=0, generator=None, start=None):
    """Generate count vectors by Eq. 8 and exchange(): yields X_1, then X_t after each step, finally X_0. Arguments as
    for fsdd.refine(). Every row of every state sums to M.

    top_p, top_k: applied to p(x_0 | X_t), see fsdd.truncate().
    """
    C, M = denoiser.codebook_size, denoiser.num_tokens
    x, t_start = start or (sample_noise(len(labels), C, M, prior, generator, labels.device), 1.0)
    yield x
    for t, s in pairwise([t_start] + [t for t in sampling_times(steps, times) if t < t_start]):
        p = guided_probabilities(denoiser, x, t, labels, guidance_weight(guidance, t))  # p(x_0 | X_t), (B, C, M + 1)
        x = exchange(x, next_probabilities(x, p, t, s, prior, top_p, top_k), generator)
        yield x


def next_probabilities(x, p, t, s, prior="multinomial", top_p=1.0, top_k=0):
    """p(X_s | X_t) of every code by itself, Eq. 8 (B, C, K + 1): the counts above K have no weight.

    x: X_t (B, C).  p: p(x_0 | X_t) (B, C, M + 1).  prior: of X_1.  top_p, top_k: applied to p.
    """
    C, M = p.shape[1], p.shape[2] - 1
    b, p_b = noise_of_a_code(C, M, prior)
    K = int(max((p.amax((0, 1)) > 1e-5).nonzero().max(), b.max(), x.max()))  # the largest count that matters
    p, order = truncate(p[:, :, :K + 1], top_p, top_k)
    p = p.new_zeros(*p.shape[:2], K + 1).scatter(2, order, p)
    p = p / p.sum(2, keepdim=True)  # (B, C, K + 1)
    F_t, F_s = distribution_function(t, b, K), distribution_function(s, b, K)  # each (K + 1, N, K + 2)
    q = torch.empty_like(p)
    for k in x.unique().tolist():  # a few small counts: nearly all are 0 or 1
        table = posterior(k, F_t, F_s, p_b).to(x.device)
        q[x == k] = (p[x == k].double() @ table).float()  # in float64, which autocast does not change
    return q


def posterior(k, F_t, F_s, p_b):
    """q(X_s = j | X_t = k, x_0 = a) of one code: a table (a, j), (K + 1, K + 1), each row sums to 1.

    Eq. 5-6 fix how a count is distributed at each time, not how it moves from one time to the next. We let it move as
    little as they allow: a quantile u is drawn once, and X_t = F_t^-1(u) at all times. Then X_t = k means that u lies
    in (F_t(k - 1), F_t(k)], and the part of this interval inside (F_s(j - 1), F_s(j)] is the probability of X_s = j.
    The noise end b is unknown by then and is summed over.

    F_t, F_s: see distribution_function().  p_b: (N,), the probability of every b.
    """
    below_t, upto_t = F_t[:, :, k, None], F_t[:, :, k + 1, None]  # (K + 1, N, 1)
    overlap = (F_s[:, :, 1:].minimum(upto_t) - F_s[:, :, :-1].maximum(below_t)).clamp(min=0)  # (K + 1, N, K + 1)
    # Where a cannot have led to k (the denoiser may be wrong), only the second term remains: X_s given a.
    q = torch.einsum("n,anj->aj", p_b, overlap + 1e-30 * F_s.diff())
    return q / q.sum(1, keepdim=True)


def distribution_function(t, b, largest):
    """F_t(j | a, b) = P(X_t <= j) of Eq. 5-6 before adjusting, (K + 1, N, K + 2): for data ends a = 0..K, noise ends
    b and j = -1..K.

    t: a number in [0, 1].  b: (N,).  largest: K.
    """
    k = torch.arange(largest + 1, dtype=torch.float64)  # (K + 1,)
    a, b = k[:, None], b[None].double()
    mean = t * b + (1 - t) * a  # Eq. 6, (K + 1, N)
    std = (b - a).abs() / 4 * (0 < t < 1)  # 0 at the two ends, as in forward_process()
    p = (-((k - mean[..., None]) / std.clamp(min=1e-6)[..., None]) ** 2 / 2).softmax(2)
    return F.pad(p.cumsum(2), (1, 0)).clamp(max=1)


def noise_of_a_code(C, M, prior):
    """The distribution of one code's count in X_1: its values b (N,) and their probabilities (N,)."""
    if prior == "distinct":
        return torch.tensor([0, 1]), torch.tensor([1 - M / C, M / C], dtype=torch.float64)
    b = torch.arange(M + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(M, torch.tensor(1 / C, dtype=torch.float64), validate_args=False)
    p = binomial.log_prob(b).exp()
    return b[p > 1e-12].long(), p[p > 1e-12]  # for M = 128 and C = 4096 these are 0 to 6


def exchange(x, q, generator=None):
    """Draw X_s from X_t so that every row keeps its sum M: as many tokens are added as are removed.

    x: X_t (B, C).  q: p(X_s | X_t) of every code by itself (B, C, K + 1).  Returns (B, C).
    """
    M, K = int(x[0].sum()), q.shape[2] - 1
    u, v = torch.rand(2, *x.shape, generator=generator, device=x.device)
    coin = torch.rand(len(x), 1, generator=generator, device=x.device) < 0.5

    def log_q(k):
        return q.gather(2, k.clamp(0, K)[:, :, None])[:, :, 0].log().masked_fill((k < 0) | (k > K), -math.inf)

    y = sample_categorical(q, u)
    delta = y.sum(1, keepdim=True) - M  # (B, 1)
    step = -delta.sign()
    # (B, C), with Gumbel noise: the best are a draw without replacement, in proportion to q
    score = log_q(y + step) - (-v.log()).log()
    surplus = (y - x) * step < 0  # codes that changed in the direction of which there is too much
    undone = (delta.abs() + coin) // 2  # (B, 1), half of them; if odd, a coin decides
    y = take_steps(y, score.masked_fill(~surplus, -math.inf), undone, step)
    y = take_steps(y, score.masked_fill(surplus, -math.inf), delta.abs() - undone, step)
    return greedy_adjust(y, log_q, M)  # in case too few codes could step
