"""What we found beyond the paper: remedies for FSDD at small budgets.

    1. training times   flip_times()                       uniform in the share of flips that have happened
    2. start            start_from_codebook()              code embeddings that know which codes decode alike
    3. sampler          exchange_step(), exchange_times()  Eq. 8 with a posterior, and an adjustment that does not stall
    4. denoiser         SparseDenoiser, sparse_loss(),     attention to the tokens that are there, not to all C codes,
                        likely_probabilities()             and fewer codes to compute, in training and in generation
    5. noise            hide_tokens(), reveal_step()       noise that hides tokens, and a sampler that reveals them

The digits' recipe uses 2, 4 and 5. The fifth replaces the paper's noise, for which 1 and 3 are. Each section can be
deleted without touching the others. They are used in generation.py (its tables), train_fsdd.py (times, start, loss),
sample.py (--like) and paper/. fsdd.py knows nothing of this file; it takes noise, process, sampler and attention as
arguments. None of the remedies has been tried on ImageNet, so the column imagenet256 of train_fsdd.py does not use any.
"""
import math

import torch
import torch.nn.functional as F

from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import (Denoiser, draw, forward_process, fsdd_loss, greedy_adjust, guided_probabilities, look_up, take_steps,
                  truncate, uniform_times)
from tokenizer import Attention

# ---------------------------------------------------------------------------------------------------------------------
# 1. Training times
#
# The paper draws t uniformly from (0, 1]. Where X_0 and X_1 differ by 1, Eq. 5-6 give, up to exp(-8),
#
#     P(X_t = X_1) = sigmoid(8 (2 t - 1)),
#
# which is below 2 % for t < 0.25 and above 98 % for t > 0.75. So in half of its training the denoiser sees inputs in
# which nothing is left to predict, or nothing is known yet. We draw the share of flips v uniformly instead and solve
# for the time:  v = sigmoid(8 (2 t - 1)), that is  t = 1/2 + logit(v) / 16.
# On the digits, this alone lowers digits FID from 140.3 to 83.6 (beyond.md).


def flip_times(uniform):
    """Training times uniform in the share of flips that have happened.

    uniform: (B,) in [0, 1).  Returns t (B,) in [0.07, 0.93].
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
# On the digits, this lowers digits FID further, from 83.6 to 60.2 (beyond.md).


@torch.no_grad()
def start_from_codebook(denoiser, codes):
    """Set the code embedding of a denoiser to features of the tokenizer's codes (C, code_dim) of length 1."""
    w = 2 * torch.randn(codes.shape[1], denoiser.code_embedding.shape[2])  # (code_dim, width)
    denoiser.code_embedding[0, :len(codes)] = 0.3 * torch.cos(codes.cpu() @ w + 2 * math.pi * torch.rand(w.shape[1]))


# ---------------------------------------------------------------------------------------------------------------------
# 3. The exchange sampler
#
# The paper's step (Eq. 9-10) is not the posterior of Eq. 5-6. But even with one (posterior() below), Algorithm 1 stalls
# when steps are small: if one count goes up and none down, the most probable repair undoes that very change. Of the
# changes up and down only min(up, down) survive a step, and everything is left to the last step. Our step draws
#
#     y ~ p(X_s | X_t) = sum over a of q(X_s | X_t, x_0 = a) p(x_0 = a | X_t)     for every code by itself (Eq. 8)
#
# and then, if y sums to M + delta, undoes |delta| / 2 of the surplus changes and offsets the other half by opposite
# changes of other codes. In the limit of small steps this exchanges tokens as often as independent codes would change.
# Its sampling times are denser where counts change, and so is the change of its guidance weight.
#
# With the exact p(x_0 | X_t) of a toy problem (C = 6, M = 4), samples in 100 steps differ from the data by a total
# variation of 0.168 with the paper's step, 0.218 with the posterior and Algorithm 1, and 0.049 with exchange. Samples
# of the data itself differ by 0.017 (pytest --slow -rP tests/test_beyond.py -k oracle).
# On the digits, digits FID is 41.2 in 12 steps, and 49.0 in 50 steps of the paper's sampler (beyond.md).


def exchange_times(steps):
    """Sampling times t_0 = 1 > ... > t_steps = 0: the mean of evenly spaced times and of times evenly spaced in the
    share of flips. The former spend half of the steps where little changes; the latter leave too few for counts that
    change by 2 or more."""
    times = [u if u in (0, 1) else (u + 0.5 + math.log(u / (1 - u)) / 16) / 2 for u in uniform_times(steps)]
    return [min(1.0, max(0.0, t)) for t in times]  # thousands of steps would begin before 1 and end below 0


