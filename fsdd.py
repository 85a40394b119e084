"""Fixed-Sum Discrete Diffusion (FSDD, Sec. 3.3): a generative model of count vectors whose every state sums to M.

    X_0, data: the counts of an image's tokens.  X_1, noise: the counts of M codes drawn at random (Eq. 4).
    forward process   X_t: a discrete Gaussian between the two, made to sum to M by greedy adjusting (Eq. 5-7, Alg. 1)
    denoiser          a DiT with one position per code, X_t -> a distribution over 0..M for every count of X_0
    generation        from X_1 to X_0 in a few steps, by one of two samplers (Eq. 8-10)

Shapes: B vectors, C codes, counts 0..M.  Time t runs from data (0) to noise (1), as in the paper; the denoiser is told
1 - t, as in the authors' release.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dual_transform import tokens_to_counts
from tokenizer import Attention, through

ADJUST_FROM = 0.65  # the paper's sampler: once 1 - t reaches this, the drawn x_0 is adjusted to sum to M

# ---------------------------------------------------------------------------------------------------------------------
# Noise and the forward process (Sec. 3.3.1)


def sample_noise(batch, codebook_size, num_tokens, prior, generator=None, device="cpu"):
    """X_1, pure noise (Eq. 4): counts (batch, C) int64, every row sums to M = num_tokens.

    prior: "multinomial", M independent uniform draws over the C codes (the paper), or
           "distinct", M different codes, so that all counts are 0 or 1 (the authors' release; needs M <= C).
    """
    if prior == "multinomial":
        codes = torch.randint(codebook_size, (batch, num_tokens), generator=generator, device=device)
    elif prior == "distinct":
        if num_tokens > codebook_size:
            raise ValueError("the prior 'distinct' needs num_tokens <= codebook_size, "
                             f"got {num_tokens} > {codebook_size}")
        codes = torch.rand(batch, codebook_size, generator=generator, device=device).topk(num_tokens).indices
    else:
        raise ValueError(f"prior must be 'multinomial' or 'distinct', got {prior!r}")
    return tokens_to_counts(codes, codebook_size)


def sample_times(uniform, times):
    """The times t (B,) that the denoiser is trained at, in (0, 1], with "flips" in [0.07, 0.93].

    uniform: (B,) in [0, 1).  times: "uniform" (the paper), or
    "flips", uniform in the share of flips that have happened. Where X_0 and X_1 differ by 1, Eq. 5-6 give P(X_t = X_1)
    = sigmoid(8 (2t - 1)): under 2 % for t < 0.25, over 98 % for t > 0.75. With uniform t the denoiser spends half of
    its training on vectors in which nothing is undecided, or nothing known.
    """
    if times == "uniform":
        return 1 - uniform
    if times == "flips":
        return 0.5 + torch.logit(0.001 + 0.998 * uniform) / 16
    raise ValueError(f"times must be 'uniform' or 'flips', got {times!r}")


def forward_process(x0, x1, t, uniform=None):
    """X_t ~ q(X_t | X_1, X_0), Eq. 5-7 and Algorithm 1.

    x0, x1: (B, C) int64, every row sums to M.  t: (B,) in [0, 1], 0 = data, 1 = noise.
    uniform: (B, C) in [0, 1), what the draw of each count depends on; drawn here if left out.
    Returns x_t (B, C) int64, every row sums to M; at t = 0 it is x0, at t = 1 it is x1. Before adjusting, codes with
    x1 = x0 stay at x0; adjusting moves one of them only when no other code can take the step.

    Eq. 6 keeps std = |x1 - x0| / 4 at the two ends as well, so that t = 0 and t = 1 would not give X_0 and X_1 back;
    there we return them as they are.
    """
    if uniform is None:
        uniform = torch.rand(x0.shape, device=x0.device)
    num_tokens = check_sums(x0, x1)
    t = t[:, None]  # (B, 1)
    mean = t * x1 + (1 - t) * x0  # Eq. 6
    std = (x1 - x0).abs() / 4
    x, log_prob = discrete_gaussian(mean, std, num_tokens, uniform)
    x = greedy_adjust(x, log_prob, num_tokens)
    return torch.where(t == 0, x0, torch.where(t == 1, x1, x))


def check_sums(x0, x1):
    """M, the sum of every row of x0 and x1 (B, C); ValueError where they differ."""
    sums = torch.cat([x0.sum(1), x1.sum(1)])  # (2 B,)
    wrong = (sums != sums[:1]).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"row {i % len(x0)} of {'x0' if i < len(x0) else 'x1'} sums to {int(sums[i])}, "
                         f"row 0 of x0 to {int(sums[0])}; all must sum to the same M")
    return int(sums[0]) if len(sums) else 0


def discrete_gaussian(mean, std, num_tokens, uniform, top_k=0):
    """Draw counts from Gaussians made discrete by their density at the integers 0..M (Eq. 5 and 9):

        p(k) = exp(-(k - mean)^2 / (2 std^2)) / Z,   Z such that the sum over k = 0..M is 1.

    mean (in [0, M]), std, uniform (in [0, 1)): (B, C).  top_k: draw among the k likeliest integers only, 0 = among all.
    Returns x (B, C) int64 and log_prob, a function: counts (B, C) -> log p of each (B, C), for integers in [0, M].
    Where std is 0, all of p is on the integer nearest to the mean.
    """
    x = mean.round().long()
    log_z = torch.zeros_like(mean)
    # Most codes do not move (std = 0), and around those that do, 8 std either side hold all but exp(-32) of the weight.
    # So K integers for n counts, (n, K), stand for the (B, C, M + 1) of the formula: few, as counts are small.
    moving = std > 0
    m, s = mean[moving, None], std[moving, None]  # (n, 1)
    if len(m):
        first = (m - 8 * s).floor().clamp(min=0)
        last = (m + 8 * s).ceil().clamp(max=num_tokens)
        k = first + torch.arange(int((last - first).max()) + 1, device=mean.device)  # (n, K)
        log_p = (-((k - m) / s) ** 2 / 2).masked_fill(k > last, -math.inf)
        x[moving] = k.long().gather(1, draw(log_p.softmax(1), uniform[moving], top_k=top_k)[:, None])[:, 0]
        log_z[moving] = log_p.logsumexp(1)
    return x, partial(gaussian_log_prob, mean=mean, std=std, log_z=log_z)


def gaussian_log_prob(k, mean, std, log_z):
    """log p(k) of the Gaussians of discrete_gaussian(). k: (B, C) integers in [0, M].  log_z: (B, C), log of Z."""
    at_rest = torch.zeros_like(mean).masked_fill(k != mean.round(), -math.inf)
    return torch.where(std > 0, -((k - mean) / std) ** 2 / 2 - log_z, at_rest)


def draw(p, uniform, top_p=1.0, top_k=0):
    """One draw from each categorical distribution, cut to its likeliest outcomes.

    p: (..., K), each row sums to 1.  uniform: (...) in [0, 1), what the draw depends on.  top_p, top_k: see cut().
    Returns the outcomes (...) int64 in [0, K).
    """
    p, order = cut(p, top_p, top_k)
    cumulative = p.cumsum(-1)
    outcome = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)  # inverse of the distribution function
    outcome = outcome.clamp(max=p.shape[-1] - 1)
    return outcome if order is None else order.gather(-1, outcome[..., None])[..., 0]


def cut(p, top_p=1.0, top_k=0):
    """Categorical distributions (..., K) without their unlikely outcomes: (p, order), p in descending order and not
    normalized, order (..., K) the outcome that each entry of p belongs to. Where nothing is cut, p as it is and None.

    top_p: keep the smallest set of outcomes whose probability exceeds top_p (never empty; 1 keeps all).
    top_k: keep the k likeliest outcomes (0 keeps all).
    """
    if top_p >= 1 and not top_k:
        return p, None
    p, order = p.sort(dim=-1, descending=True)
    p = p * (p.cumsum(-1) - p <= top_p)  # what comes before an outcome decides, so that the first one always stays
    p[..., top_k or p.shape[-1]:] = 0
    return p, order


def greedy_adjust(x, log_prob, num_tokens):
    """Greedy adjusting (Algorithm 1): change as few counts as it takes, the likeliest steps first, until the sum is M.

    x: (B, C) integers of any sum.  num_tokens: M.
    log_prob: log-probability of every count, see at(). No count exceeds K where it is a table (B, C, K + 1), else M.
    Returns (B, C) int64, none negative, every row sums to M.

    Algorithm 1 is one round, which falls short when there is more to take away than there are codes with a count above
    0 (the authors' release then returns a wrong sum). We repeat it, scoring anew, until no row is left. Each round
    takes at least one step towards M, so it ends.
    """
    largest = num_tokens if callable(log_prob) else log_prob.shape[2] - 1
    x = x.long().clamp(0, largest)
    while True:
        delta = x.sum(1, keepdim=True) - num_tokens  # (B, 1), line 2
        if not delta.any():
            return x
        d = step_score(x, -delta.sign(), log_prob, largest)  # (B, C), line 3
        x = take_steps(x, d, delta.abs(), -delta.sign())  # lines 4-6


def step_score(x, step, log_prob, largest):
    """Line 3 of Algorithm 1: by how much a step changes the probability of each count, p(x + step) - p(x).

    x: (B, C) int64.  step: (B, 1), 1 or -1.  log_prob: see at().  largest: the largest count allowed.
    Returns (B, C) float64, -inf where the step would leave [0, largest].
    """
    stepped = x + step
    before, after = at(log_prob, x).double(), at(log_prob, stepped.clamp(0, largest)).double()
    d = after.exp() - before.exp()  # in [-1, 1]
    # Equal scores (whole rows of them once a Gaussian is a spike) are told apart by the ratio of the two
    # probabilities, in a term too small to matter elsewhere. The release goes by index there.
    ratio = (after - before).nan_to_num(0.0)
    d = d + 1e-12 * ratio.sign() * ratio.abs().log1p()
    return d.nan_to_num(-1.0).masked_fill((stepped < 0) | (stepped > largest), -math.inf)


def at(log_prob, k):
    """The log-probability of the counts k (B, C), from a table (B, C, K + 1) or a function: counts (B, C) -> (B, C)."""
    return log_prob(k) if callable(log_prob) else log_prob.gather(2, k[:, :, None])[:, :, 0]


def take_steps(x, score, number, step):
    """Lines 4-6 of Algorithm 1: in every row the codes with the highest scores take a step.

    x: (B, C) int64.  score: (B, C), -inf where a code may not step.  number, step: (B, 1), how many codes, and by what.
    """
    best = score.topk(min(int(number.max()), x.shape[1]), dim=1)  # for the row with most to do, (B, n)
    rank = torch.arange(best.values.shape[1], device=x.device)
    chosen = (rank < number) & (best.values > -math.inf)  # every row takes its own number
    return x.scatter_add(1, best.indices, step * chosen)


# ---------------------------------------------------------------------------------------------------------------------
# The denoiser (Sec. 4.1: "aligned with DiT")


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: shift, scale and gate of both halves come from the condition c.

    x (B, C, width), c (B, width), places (B, N), see Attention -> (B, C, width)
    """

    def __init__(self, width, heads, gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate=gelu), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, places=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)  # each (B, 1, width)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, places)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    """p_theta(X_0 | X_t): a DiT over the C counts, one position per code.

    codebook_size: C.  num_tokens: M.  num_classes: labels 0..num_classes - 1; label num_classes is the null class,
    which stands for "any" in classifier-free guidance.
    unused_rows: give the count embedding C + 1 rows, of which counts read the first M + 1: the release has them, and
    its 36.0 and 136.7 million parameters count them.
    gelu: "tanh" (DiT) or "none", the exact function, which differs by less than 0.001 and is faster on CPUs.
    sparse: every code attends to the M tokens of X_t (k times to a code that occurs k times), not to all C codes: the
    absent ones tell it nothing that these don't. Attention costs C M in place of C^2. Same weights; not in the paper.
    """

    recompute = False  # see tokenizer.through()

    def __init__(self, codebook_size, num_tokens, num_classes, width, layers, heads, unused_rows=False, gelu="tanh",
                 sparse=False):
        super().__init__()
        if unused_rows and num_tokens > codebook_size:
            raise ValueError(f"unused_rows needs num_tokens <= codebook_size, got {num_tokens} > {codebook_size}")
        self.codebook_size, self.num_tokens, self.num_classes = codebook_size, num_tokens, num_classes
        self.sparse = sparse
        self.count_embedding = nn.Embedding((codebook_size if unused_rows else num_tokens) + 1, width)
        self.code_embedding = nn.Parameter(torch.zeros(1, codebook_size, width))
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads, gelu) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.to_logits = nn.Linear(width, num_tokens + 1)
        self.initialize()

    def initialize(self):
        """The initial values of DiT."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.count_embedding, self.class_embedding, self.time_mlp[0], self.time_mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.blocks:  # gates of zero: at the start every block is the identity
            nn.init.zeros_(block.modulation[1].weight)
        nn.init.zeros_(self.modulation_out[1].weight)
        nn.init.zeros_(self.to_logits.weight)  # and all counts are equally likely: the loss starts at log(M + 1)

    @torch.no_grad()
    def start_from_codebook(self, codes):
        """Start the code embedding from the tokenizer's codes (C, code_dim) of length 1, so that codes which decode
        alike are embedded alike. From zeros, as in the authors' release, the denoiser has to find out which those are.

        These are random Fourier features: the products of the embeddings of e and e' are close to exp(-2 |e - e'|^2),
        but for a factor. Not in the paper.
        """
        w = 2 * torch.randn(codes.shape[1], self.code_embedding.shape[2])  # (code_dim, width)
        self.code_embedding[0] = 0.3 * torch.cos(codes.cpu() @ w + 2 * math.pi * torch.rand(w.shape[1]))

    def forward(self, x_t, t, labels, codes=None):
        """x_t (B, C) int64 in 0..M, t (B,) in [0, 1], labels (B,) int64 in 0..num_classes -> logits (B, C, M + 1).
        Where sparse, every row of x_t sums to M.

        codes (B, L) int64: compute the logits of these codes alone, (B, L, M + 1). Only where sparse, as no code then
        attends to an absent one; all codes present must be among them.
        Fewer than C positions are taken for the first ones, which only a causal model can use (paper/baselines.py).
        """
        c = self.time_mlp(time_features(1 - t))
        c = c + self.class_embedding(labels).to(c.dtype)  # (B, width)
        embedding, tokens = self.code_embedding[:, :x_t.shape[1]], None
        if self.sparse:  # as counts_to_tokens(x_t), (B, M): token m is the first code whose cumulative count exceeds m
            m = torch.arange(self.num_tokens, device=x_t.device).expand(len(x_t), -1).contiguous()
            tokens = torch.searchsorted(x_t.cumsum(1), m, right=True)
        if codes is not None:  # from here on C stands for L
            place = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
            tokens = torch.zeros_like(x_t).scatter(1, codes, place).gather(1, tokens)
            embedding, x_t = self.code_embedding[0][codes], x_t.gather(1, codes)
        x = self.count_embedding(x_t) + embedding  # (B, C, width)
        x = x.to(c.dtype)  # bfloat16 in autocast
        x = through(self.blocks, x, c, tokens, recompute=self.recompute)
        shift, scale = self.modulation_out(c)[:, None].chunk(2, dim=2)
        return self.to_logits(self.norm_out(x) * (1 + scale) + shift)


def time_features(time, size=256, max_period=10000):
    """Cosines and sines of a time at geometrically spaced frequencies, (B,) -> (B, size). Times in [0, 1], not times
    1000 as in DiT."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(size // 2, device=time.device) / (size // 2))
    angles = time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def fsdd_loss(denoiser, x0, labels, t, x1, uniform=None, num_codes=0, order=None):
    """Cross-entropy of the denoiser's logits at X_t against X_0, mean over codes and vectors.

    x0, x1: (B, C) int64.  labels: (B,), the null class where the label is dropped.  t: (B,) in (0, 1].
    uniform: (B, C), see forward_process.
    num_codes: 0 or at least C: all codes. Else this mean is estimated from L = num_codes > 2 M codes (sparse denoiser):
               all that X_t or X_0 holds, and a random few of the others, those with the largest order (B, C), uniform
               in [0, 1), weighted to stand for the rest. A step then costs what M costs, whatever C.
    """
    x_t = forward_process(x0, x1, t, uniform)
    if 0 < num_codes <= 2 * x0[0].sum():
        raise ValueError(f"num_codes must be 0 or more than 2 M = {2 * int(x0[0].sum())}, got {num_codes}")
    if not num_codes or num_codes >= x0.shape[1]:
        logits = denoiser(x_t, t, labels)  # (B, C, M + 1)
        return F.cross_entropy(logits.float().flatten(0, 1), x0.flatten())
    held = x_t + x0 > 0  # (B, C)
    codes = (order + held).topk(num_codes, dim=1).indices  # (B, L)
    number = held.sum(1, keepdim=True)  # (B, 1)
    stands_for = (x0.shape[1] - number) / (num_codes - number)  # so many codes, each of the others
    weight = torch.where(held.gather(1, codes), 1, stands_for)
    logits = denoiser(x_t, t, labels, codes)  # (B, L, M + 1)
    loss = F.cross_entropy(logits.float().flatten(0, 1), x0.gather(1, codes).flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / x0.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Generation (Sec. 3.3.2): from X_1 to X_0 in steps from t to s = t - dt, each by one of two samplers


def refine(denoiser, labels, prior="multinomial", sampler="paper", steps=25, guidance=(4.0, 50.0, 55.0), top_p=0.8,
           top_k=0, generator=None):
    """Generate count vectors step by step: yields X_1 (noise), then X_t after each step, at last X_0.

    Every one is (B, C) int64 and every row sums to M.

    denoiser: called as Denoiser.forward(); it needs codebook_size, num_tokens and num_classes.  labels: (B,) int64.
    prior: the noise the denoiser was trained with.
    sampler: "paper" (Eq. 9-10, the authors' release), see paper_step(), or
             "exchange" (Eq. 8 with the posterior of Eq. 5-6), see exchange_step().
    steps: their number, at the times of time_grid().
    guidance: see guidance_weight(); 1 is the plain model.
    top_p, top_k: keep only the likeliest counts of p(x_0 | X_t), see cut(). In the paper's sampler top_k also cuts
                  the draw of X_s.
    The defaults, but for the prior (theirs is distinct), are the authors' for the best FID; top_k=2, top_p=1 is their
    sharper, less diverse setting.
    """
    if sampler not in ("paper", "exchange"):
        raise ValueError(f"sampler must be 'paper' or 'exchange', got {sampler!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}")
    B, C, M, device = len(labels), denoiser.codebook_size, denoiser.num_tokens, labels.device
    x = sample_noise(B, C, M, prior, generator, device)
    yield x
    times = time_grid(steps, sampler)
    for t, s in zip(times, times[1:]):
        p = guided_probabilities(denoiser, x, t, labels, guidance_weight(guidance, t))  # p(x_0 | X_t), (B, C, M + 1)
        if sampler == "paper":
            x = paper_step(x, p, t, s, top_p, top_k, generator)
        else:
            x = exchange_step(x, p, t, s, prior, top_p, top_k, generator)
        yield x


def generate(denoiser, labels, **settings):
    """Generate counts X_0 (B, C) int64, every row sums to M, for labels (B,). The settings are those of refine()."""
    return list(refine(denoiser, labels, **settings))[-1]


def time_grid(steps, sampler):
    """The times of generation, t_0 = 1 > ... > t_steps = 0. The paper's sampler takes uniform ones. The exchange
    sampler takes the mean of those and of times uniform in the share of flips, see sample_times(): uniform times spend
    half of the steps where little changes, and times uniform in flips leave too few for counts that move by 2 or more.
    """
    uniform = [1 - step / steps for step in range(steps + 1)]
    if sampler == "paper":
        return uniform
    return [u if u in (0, 1) else (u + 0.5 + math.log(u / (1 - u)) / 16) / 2 for u in uniform]


def paper_step(x, p, t, s, top_p, top_k, generator):
    """X_t -> X_s as in the paper: draw x_0 (from ADJUST_FROM on adjusted to sum to M), then X_s from a Gaussian between
    the two (Eq. 9-10), then adjust.

    x: X_t (B, C).  p: p(x_0 | X_t) (B, C, M + 1).  Returns (B, C), every row sums to M.
    """
    M = p.shape[2] - 1
    u0, u = torch.rand(2, *x.shape, generator=generator, device=x.device)
    x0 = draw(p, u0, top_p, top_k)
    if 1 - t >= ADJUST_FROM and not top_k:
        x0 = greedy_adjust(x0, p.log(), M)
    # Eq. 10. The noise end that X_t and x_0 imply is X_1 = x_0 + (X_t - x_0) / t, so |X_1 - x_0| = |X_t - x_0| / t
    mean = x + (t - s) / t * (x0 - x)
    f = 1 / (1 + math.exp(100 * (0.2 - s)))  # noise in the first 80 % of the steps, then none
    std = (x - x0).abs() / t / 4 * f
    x, log_prob = discrete_gaussian(mean, std, M, u, top_k)  # Eq. 9
    # In the last step the Gaussian is a spike at x_0 and cannot tell one step from another; the denoiser's p can.
    return greedy_adjust(x, log_prob if s > 0 else p.log(), M)


def exchange_step(x, p, t, s, prior, top_p, top_k, generator):
    """X_t -> X_s by Eq. 8: for every code

        p(X_s | X_t) = sum over a of q(X_s | X_t, x_0 = a) p(x_0 = a | X_t)

    with the posterior q of one code, see posterior(). exchange() then draws all codes so that the sum stays M.

    x: X_t (B, C).  p: p(x_0 | X_t) (B, C, M + 1).  Returns (B, C), every row sums to M.
    """
    C, M = p.shape[1], p.shape[2] - 1
    b, p_b = noise_of_a_code(C, M, prior)
    K = int(max((p.amax((0, 1)) > 1e-5).nonzero().max(), b.max(), x.max()))  # the largest count that matters
    p, order = cut(p[:, :, :K + 1], top_p, top_k)
    if order is not None:
        p = torch.zeros_like(p).scatter(2, order, p)
    p = p / p.sum(2, keepdim=True)  # (B, C, K + 1)
    F_t, F_s = distribution_function(t, b, K), distribution_function(s, b, K)
    q = torch.empty_like(p)  # p(X_s | X_t), (B, C, K + 1)
    for k in x.unique().tolist():  # a few small counts: nearly all are 0 or 1
        table = posterior(k, F_t, F_s, p_b).to(x.device)
        q[x == k] = (p[x == k].double() @ table).float()  # in float64, which autocast leaves alone
    return exchange(x, q, generator)


def posterior(k, F_t, F_s, p_b):
    """q(X_s = j | X_t = k, x_0 = a) of one code: a table (a, j), (K + 1, K + 1), each row sums to 1.

    Eq. 5-6 say how a count is distributed at each time, not how it moves from one time to the next. We let it move as
    little as they allow: a quantile u is drawn once, and X_t = F_t^-1(u) at all times. Then X_t = k says that u lies in
    (F_t(k - 1), F_t(k)], and the part of this interval that lies in (F_s(j - 1), F_s(j)] is the probability of X_s = j.
    The noise end b is not known any more and is summed over.

    F_t, F_s: see distribution_function().  p_b: (N,), the probability of every b.
    """
    below_t, upto_t = F_t[:, :, k, None], F_t[:, :, k + 1, None]  # (K + 1, N, 1)
    overlap = (F_s[:, :, 1:].minimum(upto_t) - F_s[:, :, :-1].maximum(below_t)).clamp(min=0)  # (K + 1, N, K + 1)
    # Where a can't have led to k (the denoiser may be wrong), only the second term is left: X_s given a.
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
    """How one code's count in X_1 is distributed: the counts b (N,) that it may have, and their probabilities (N,). The
    second place, beside sample_noise(), that a new prior needs."""
    if prior == "distinct":
        return torch.tensor([0, 1]), torch.tensor([1 - M / C, M / C], dtype=torch.float64)
    assert prior == "multinomial", prior  # refine() has refused what sample_noise() does not know
    b = torch.arange(M + 1)
    p = [math.comb(M, i) * (1 / C) ** i * (1 - 1 / C) ** (M - i) for i in range(M + 1)]  # binomial
    p = torch.tensor(p, dtype=torch.float64)
    return b[p > 1e-12], p[p > 1e-12]  # for M = 128 and C = 4096 these are 0 to 6


def exchange(x, q, generator=None):
    """Draw X_s from X_t so that every row keeps its sum M: as many tokens are added as are taken away.

    x: X_t (B, C).  q: p(X_s | X_t) of every code by itself (B, C, K + 1).  Returns (B, C).

    Independent draws sum to M + delta. Algorithm 1 would undo the likeliest steps, which are the ones just made: of the
    steps up and down only min(up, down) survive, so that a fine chain stands still until its last step. With the true
    p(x_0 | X_t) it ends 0.100, 0.163, 0.218 off the data in 5, 25, 100 steps, this function 0.088, 0.044, 0.043 (total
    variation, uniform times; tests/test_fsdd.py). Here half of the surplus is undone, and the other half is made up for
    by opposite steps of other codes. In the limit of small steps this exchanges tokens as often as independent codes
    would move.
    """
    M, K = int(x[0].sum()), q.shape[2] - 1
    u, v = torch.rand(2, *x.shape, generator=generator, device=x.device)
    coin = torch.rand(len(x), 1, generator=generator, device=x.device) < 0.5
    y = draw(q, u)
    delta = y.sum(1, keepdim=True) - M  # (B, 1)
    stepped = y - delta.sign()  # as in greedy_adjust
    log_q = at(q, stepped.clamp(0, K)).log().masked_fill((stepped < 0) | (stepped > K), -math.inf)
    score = log_q - (-v.log()).log()  # with Gumbel noise the best are a draw without replacement, in proportion to q
    surplus = (y - x) * delta.sign() > 0  # codes that moved to the side on which there are too many
    back = (delta.abs() + coin) // 2  # (B, 1), half of them; a coin decides about an odd one
    y = take_steps(y, score.masked_fill(~surplus, -math.inf), back, -delta.sign())
    y = take_steps(y, score.masked_fill(surplus, -math.inf), delta.abs() - back, -delta.sign())
    return greedy_adjust(y, q.log(), M)  # in case too few codes could step


def guidance_weight(guidance, t):
    """The weight of classifier-free guidance at time t. guidance: one weight; three, for the thirds of the time from
    noise to data (the release); or two, at noise and at data, and in between in proportion to the flips that have
    happened by then."""
    weights = guidance if isinstance(guidance, (list, tuple)) else [guidance]
    if len(weights) == 2:
        left = 1 / (1 + math.exp(-8 * (2 * t - 1)))  # see sample_times()
        return left * weights[0] + (1 - left) * weights[1]
    return weights[int(len(weights) * (1 - t + 1e-9))]


@torch.no_grad()
def guided_probabilities(denoiser, x_t, t, labels, weight):
    """p(x_0 | X_t) (B, C, M + 1) with classifier-free guidance on probabilities: p_null + weight (p_class - p_null),
    renormalized."""
    t = torch.full((len(x_t),), t, device=x_t.device)
    if weight == 1:
        return denoiser(x_t, t, labels).float().softmax(-1)
    null = torch.full_like(labels, denoiser.num_classes)
    p_class, p_null = denoiser(x_t.repeat(2, 1), t.repeat(2), torch.cat([labels, null])).float().softmax(-1).chunk(2)
    p = (p_null + weight * (p_class - p_null)).clamp(min=0)
    return p / p.sum(-1, keepdim=True)
