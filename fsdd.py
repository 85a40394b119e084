"""Fixed-Sum Discrete Diffusion (FSDD, Sec. 3.3): a generative model of count vectors whose every state sums to M.

    X_0, data: the counts of an image's tokens.  X_1, noise: the counts of M codes drawn at random (Eq. 4).
    forward process   X_t: a discrete Gaussian between the two, made to sum to M by greedy adjusting (Eq. 5-6, Alg. 1)
    denoiser          a DiT with one position per code, X_t -> a distribution over 0..M for every count of X_0
    generation        from X_1 to X_0 in a few steps (Eq. 8-10)

Shapes: B vectors, C codes, counts 0..M.  Time t runs from data (0) to noise (1), as in the paper; the denoiser embeds
1 - t, as in the authors' release.
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dual_transform import tokens_to_counts
from tokenizer import Attention

# Constants of the sampler in the authors' release
ADJUST_FROM = 0.65     # once 1 - t reaches this, the drawn x_0 is adjusted to sum to M
NOISE_STOPS_AT = 0.2   # f of Eq. 10 is a sigmoid that falls from 1 to 0 where t passes this time ...
NOISE_SLOPE = 100      # ... as steeply as this

MIDDLE = (0.6, 0.3)    # not the authors': the times of all steps but the first and the last, see sampling_times()

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


def forward_process(x0, x1, t, uniform=None):
    """X_t ~ q(X_t | X_1, X_0), Eq. 5-6 and Algorithm 1. (Eq. 7, that the sum is M on average, holds for the continuous
    Gaussian, and nearly for the discrete one where counts differ by at most 1. Greedy adjusting corrects the rest.)

    x0, x1: (B, C) int64, every row sums to M.  t: (B,) in [0, 1], 0 = data, 1 = noise.
    uniform: (B, C) in [0, 1), the random number that decides the draw of each count; drawn here by default.
    Returns x_t (B, C) int64, every row sums to M; at t = 0 it is x0, at t = 1 it is x1. Before adjusting, codes with
    x1 = x0 stay at x0; adjusting changes one of them only in a round in which all other codes that can step do.
    Raises ValueError if the rows of x0 and x1 do not all have the same sum.

    Eq. 6 keeps std = |x1 - x0| / 4 at the two ends as well, so that t = 0 and t = 1 would not give X_0 and X_1 back.
    We return them unchanged there.
    """
    if uniform is None:
        uniform = torch.rand(x0.shape, device=x0.device)
    sums = torch.cat([x0, x1]).sum(1)  # (2 B,)
    if (sums != sums[:1]).any():
        raise ValueError(f"every row of x0 and x1 must have the same sum M, got {sums.unique().tolist()}")
    num_tokens = int(sums[0])
    t = t[:, None]  # (B, 1)
    mean = t * x1 + (1 - t) * x0  # Eq. 6
    std = (x1 - x0).abs() / 4
    x, log_prob = discrete_gaussian(mean, std, num_tokens, uniform)  # line 1 of Algorithm 1
    x = greedy_adjust(x, log_prob, num_tokens)
    return torch.where(t == 0, x0, torch.where(t == 1, x1, x))


def discrete_gaussian(mean, std, num_tokens, uniform, top_k=0):
    """Draw counts from Gaussians restricted to the integers 0..M and normalized (Eq. 5 and 9):

        p(k) = exp(-(k - mean)^2 / (2 std^2)) / Z,   Z such that the sum over k = 0..M is 1.

    mean (in [0, M]), std, uniform (in [0, 1)): (B, C).  top_k: draw among the k most probable integers, 0 = among all.
    Returns x (B, C) int64 and log_prob, a function: counts (B, C) -> log p of each (B, C), for integers in [0, M].
    Where std is 0, all of p is on the integer nearest to the mean.

    Most codes have std = 0, and most counts are small. So p is tabulated for the n counts that move, up to a K beyond
    which all of it is below exp(-32).
    """
    moving, nearest = std > 0, mean.round()
    K = min(num_tokens, int((mean + 8 * std).max()) + 1)
    k = torch.arange(K + 1, device=mean.device)
    log_p = -((k - mean[moving, None]) / std[moving, None]) ** 2 / 2  # (n, K + 1), not normalized
    x, log_z = nearest.long(), torch.zeros_like(mean)
    x[moving] = sample_categorical(log_p.softmax(1), uniform[moving], top_k=top_k)
    log_z[moving] = log_p.logsumexp(1)

    def log_prob(k):
        spike = torch.zeros_like(mean).masked_fill(k != nearest, -math.inf)
        return torch.where(moving, -((k - mean) / std) ** 2 / 2 - log_z, spike)

    return x, log_prob


def sample_categorical(p, uniform, top_p=1.0, top_k=0):
    """One draw from each categorical distribution, restricted to its most probable outcomes by truncate().

    p: (..., K), need not be normalized.  uniform: (...) in [0, 1), the random number that decides the draw.
    Returns the outcomes (...) int64 in [0, K).
    """
    if top_p < 1 or top_k:
        p, order = truncate(p, top_p, top_k)  # each (..., k)
        return order.gather(-1, sample_categorical(p, uniform)[..., None])[..., 0]
    cumulative = p.cumsum(-1)
    outcome = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)  # inverse of the distribution function
    return outcome.clamp(max=p.shape[-1] - 1)


def truncate(p, top_p=1.0, top_k=0):
    """Top-p and top-k: categorical distributions (..., K) without their improbable outcomes.

    top_p: keep the smallest set of outcomes whose probability exceeds top_p (never empty; 1 keeps all).
    top_k: keep the k most probable outcomes (0 keeps all).
    Returns p (..., k) in descending order, not normalized, with 0 for the outcomes that top_p removes, and order
    (..., k), the outcome that each entry belongs to.
    """
    p, order = p.topk(min(top_k or p.shape[-1], p.shape[-1]))
    return p * (p.cumsum(-1) - p <= top_p), order  # the probability before an outcome decides: the first always stays


def greedy_adjust(x, log_prob, num_tokens):
    """Greedy adjusting (Algorithm 1): as few steps by one as possible, those with the best scores, until the sum is M.

    x: (B, C) integers of any sum.  num_tokens: M.
    log_prob: a function, counts (B, C) in [0, M] -> the log-probability of each (B, C).
    Returns (B, C) int64, none negative, every row sums to M.

    Algorithm 1 is one round, which falls short when there is more to remove than there are codes with a count above 0
    (the authors' release then returns a wrong sum). We repeat it, with new scores, until no row is left. Each round
    takes at least one step towards M, so it ends.
    """
    x = x.long().clamp(0, num_tokens)
    while (delta := x.sum(1, keepdim=True) - num_tokens).any():  # (B, 1), line 2
        step = -delta.sign()
        before, after = log_prob(x).double(), log_prob((x + step).clamp(0, num_tokens)).double()  # each (B, C)
        # Line 3. Equal scores (whole rows of them once a Gaussian is a spike) are ordered by the ratio of the two
        # probabilities, in a term too small to matter elsewhere. The release orders them by index.
        ratio = (after - before).nan_to_num(0.0, 1e100, -1e100)
        d = after.exp() - before.exp() + 1e-12 * ratio.asinh()
        d = d.nan_to_num(-1.0)  # a denoiser that gives NaN must not keep this loop from ending
        d = d.masked_fill((x + step < 0) | (x + step > num_tokens), -math.inf)
        x = take_steps(x, d, delta.abs(), step)  # lines 4-6
    return x


def take_steps(x, score, number, step):
    """In every row the codes with the highest scores take a step (lines 4-6 of Algorithm 1).

    x: (B, C) int64.  score: (B, C), -inf where a code may not step.  number, step: (B, 1), how many codes, and by what.
    """
    best = score.topk(min(int(number.max()), x.shape[1]))  # enough for the row with the most steps, (B, n)
    rank = torch.arange(best.values.shape[1], device=x.device)
    chosen = (rank < number) & (best.values > -math.inf)  # every row takes its own number
    return x.scatter_add(1, best.indices, step * chosen)


# ---------------------------------------------------------------------------------------------------------------------
# The denoiser (Sec. 4.1: "aligned with DiT")


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: the condition c gives shift, scale and gate of both halves.

    x (B, C, width), c (B, width) -> (B, C, width).
    """

    def __init__(self, width, heads, gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        approximate = "none" if gelu == "exact" else gelu
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)  # each (B, 1, width)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    """p_theta(X_0 | X_t): a DiT over the C counts, one position per code.

    codebook_size: C.  num_tokens: M.  num_classes: labels 0..num_classes - 1; label num_classes is the null class,
    which stands for "any" in classifier-free guidance.
    unused_rows: give the count embedding C + 1 rows, if that is more than the M + 1 that counts use. The release has
    them, and its 36.0 and 136.7 million parameters include them.
    gelu: "tanh" (DiT) or "exact", which differs by less than 0.001 and is faster on CPUs.
    """

    def __init__(self, codebook_size, num_tokens, num_classes, width, layers, heads, unused_rows=False, gelu="tanh"):
        super().__init__()
        self.codebook_size, self.num_tokens, self.num_classes = codebook_size, num_tokens, num_classes
        self.count_embedding = nn.Embedding((max(codebook_size, num_tokens) if unused_rows else num_tokens) + 1, width)
        self.code_embedding = nn.Parameter(torch.zeros(1, codebook_size, width))
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads, gelu) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.to_logits = nn.Linear(width, num_tokens + 1)
        self.initialize()

    def initialize(self):
        """The initial values of DiT. DiT has no embedding of counts: ours starts with a standard deviation of 0.02, as
        the embedding of classes does; the release's starts with 1."""
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

    def forward(self, x_t, t, labels):
        """x_t (B, C) int64 in 0..M, t (B,) in [0, 1], labels (B,) int64 in 0..num_classes -> logits (B, C, M + 1)."""
        c = self.condition(t, labels)
        x = (self.count_embedding(x_t) + self.code_embedding).to(c.dtype)  # (B, C, width), bfloat16 under autocast
        for block in self.blocks:
            x = block(x, c)
        return self.head(x, c)

    def condition(self, t, labels):
        """The embedding of time and class, (B, width); bfloat16 under autocast."""
        c = self.time_mlp(time_features(1 - t))  # (B, 256) -> (B, width)
        return c + self.class_embedding(labels).to(c.dtype)

    def head(self, x, c):
        """The final adaLN layer and the linear map to logits: x (B, C, width), c (B, width) -> (B, C, M + 1)."""
        shift, scale = self.modulation_out(c)[:, None].chunk(2, dim=2)
        return self.to_logits(self.norm_out(x) * (1 + scale) + shift)


def time_features(time, size=256, max_period=10000):
    """Cosines and sines of a time at geometrically spaced frequencies, (B,) -> (B, size). Times lie in [0, 1], without
    DiT's factor of 1000, as in the authors' release."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(size // 2, device=time.device) / (size // 2))
    angles = time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def fsdd_loss(denoiser, batch):
    """Cross-entropy of the denoiser's logits at X_t against X_0, mean over codes and vectors.

    batch: x0 and x_t (B, C) int64, t (B,) in (0, 1], labels (B,), the null class where the label is dropped.
    """
    logits = denoiser(batch.x_t, batch.t, batch.labels)  # (B, C, M + 1)
    return F.cross_entropy(logits.float().flatten(0, 1), batch.x0.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# Generation (Sec. 3.3.2): from X_1 to X_0 in steps from t to s = t - dt


@torch.no_grad()
def refine(denoiser, labels, prior="multinomial", steps=25, times="even", guidance=(4.0, 50.0, 55.0), top_p=0.8,
           top_k=0, generator=None, start=None):
    """Generate count vectors step by step: yields X_1 (noise), then X_t after each step, finally X_0.

    Every one is (B, C) int64 and every row sums to M.

    denoiser: called as Denoiser.forward(); it needs codebook_size, num_tokens and num_classes.  labels: (B,) int64.
    prior: the noise that the denoiser was trained with, see sample_noise().
    steps, times: how many steps, and at which times, see sampling_times().
    guidance: see guidance_weight(); (1.0,) is the plain model.  top_p, top_k: see sample_step().
    The defaults, except for the prior (theirs is "distinct"), are those of the authors' release for the best FID. The
    paper names only the 25 steps (Sec. 4.1). top_k = 2 and top_p = 1 are the release's sharper, less diverse setting.
    start: X_t (B, C) and t, to continue from this state instead of noise.
    """
    C, M = denoiser.codebook_size, denoiser.num_tokens
    x, t_start = start or (sample_noise(len(labels), C, M, prior, generator, labels.device), 1.0)
    yield x
    for t, s in pairwise([t_start] + [t for t in sampling_times(steps, times) if t < t_start]):
        p = guided_probabilities(denoiser, x, t, labels, guidance_weight(guidance, t))  # p(x_0 | X_t), (B, C, M + 1)
        x = sample_step(x, p, t, s, top_p, top_k, generator)
        yield x


def generate(denoiser, labels, **settings):
    """Generate counts X_0 (B, C) int64, every row sums to M, for labels (B,). The settings are those of refine()."""
    return list(refine(denoiser, labels, **settings))[-1]


def sample_step(x, p, t, s, top_p=1.0, top_k=0, generator=None):
    """X_t -> X_s, one step of Eq. 8, whose sum over x_0 becomes a draw: draw x_0 from p(x_0 | X_t) (from ADJUST_FROM
    on adjusted to sum to M), draw X_s from a Gaussian between X_t and x_0 (Eq. 9-10), and adjust it.

    x: X_t (B, C).  p: p(x_0 | X_t) (B, C, M + 1).
    top_p, top_k: see truncate(). top_k > 0 is the release's second setting: it also truncates the draw of X_s, and x_0
    is never adjusted. The release does not adjust X_s then either, so that its sums are wrong; here X_s always is.
    Returns X_s (B, C), every row sums to M.
    """
    M = p.shape[2] - 1
    u0, u = torch.rand(2, *x.shape, generator=generator, device=x.device)  # each (B, C)

    def log_p(k):
        return p.gather(2, k[:, :, None])[:, :, 0].log()

    x0 = sample_categorical(p, u0, top_p, top_k)  # x_0 ~ p(x_0 | X_t) of Eq. 8, (B, C)
    if 1 - t >= ADJUST_FROM and not top_k:
        x0 = greedy_adjust(x0, log_p, M)
    # Eq. 10. The noise end that X_t and x_0 imply is X_1 = x_0 + (X_t - x_0) / t, so |X_1 - x_0| = |X_t - x_0| / t
    mean = x + (t - s) / t * (x0 - x)
    f = 1 / (1 + math.exp(NOISE_SLOPE * (NOISE_STOPS_AT - s)))  # noise as long as s > NOISE_STOPS_AT, then none
    std = (x - x0).abs() / t / 4 * f  # mean, std (B, C)
    x, log_prob = discrete_gaussian(mean, std, M, u, top_k)  # Eq. 9
    # In the last step the Gaussian is a spike at x_0 and cannot rank the steps; the denoiser's p can.
    return greedy_adjust(x, log_prob if s > 0 else log_p, M)


def sampling_times(steps, times="even"):
    """The sampling times t_0 = 1 > ... > t_steps = 0.

    times: "even" are evenly spaced, as in the paper.  "middle", not in the paper, jump from 1 to MIDDLE, are evenly
    spaced there, and jump to 0. A count that differs from x_0 by 1 moves in a step of Eq. 9-10 with odds of about
    exp(-8 t^2), however small the step is. So hardly any count moves before MIDDLE. After it, too many do, until
    NOISE_STOPS_AT, where they stop.
    """
    middle = torch.linspace(*MIDDLE, steps - 1, dtype=torch.float64).tolist()
    return {"even": [1 - step / steps for step in range(steps + 1)], "middle": [1.0, *middle, 0.0]}[times]


def guidance_weight(guidance, t):
    """The weight of classifier-free guidance at time t. guidance: weights for equal parts of the time from noise to
    data, such as the three of the release."""
    return guidance[min(int(len(guidance) * (1 - t + 1e-9)), len(guidance) - 1)]


def guided_probabilities(denoiser, x_t, t, labels, weight):
    """p(x_0 | X_t) (B, C, M + 1) with classifier-free guidance on probabilities: p_null + weight (p_class - p_null),
    negative values set to 0, normalized.

    x_t: (B, C).  t: a number.  labels: (B,).
    """
    t = torch.full((len(x_t),), t, device=x_t.device)
    p_class = denoiser(x_t, t, labels).float().softmax(-1)
    if weight == 1:
        return p_class
    null = torch.full_like(labels, denoiser.num_classes)
    p_null = denoiser(x_t, t, null).float().softmax(-1)
    p = (p_null + weight * (p_class - p_null)).clamp(min=0)
    return p / p.sum(-1, keepdim=True)