def guidance_ramp(first, last):
    """A guidance weight for fsdd.refine() that goes from first (at noise) to last (at data) in proportion to the flips
    that have happened. A small weight while little is decided keeps samples diverse."""
    def weight(t):
        remaining = 1 / (1 + math.exp(-8 * (2 * t - 1)))
        return remaining * first + (1 - remaining) * last

    return weight


def exchange_step(x, p, t, s, generator=None, prior="multinomial", top_p=1.0, top_k=0):
    """X_t -> X_s by Eq. 8 and exchange().

    x: X_t (B, C).  p: p(x_0 | X_t) (B, C, M + 1).  prior: of X_1.  top_p, top_k: applied to p, see fsdd.truncate().
    Returns X_s (B, C), every row sums to M.
    """
    C, M = p.shape[1], p.shape[2] - 1
    b, p_b = noise_of_a_code(C, M, prior)
    K = int(max((p.amax((0, 1)) > 1e-5).nonzero().max(), b.max(), x.max()))  # the largest count that matters
    p, order = truncate(p[:, :, :K + 1], top_p, top_k)
    if order is not None:
        p = torch.zeros_like(p).scatter(2, order, p)
    p = p / p.sum(2, keepdim=True)  # (B, C, K + 1)
    F_t, F_s = distribution_function(t, b, K), distribution_function(s, b, K)  # each (K + 1, N, K + 2)
    q = torch.empty_like(p)  # p(X_s | X_t), (B, C, K + 1)
    for k in x.unique().tolist():  # a few small counts: nearly all are 0 or 1
        table = posterior(k, F_t, F_s, p_b).to(x.device)
        q[x == k] = (p[x == k].double() @ table).float()  # in float64, which autocast does not change
    return exchange(x, q, generator)


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
    mean, std = t * b + (1 - t) * a, (b - a).abs() / 4  # Eq. 6, (K + 1, N)
    if t in (0, 1):
        std = torch.zeros_like(std)  # the two ends, as in forward_process()
    p = (-((k - mean[..., None]) / std.clamp(min=1e-6)[..., None]) ** 2 / 2).softmax(2)
    return F.pad(p.cumsum(2), (1, 0)).clamp(max=1)


def noise_of_a_code(C, M, prior):
    """The distribution of one code's count in X_1: its values b (N,) and their probabilities (N,). A new prior needs an
    entry here if the exchange sampler is to take it, one in generation.PROCESS, and its name in train_fsdd.py."""
    if prior == "distinct":
        return torch.tensor([0, 1]), torch.tensor([1 - M / C, M / C], dtype=torch.float64)
    assert prior == "multinomial", prior
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
    y = draw(q, u)
    delta = y.sum(1, keepdim=True) - M  # (B, 1)
    stepped = y - delta.sign()  # as in greedy_adjust()
    log_q = look_up(q, stepped.clamp(0, K)).log().masked_fill((stepped < 0) | (stepped > K), -math.inf)
    # (B, C), with Gumbel noise: the best are a draw without replacement, in proportion to q
    score = log_q - (-v.log()).log()
    surplus = (y - x) * delta.sign() > 0  # codes that changed in the direction of which there is too much
    undone = (delta.abs() + coin) // 2  # (B, 1), half of them; if odd, a coin decides
    y = take_steps(y, score.masked_fill(~surplus, -math.inf), undone, -delta.sign())
    y = take_steps(y, score.masked_fill(surplus, -math.inf), delta.abs() - undone, -delta.sign())
    return greedy_adjust(y, q.log(), M)  # in case too few codes could step


# ---------------------------------------------------------------------------------------------------------------------
# 4. The sparse denoiser
#
# In the paper's DiT every code attends to all C codes, although at most M counts are not zero. Here every code attends
# to the M tokens of X_t (k times to a code that occurs k times):
#
#     attention(q_j) = softmax over the tokens m = 1..M of (q_j k_m / sqrt(d)) applied to v_m,      j = 1..C
#
# The weights keep their names and shapes. As no code depends on an absent one, the loss can be computed from few codes:
# all those that X_t or X_0 contains, and a random sample of the others, weighted to represent the rest. The cost of a
# training step then grows with M, not with C. Generation computes all codes while little is known, and from time
# LIKELY_FROM on only those that may still be in X_0.
# On the digits, a training step takes a fifth of the time, at a loss within the spread of seeds; a step of S at the
# size of ImageNet takes 46 GFLOPs an image in place of 1451 (python -m paper.cost).


LIKELY_FROM = 0.8  # from this time on, generation leaves out codes ...
LIKELY = 0.003     # ... whose probability to be in X_0 is at most this


class SparseAttention(Attention):
    """Attention to some positions only: x (B, L, width), positions (B, N) int64 in 0..L - 1 -> (B, L, width)."""

    def forward(self, x, positions):
        width = x.shape[2]
        attended = x.gather(1, positions[:, :, None].expand(-1, -1, width))  # (B, N, width)
        weight, bias = (parameter.split([width, 2 * width]) for parameter in (self.qkv.weight, self.qkv.bias))
        k, v = F.linear(attended, weight[1], bias[1]).chunk(2, dim=2)
        return self.attend(F.linear(x, weight[0], bias[0]), k, v)


class SparseDenoiser(Denoiser):
    """p_theta(X_0 | X_t) in which every code attends to the M tokens of X_t. Arguments and state dict as Denoiser."""

    attention_class = SparseAttention

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
            x = block(x, c, positions)
        return self.head(x, c)


def sparse_loss(denoiser, batch, num_codes, process=forward_process):
    """fsdd.fsdd_loss() of a SparseDenoiser, estimated from num_codes codes of each vector.

    batch: as for fsdd_loss(), and order (B, C) uniform in [0, 1), which decides the random sample of codes.
    num_codes: L, at least 2 M, as X_t and X_0 contain up to M codes each. With C or more, this is fsdd_loss().
    """
    x0 = batch.x0
    if num_codes >= x0.shape[1]:
        return fsdd_loss(denoiser, batch, process)
    if num_codes < 2 * x0[0].sum():
        raise ValueError(f"num_codes must be at least 2 M = {2 * int(x0[0].sum())}, got {num_codes}")
    x_t = process(x0, batch.x1, batch.t, batch.uniform)
    contained = x_t + x0 > 0  # (B, C)
    codes = (batch.order + contained).topk(num_codes, dim=1).indices  # (B, L): the contained first, then by order
    number = contained.sum(1, keepdim=True)  # (B, 1)
    represented = (x0.shape[1] - number) / (num_codes - number).clamp(min=1)  # how many codes each other stands for
    weight = torch.where(contained.gather(1, codes), 1, represented)
    logits = denoiser(x_t, batch.t, batch.labels, codes)  # (B, L, M + 1)
    loss = F.cross_entropy(logits.float().flatten(0, 1), x0.gather(1, codes).flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / x0.numel()


def likely_probabilities(denoiser, x_t, t, labels, weight, previous=None):
    """fsdd.guided_probabilities() of a SparseDenoiser, from time LIKELY_FROM on only of the codes that may still be in
    X_0. The others are taken to be absent.

    previous: the result of the step before (B, C, M + 1), which tells these codes; None: compute all.
    Every row computes as many codes as the row with the most needs, so another batch may give other samples.
    """
    if previous is None or t > LIKELY_FROM or not isinstance(denoiser, SparseDenoiser):
        return guided_probabilities(denoiser, x_t, t, labels, weight)
    chance = 1 - previous[:, :, 0] + (x_t > 0)  # of being in X_0, (B, C); codes that X_t contains come first
    codes = chance.topk(int((chance > LIKELY).sum(1).max())).indices  # (B, L)
    p = guided_probabilities(denoiser, x_t, t, labels, weight, None, codes)  # (B, L, M + 1)
    absent = F.one_hot(torch.zeros_like(x_t), p.shape[2]).to(p.dtype)  # (B, C, M + 1)
    return absent.scatter(1, codes[:, :, None].expand_as(p), p)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Hidden tokens
#
# In the paper's X_t some tokens are real and some are random, and the denoiser has to find out which. Here, noise hides
# tokens instead. The counts get one more code, the null code, which holds the hidden tokens:
#
#     X_1 = M on the null code,     X_t[j] ~ Binomial(X_0[j], 1 - t),     X_t[null] = M - the sum of the others.
#
# Every state sums to M, and no adjusting is needed. Given X_t, a hidden token is of code j with the probability
# E[x_0[j] - X_t[j] | X_t] / (number of hidden tokens). So M steps that reveal one token each draw from the denoiser's
# distribution exactly. To reveal several at once, we draw all of x_0, each count from p(x_0[j] | X_t), change the sum
# to M by steps drawn in proportion to p(x_0[j] +- 1) / p(x_0[j]), and reveal a random part of the new tokens.
#
# With the exact p(x_0 | X_t) of a toy problem (C = 6, M = 4), samples in 2 and 4 steps differ from the data by a total
# variation of 0.182 and 0.011, those of exchange by 0.348 and 0.101, and samples of the data itself by 0.017
# (pytest --slow -rP tests/test_beyond.py -k oracle).
# On the digits, this lowers digits FID from 60.2 to 47.9, at equal steps of training and of sampling (beyond.md).


def all_hidden(batch, codebook_size, num_tokens, prior="hidden", generator=None, device="cpu"):
    """X_1: all tokens are on the null code, the last one. Arguments as for fsdd.sample_noise(), but codebook_size is
    C + 1. Returns counts (batch, C + 1)."""
    if num_tokens >= codebook_size:  # hide_tokens() needs M of C + 1 random numbers
        raise ValueError("the prior 'hidden' needs num_tokens <= codebook_size, "
                         f"got {num_tokens} > {codebook_size - 1}")
    x = torch.zeros(batch, codebook_size, dtype=torch.int64, device=device)
    x[:, -1] = num_tokens
    return x


def hide_tokens(x0, x1, t, uniform=None):
    """X_t: every token of X_0 is hidden with probability t. Arguments as for fsdd.forward_process(); x1 is not used."""
    tokens, null = counts_to_tokens(x0), x0.shape[1] - 1  # (B, M)
    uniform = torch.rand(x0.shape, device=x0.device) if uniform is None else uniform
    hidden = uniform[:, :tokens.shape[1]] < t[:, None]
    return tokens_to_counts(tokens.masked_fill(hidden, null), null + 1)


def reveal_step(x, p, t, s, generator=None, prior="hidden", top_p=1.0, top_k=0):
    """X_t -> X_s: reveal tokens until M s are hidden.

    x: X_t (B, C + 1), every row with the same number of hidden tokens.  p: p(x_0 | X_t) (B, C + 1, M + 1).
    top_p, top_k: applied to p where several tokens are revealed, see fsdd.truncate().
    Returns X_s (B, C + 1), every row sums to M.
    """
    C, M, device = p.shape[1] - 1, p.shape[2] - 1, x.device
    number = int(x[0, -1]) - round(M * s)  # of tokens to reveal
    if number <= 0:
        return x
    if number == 1:
        tokens = torch.multinomial(next_token(x, p), 1, generator=generator)  # (B, 1)
    else:
        p = possible(x, p)
        u = torch.rand(p.shape[:2], generator=generator, device=device)
        x0 = change_sum(draw(p, u, top_p, top_k), p.log(), M, generator)
        tokens = counts_to_tokens(x0 - x[:, :-1])  # all hidden ones, (B, M t)
        tokens = tokens.gather(1, torch.rand(tokens.shape, generator=generator, device=device).topk(number).indices)
    visible = x[:, :-1] + tokens_to_counts(tokens, C)
    return torch.cat([visible, M - visible.sum(1, keepdim=True)], dim=1)


def possible(x, p):
    """p(x_0 | X_t) (B, C, M + 1) without the null code and without counts below X_t, as visible tokens stay."""
    count = torch.arange(p.shape[2], device=x.device)
    p = p[:, :-1].clamp(min=1e-30) * (count >= x[:, :-1, None])
    return p / p.sum(2, keepdim=True)


def next_token(x, p):
    """The distribution of a hidden token's code, (B, C): E[x_0 - X_t | X_t], normalized. x, p: as for reveal_step()."""
    expected = (possible(x, p) * torch.arange(p.shape[2], device=x.device)).sum(2)  # in float32 under autocast too
    new = (expected - x[:, :-1]).clamp(min=1e-30)
    return new / new.sum(1, keepdim=True)


def change_sum(x, log_p, num_tokens, generator=None):
    """Steps by one until every row sums to M, drawn without replacement in proportion to p(x +- 1) / p(x).

    x: (B, C) int64.  log_p: (B, C, M + 1), -inf where a count is not allowed.  Returns (B, C).
    """
    while (delta := x.sum(1, keepdim=True) - num_tokens).any():  # (B, 1)
        stepped = x - delta.sign()
        odds = look_up(log_p, stepped.clamp(0, num_tokens)) - look_up(log_p, x)
        odds = odds.masked_fill((stepped < 0) | (stepped > num_tokens), -math.inf)
        gumbel = -(-torch.rand(x.shape, generator=generator, device=x.device).log()).log()
        x = take_steps(x, odds + gumbel, delta.abs(), -delta.sign())
    return x
