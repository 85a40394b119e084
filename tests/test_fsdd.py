"""Fixed-Sum Discrete Diffusion: every state sums to M, and every distribution is the paper's (Sec. 3.3)."""
import itertools
import math
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fsdd
from fsdd import Denoiser, discrete_gaussian, draw, forward_process, greedy_adjust, sample_noise


def generator(seed):
    return torch.Generator().manual_seed(seed)


def dense_gaussian(mean, std, num_tokens):
    """The formula as it stands: exp(-(k - mean)^2 / (2 std^2)) at k = 0..M, normalized, in float64, (..., M + 1)."""
    k = torch.arange(num_tokens + 1, dtype=torch.float64)
    return (-(k - mean.double()[..., None]) ** 2 / (2 * std.double()[..., None] ** 2)).softmax(-1)


def assert_same_distribution(draws, p):
    """Chi-square test of draws (n,) against p (K,); fails where five standard deviations off."""
    observed, expected = draws.bincount(minlength=len(p)).double(), p * len(draws)
    rare = expected < 10  # together one bin, as the test wants some draws in each
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 1e-3:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    chi2, free = ((observed - expected) ** 2 / expected).sum(), max(1, len(expected) - 1)
    assert chi2 < free + 5 * math.sqrt(2 * free) + 10, (chi2, observed, expected)


def skewed_counts(B, C, M, seed):
    """Counts as adversarial as data can be: all on one code, evenly spread, heavy on few codes."""
    tokens = torch.randint(C, (B, M), generator=generator(seed))
    tokens[0::3] = tokens[0::3, :1]
    tokens[1::3, : M // 2] = 0
    return fsdd.tokens_to_counts(tokens, C)


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
def test_noise(prior):
    """Broken: noise would not sum to M (Eq. 4), or would favour some codes."""
    counts = sample_noise(4000, 20, 8, prior, generator(0))
    assert (counts.sum(1) == 8).all() and counts.min() >= 0
    assert counts.max() == 1 if prior == "distinct" else counts.max() > 1
    assert (counts.double().mean(0) - 8 / 20).abs().max() < 0.06  # five standard deviations
    one = counts[:, 0]
    p = torch.tensor([math.comb(8, k) * 0.05 ** k * 0.95 ** (8 - k) for k in range(9)], dtype=torch.float64)
    assert_same_distribution(one, p if prior == "multinomial" else torch.tensor([0.6, 0.4], dtype=torch.float64))


def test_noise_refuses():
    """Broken: a misspelt prior, or more distinct codes than there are, would give some other noise."""
    with pytest.raises(ValueError, match="'multinomial' or 'distinct', got 'uniform'"):
        sample_noise(1, 4, 2, "uniform")
    with pytest.raises(ValueError, match="5 > 4"):
        sample_noise(1, 4, 5, "distinct")


# --- times -----------------------------------------------------------------------------------------------------------


def test_times():
    """Broken: training would look at other times than it says; with flips, X_t would not be as often noise as data."""
    uniform = torch.rand(100_000, generator=generator(25))
    assert torch.equal(fsdd.sample_times(uniform, "uniform"), 1 - uniform)
    t = fsdd.sample_times(uniform, "flips")
    assert 0 < t.min() < 0.08 and 0.92 < t.max() <= 1
    x0, x1 = torch.tensor([[1, 0]]).expand(len(t), 2), torch.tensor([[0, 1]]).expand(len(t), 2)
    x, _ = discrete_gaussian(t[:, None] * x1 + (1 - t[:, None]) * x0, torch.full((len(t), 2), 0.25), 1,
                             torch.rand(x0.shape))
    share = t.argsort().view(10, -1)  # ten parts of the training in the order of t: the share of flips rises evenly
    flipped = (x[:, 0] == 0).double()[share].mean(1)
    assert (flipped - torch.linspace(0.05, 0.95, 10)).abs().max() < 0.02
    with pytest.raises(ValueError, match="'uniform' or 'flips', got 'even'"):
        fsdd.sample_times(uniform, "even")


# --- forward process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C, M, prior", [(64, 32, "multinomial"), (8, 128, "multinomial"), (300, 40, "distinct"),
                                         (1, 5, "multinomial"), (5, 1, "distinct")])
def test_every_state_sums_to_M(C, M, prior):
    """Broken: the fixed-sum constraint (Eq. 3) in training."""
    x0, x1 = skewed_counts(60, C, M, 1), sample_noise(60, C, M, prior, generator(2))
    for t in (0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0):
        x = forward_process(x0, x1, torch.full((60,), t))
        assert x.dtype == torch.int64 and (x.sum(1) == M).all() and x.min() >= 0


def test_ends_are_exact():
    """Broken: t = 0 would not be the data, t = 1 not the noise."""
    x0, x1 = skewed_counts(30, 40, 16, 3), sample_noise(30, 40, 16, "multinomial", generator(4))
    assert torch.equal(forward_process(x0, x1, torch.zeros(30)), x0)
    assert torch.equal(forward_process(x0, x1, torch.ones(30)), x1)
    t = torch.tensor([0.0, 1.0, 0.5] * 10)  # also where the three stand in one batch
    x = forward_process(x0, x1, t)
    assert torch.equal(x[0::3], x0[0::3]) and torch.equal(x[1::3], x1[1::3])


def test_equal_ends_stay():
    """Broken: where X_1 = X_0 the std is 0 and X_t must be X_0, without a NaN on the way."""
    x0 = skewed_counts(30, 40, 16, 5)
    assert torch.equal(forward_process(x0, x0, torch.rand(30, generator=generator(6))), x0)
    x, log_prob = discrete_gaussian(x0.float(), torch.zeros(30, 40), 16, torch.rand(30, 40))
    assert torch.equal(x, x0) and (log_prob(x0) == 0).all() and (log_prob(x0 + 1) == -math.inf).all()


@pytest.mark.parametrize("x0, x1, t", [(0, 1, 0.2), (0, 1, 0.5), (3, 1, 0.7), (0, 9, 0.3), (32, 0, 0.5), (0, 32, 0.02),
                                       (31, 32, 0.9), (2, 10, 1.0), (5, 0, 1e-4)])
def test_forward_process_is_the_dense_formula(x0, x1, t):
    """Broken: X_t before adjusting would not follow Eq. 5-6 with the density at the integers 0..M."""
    M, n = 32, 200_000
    mean, std = torch.full((1, n), t * x1 + (1 - t) * x0), torch.full((1, n), abs(x1 - x0) / 4)
    x, log_prob = discrete_gaussian(mean, std, M, torch.rand(1, n, generator=generator(7)))
    p = dense_gaussian(mean[0, 0], std[0, 0], M)
    assert_same_distribution(x[0], p)
    ours = torch.stack([log_prob(torch.full((1, n), i))[0, 0] for i in range(M + 1)])
    k = torch.arange(M + 1, dtype=torch.float64)
    by_formula = (-((k - mean[0, 0].double()) / std[0, 0].double()) ** 2 / 2).log_softmax(0)
    assert torch.allclose(ours.double(), by_formula, atol=1e-3, rtol=1e-4)


def test_density_is_not_rounding():
    """Broken: the Gaussian would be rounded instead of taken at the integers. Mean .2, std .25: p(1) = .008 against
    .115."""
    n = 100_000
    x, _ = discrete_gaussian(torch.full((1, n), 0.2), torch.full((1, n), 0.25), 4,
                             torch.rand(1, n, generator=generator(8)))
    assert 0.006 < (x == 1).double().mean() < 0.010


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_over_all_counts():
    """Broken: at ImageNet's size the forward process would take B x C x (M + 1) numbers."""
    B, C, M = 4, 4096, 128
    x0, x1 = sample_noise(B, C, M, "multinomial", generator(9)), sample_noise(B, C, M, "multinomial", generator(10))
    with LargestTensor() as largest:
        forward_process(x0, x1, torch.rand(B))
    assert largest.elements < B * C * (M + 1) / 10


def test_forward_process_refuses_unequal_sums():
    """Broken: vectors of different sums would go through and come out with a sum that is neither."""
    with pytest.raises(ValueError, match="row 1 of x1 sums to 3, row 0 of x0 to 2"):
        forward_process(torch.tensor([[2, 0], [1, 1]]), torch.tensor([[1, 1], [1, 2]]), torch.rand(2))


# --- greedy adjusting ------------------------------------------------------------------------------------------------


def brute_force_adjust(x, log_p, M):
    """Algorithm 1 on one row, round after round, each round by trying every choice of codes."""
    x = x.clone()
    while x.sum() != M:
        delta = int(x.sum()) - M
        step = -1 if delta > 0 else 1
        codes = [j for j in range(len(x)) if 0 <= int(x[j]) + step <= M]
        gain = {j: (log_p[j, x[j] + step].exp() - log_p[j, x[j]].exp()).item() for j in codes}
        choices = itertools.combinations(codes, min(abs(delta), len(codes)))
        for j in max(choices, key=lambda choice: sum(gain[j] for j in choice)):
            x[j] += step
    return x


def test_greedy_choice_is_the_best_choice():
    """Broken: a round would not take the |delta| steps that Algorithm 1 ranks highest."""
    C, M, B = 5, 6, 300
    g = generator(11)
    log_p = torch.randn(B, C, M + 1, generator=g).double().mul(2).log_softmax(2)
    x = torch.randint(M + 1, (B, C), generator=g)
    x[::4] = torch.randint(2, (len(x[::4]), C), generator=g)  # sums below M too
    assert (x.sum(1) > M).any() and (x.sum(1) < M).any() and (x.sum(1) - M).abs().max() > C  # and more than one round
    ours = greedy_adjust(x, log_p, M)
    assert torch.equal(ours, torch.stack([brute_force_adjust(x[i], log_p[i], M) for i in range(B)]))


@pytest.mark.parametrize("C, M", [(6, 4), (64, 32), (3, 50), (1, 7), (200, 5)])
@pytest.mark.parametrize("scores", ["random", "equal", "-inf", "nan", "inf", "spikes"])
def test_any_input_comes_out_right(C, M, scores):
    """Broken: some input or some score would leave a row with a wrong sum or a negative count, or never end."""
    g = generator(12)
    rows = [torch.zeros(C), torch.full((C,), M), torch.full((C,), 10 * M), torch.full((C,), -5), torch.ones(C),
            torch.eye(C)[0] * M, torch.eye(C)[-1] * M * 100, torch.eye(C)[0] * (M - 1), torch.eye(C)[0] * M + 1]
    x = torch.stack(rows + list(torch.randint(-3, 3 * M, (20, C), generator=g))).long()
    shape = (len(x), C, M + 1)
    log_p = {"random": torch.randn(shape, generator=g).log_softmax(2), "equal": torch.zeros(shape),
             "-inf": torch.full(shape, -math.inf), "nan": torch.full(shape, math.nan),
             "inf": torch.full(shape, math.inf),
             "spikes": torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, -math.inf)}[scores]
    out = greedy_adjust(x, log_p, M)
    assert out.dtype == torch.int64 and (out.sum(1) == M).all() and out.min() >= 0 and out.max() <= M
    right = (x.sum(1) == M) & (x.min(1).values >= 0)
    assert torch.equal(out[right], x[right])  # what is right already stays


def test_function_and_table_agree():
    """Broken: the same probabilities, handed in as a function or as a tensor, would adjust differently."""
    C, M = 10, 8
    g = generator(13)
    table = torch.randn(40, C, M + 1, generator=g).log_softmax(2)
    x = torch.randint(4, (40, C), generator=g)
    by_function = greedy_adjust(x, lambda k: table.gather(2, k[..., None])[..., 0], M)
    assert torch.equal(by_function, greedy_adjust(x, table, M))


def test_ties_go_to_the_likelier_code():
    """Broken: once the Gaussian is a spike, codes would be adjusted by their index and not by how near the mean is."""
    mean, std = torch.tensor([[2.01, 2.4, 2.3, 0.0]]), torch.full((1, 4), 1e-3)
    x, log_prob = discrete_gaussian(mean, std, 8, torch.rand(1, 4))
    assert x.tolist() == [[2, 2, 2, 0]]
    assert greedy_adjust(x, log_prob, 7).tolist() == [[2, 3, 2, 0]]
    assert greedy_adjust(x, log_prob, 8).tolist() == [[2, 3, 3, 0]]


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_draw_follows_p():
    """Broken: draws would not follow the probabilities."""
    p = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    draws = draw(p.float().expand(100_000, 4), torch.rand(100_000, generator=generator(14)))
    assert_same_distribution(draws, p)


@pytest.mark.parametrize("top_p, top_k, kept",
                         [(0.45, 0, [0]), (0.875, 0, [0, 3, 2]), (0.86, 0, [0, 3]), (1.0, 2, [0, 3]),
                                                (0.0, 0, [0]), (1.0, 1, [0]), (1.0, 0, [0, 2, 3]), (1.0, 9, [0, 2, 3])])
def test_top_p_and_top_k(top_p, top_k, kept):
    """Broken: top-p would not be the smallest set of counts whose probability exceeds p, or would be empty."""
    p = torch.tensor([0.5, 0.0, 0.125, 0.375])
    draws = draw(p.double().expand(50_000, 4), torch.rand(50_000, generator=generator(15)), top_p, top_k)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = p.double()[kept] / p.double()[kept].sum()
    assert_same_distribution(draws, expected)


# --- denoiser and loss -----------------------------------------------------------------------------------------------


def small_denoiser(C=12, M=6, random=True, seed=16, **options):
    """A denoiser of 12 codes, 6 tokens, 3 classes; with random weights, as fresh ones answer the same to everything."""
    torch.manual_seed(seed)
    denoiser = Denoiser(C, M, 3, width=32, layers=2, heads=2, **options)
    if random:
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return denoiser


def test_loss_starts_at_log_M_plus_1():
    """Broken: DiT's initial values; all M + 1 counts must be equally likely at the start."""
    x0, x1 = skewed_counts(20, 12, 6, 17), sample_noise(20, 12, 6, "multinomial")
    loss = fsdd.fsdd_loss(small_denoiser(random=False), x0, torch.randint(4, (20,)), torch.rand(20), x1)
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_loss_is_the_mean_cross_entropy():
    """Broken: the loss would not be -log p(X_0), mean over codes and vectors, at the X_t of the given noise."""
    denoiser = small_denoiser()
    x0, x1, t = skewed_counts(20, 12, 6, 18), sample_noise(20, 12, 6, "multinomial"), torch.rand(20)
    uniform, labels = torch.rand(20, 12), torch.randint(4, (20,))
    p = denoiser(forward_process(x0, x1, t, uniform), t, labels).softmax(2)
    by_hand = -sum(p[b, j, x0[b, j]].log() for b in range(20) for j in range(12)) / 240
    assert fsdd.fsdd_loss(denoiser, x0, labels, t, x1, uniform).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_denoiser_uses_all_it_is_told():
    """Broken: the denoiser would be blind to the counts, to which code they belong to, to the time or to the class."""
    denoiser = small_denoiser()
    x, t, labels = skewed_counts(5, 12, 6, 19), torch.rand(5), torch.randint(3, (5,))
    base = denoiser(x, t, labels)
    assert base.shape == (5, 12, 7)
    assert not torch.allclose(base, denoiser(x.flip(1), t, labels).flip(1), atol=1e-3)
    assert not torch.allclose(base, denoiser(x, 1 - t, labels), atol=1e-3)
    assert not torch.allclose(base, denoiser(x, t, labels + 1), atol=1e-3)
    one = x.clone()
    one[0, 0] += 1
    changed = (denoiser(one, t, labels) - base).abs().amax(2) > 1e-6
    assert changed[0].all() and not changed[1:].any()  # attention reaches every code of that vector and of no other


@pytest.mark.parametrize("C, M", [(12, 6), (5, 40), (300, 32), (1, 3)])
def test_sparse_attends_to_the_tokens(C, M):
    """Broken: a code would not attend to the tokens of X_t, each as often as it occurs, with the dense one's weights.
    Attending to all codes with log X_t added to their scores is the same, as exp(score + log k) = k exp(score)."""
    sparse, dense = (small_denoiser(C, M, sparse=kind).double() for kind in (True, False))
    x, t, labels = skewed_counts(9, C, M, 40), torch.rand(9), torch.randint(3, (9,))
    for block in dense.blocks:
        block.attention.attend = lambda q, k, v, fused: (
            q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + x.double().log()[:, None, None]).softmax(-1) @ v
    dense.time_mlp.register_forward_pre_hook(lambda module, args: args[0].double())
    sparse.time_mlp.register_forward_pre_hook(lambda module, args: args[0].double())
    torch.testing.assert_close(sparse(x, t, labels), dense(x, t, labels), rtol=1e-9, atol=1e-9)
    if C > 1:  # what stands at an absent code reaches no other
        base, absent = sparse(x, t, labels), int((x[0] == 0).nonzero()[0])
        with torch.no_grad():
            sparse.code_embedding[0, absent, 0] += 1
        changed = (sparse(x, t, labels) - base).abs().amax(2)[0] > 1e-9
        assert changed.nonzero().flatten().tolist() == [absent]


def test_sparse_computes_any_codes():
    """Broken: training would see other logits than sampling, when it computes those of some codes alone."""
    denoiser = small_denoiser(30, 6, sparse=True)
    x, t, labels = skewed_counts(9, 30, 6, 41), torch.rand(9), torch.randint(3, (9,))
    codes = (torch.rand(x.shape, generator=generator(42)) + (x > 0)).topk(12, dim=1).indices
    expected = denoiser(x, t, labels).gather(1, codes[:, :, None].expand(-1, -1, 7))
    torch.testing.assert_close(denoiser(x, t, labels, codes), expected, rtol=1e-4, atol=1e-5)


def test_loss_of_some_codes_estimates_that_of_all():
    """Broken: training on some of the codes would minimize something else than the mean over all."""
    denoiser = small_denoiser(40, 6, sparse=True)
    x0, x1, t = skewed_counts(8, 40, 6, 43), sample_noise(8, 40, 6, "multinomial"), torch.rand(8)
    uniform, labels = torch.rand(8, 40), torch.randint(4, (8,))
    x0[0], x1[0], t[0] = torch.arange(40) < 6, torch.arange(40) >= 34, 1.0  # X_t and X_0 hold 2 M codes
    with torch.no_grad():
        full = fsdd.fsdd_loss(denoiser, x0, labels, t, x1, uniform)
        some = torch.stack([fsdd.fsdd_loss(denoiser, x0, labels, t, x1, uniform, 14,
                                           torch.rand(8, 40, generator=generator(i))) for i in range(400)])
        every = fsdd.fsdd_loss(denoiser, x0, labels, t, x1, uniform, 40, torch.rand(8, 40))
    assert every.item() == pytest.approx(full.item(), rel=1e-5)
    assert some.std() > 0.001 and abs(some.mean() - full) < 5 * some.std() / 20
    with pytest.raises(ValueError, match="more than 2 M = 12, got 12"):  # then no other code would be among them
        fsdd.fsdd_loss(denoiser, x0, labels, t, x1, uniform, 12, torch.rand(8, 40))


@pytest.mark.parametrize("recompute", [False, True])
def test_sparse_compiled_or_recomputed_is_the_same(recompute):
    """Broken: torch.compile or activation checkpointing would train another sparse denoiser."""
    x0, x1, t = skewed_counts(8, 40, 6, 44), sample_noise(8, 40, 6, "multinomial"), torch.rand(8)
    uniform, order, labels = torch.rand(8, 40), torch.rand(8, 40), torch.randint(4, (8,))
    gradients = []
    for changed in (False, True):
        denoiser = small_denoiser(40, 6, sparse=True)
        denoiser.recompute = changed and recompute
        model = torch.compile(denoiser, backend="aot_eager") if changed else denoiser
        fsdd.fsdd_loss(model, x0, labels, t, x1, uniform, 18, order).backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    for plain, other in zip(*gradients):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("C, code_dim", [(96, 3), (40, 12), (7, 2)])
def test_start_from_codebook(C, code_dim):
    """Broken: codes that are alike would not start with embeddings that are alike."""
    torch.manual_seed(21)
    denoiser = Denoiser(C, 4, 3, width=4096, layers=1, heads=1)
    codes = torch.nn.functional.normalize(torch.randn(C, code_dim), dim=1)
    denoiser.start_from_codebook(codes)
    embedding = denoiser.code_embedding[0].double()
    products = embedding @ embedding.t() / (4096 / 2 * 0.3 ** 2)
    expected = (-2 * torch.cdist(codes, codes) ** 2).exp()
    assert (products - expected).abs().max() < 0.1 and denoiser.code_embedding.requires_grad


def test_time_features():
    """Broken: the denoiser is told s = 1 - t by cosines first, then sines, at frequencies from 1 down to 1 / 10000."""
    features = fsdd.time_features(torch.tensor([0.0, 1.0]))
    assert features.shape == (2, 256)
    assert (features[0, :128] == 1).all() and (features[0, 128:] == 0).all()
    assert features[1, 0].item() == pytest.approx(math.cos(1)) and features[1, 128].item() == pytest.approx(math.sin(1))
    assert features[1, 129].item() == pytest.approx(math.sin(10000 ** (-1 / 128)))


@pytest.mark.parametrize("width, layers, heads, released", [(384, 12, 6, 36.0), (768, 12, 12, 136.7)])
def test_size_of_the_papers_models(width, layers, heads, released):
    """Broken: S and B would not be the paper's. The release's count embedding has C + 1 rows, ours the M + 1 that are
    used."""
    with torch.device("meta"):
        denoiser = Denoiser(4096, 128, 1000, width, layers, heads)
    ours = sum(p.numel() for p in denoiser.parameters())
    assert round((ours + (4097 - 129) * width) / 1e6, 1) == released


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["paper", "exchange"])
@pytest.mark.parametrize("settings", [{}, {"prior": "distinct"}, {"top_k": 2, "top_p": 1.0}, {"steps": 1}, {"steps": 2},
                                      {"top_p": 1.0, "guidance": (1.0, 1.0, 1.0)}, {"guidance": 3, "steps": 100}])
def test_every_step_of_generation_sums_to_M(settings, sampler):
    """Broken: the fixed-sum constraint in generation."""
    states = list(fsdd.refine(small_denoiser(), torch.arange(30) % 3, sampler=sampler, generator=generator(20),
                              **settings))
    assert len(states) == settings.get("steps", 25) + 1
    for x in states:
        assert x.dtype == torch.int64 and (x.sum(1) == 6).all() and x.min() >= 0


class Oracle(torch.nn.Module):
    """A denoiser that knows X_0."""
    num_classes = 3

    def __init__(self, x0):
        super().__init__()
        self.x0, self.codebook_size, self.num_tokens = x0, x0.shape[1], int(x0[0].sum())

    def forward(self, x_t, t, labels):
        x0 = self.x0.repeat(len(x_t) // len(self.x0), 1)
        return torch.nn.functional.one_hot(x0, self.num_tokens + 1) * 50.0


@pytest.mark.parametrize("sampler", ["paper", "exchange"])
@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_generation_ends_at_what_the_denoiser_knows(steps, prior, sampler):
    """Broken: Eq. 8-10 would not lead from noise to X_0 even with a perfect denoiser."""
    x0 = skewed_counts(30, 20, 16, 21)
    *_, end = fsdd.refine(Oracle(x0), torch.zeros(30, dtype=torch.int64), prior, sampler, steps,
                          generator=generator(22))
    assert torch.equal(end, x0)


def test_steps_follow_equation_10(monkeypatch):
    """Broken: mean and std of a step must be those of the noise end that X_t and x_0 imply, std cut by f."""
    x0, seen = skewed_counts(30, 20, 16, 23).double(), []
    real = fsdd.discrete_gaussian
    monkeypatch.setattr(fsdd, "discrete_gaussian", 
                        lambda mean, std, *rest: seen.append((mean, std)) or real(mean, std, *rest))
    states = list(fsdd.refine(Oracle(x0.long()), torch.zeros(30, dtype=torch.int64), generator=generator(24)))
    for step, (mean, std) in enumerate(seen):
        s, s_next = step / 25, (step + 1) / 25
        x1 = (states[step] - s * x0) / (1 - s)
        assert torch.allclose(mean.double(), s_next * x0 + (1 - s_next) * x1, atol=1e-4)
        f = torch.sigmoid(torch.tensor(-100 * (s_next - 0.8), dtype=torch.float64))
        assert torch.allclose(std.double(), (x1 - x0).abs() / 4 * f, atol=1e-4)


def test_guidance_of_weight_one_is_the_plain_model():
    """Broken: p_null + 1 (p_class - p_null) must be p_class, and then the null class must not matter at all."""
    denoiser, x, labels = small_denoiser(), skewed_counts(9, 12, 6, 26), torch.arange(9) % 3
    plain = denoiser(x, torch.full((9,), 0.3), labels).softmax(2)
    assert torch.equal(fsdd.guided_probabilities(denoiser, x, 0.3, labels, 1), plain)
    assert torch.allclose(fsdd.guided_probabilities(denoiser, x, 0.3, labels, 1 + 1e-6), plain, atol=1e-5)
    before = fsdd.generate(denoiser, labels, guidance=(1, 1, 1), generator=generator(27))
    with torch.no_grad():
        denoiser.class_embedding.weight[3] += 1
    assert torch.equal(before, fsdd.generate(denoiser, labels, guidance=(1, 1, 1), generator=generator(27)))


@pytest.mark.parametrize("weight", [0, 3, 50])
def test_guidance_acts_on_probabilities(weight):
    """Broken: guidance must be clamp(p_null + w (p_class - p_null), min 0), normalized."""
    denoiser, x, labels = small_denoiser(), skewed_counts(9, 12, 6, 28), torch.arange(9) % 3
    t = torch.full((9,), 0.7)
    p_class, p_null = (denoiser(x, t, y).softmax(2) for y in (labels, torch.full((9,), 3)))
    by_hand = (p_null + weight * (p_class - p_null)).clamp(min=0)
    ours = fsdd.guided_probabilities(denoiser, x, 0.7, labels, weight)
    assert torch.allclose(ours, by_hand / by_hand.sum(2, keepdim=True), atol=1e-5)


def test_guidance_by_thirds(monkeypatch):
    """Broken: the three weights must each hold for a third of the time s from 0 to 1."""
    seen = []
    real = fsdd.guided_probabilities
    monkeypatch.setattr(fsdd, "guided_probabilities", 
                        lambda d, x, t, y, w: seen.append((1 - t, w)) or real(d, x, t, y, w))
    fsdd.generate(small_denoiser(), torch.zeros(2, dtype=torch.int64), guidance=(4, 50, 55))
    assert [w for _, w in seen] == [4] * 9 + [50] * 8 + [55] * 8
    assert all((s < 1 / 3) == (w == 4) and (s >= 2 / 3) == (w == 55) for s, w in seen)
    for steps in range(1, 200):  # rounding must not move a step to the third before
        assert [fsdd.guidance_weight((0, 1, 2), 1 - step / steps) for step in range(steps)] == [
            3 * step // steps for step in range(steps)]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_guidance_by_flips(steps):
    """Broken: of two weights, the first would not hold at noise, or the second not where all flips have happened; or
    another number of steps would give another weight at the same time."""
    weights = [fsdd.guidance_weight((2, 6), 1 - step / steps) for step in range(steps)]
    assert weights == sorted(weights) and weights[0] == pytest.approx(2, abs=0.01)
    for step, weight in enumerate(weights):
        t = 1 - step / steps
        assert weight == pytest.approx(6 - 4 / (1 + math.exp(-8 * (2 * t - 1))))
    assert fsdd.guidance_weight((2, 6), 0.5) == pytest.approx(4)  # half of them have


@pytest.mark.parametrize("steps", [1, 2, 6, 12, 100, 1000])
def test_time_grid(steps):
    """Broken: generation would not begin at noise and end at data, or go back in time; or the paper's sampler would not
    take uniform steps, or exchange not spend more of them where more flips are left to happen."""
    uniform, ours = fsdd.time_grid(steps, "paper"), fsdd.time_grid(steps, "exchange")
    assert uniform == [1 - step / steps for step in range(steps + 1)]
    assert len(ours) == steps + 1 and ours[0] == 1 and ours[-1] == 0
    assert all(s < t for t, s in zip(ours, ours[1:])) and ours == pytest.approx([1 - t for t in reversed(ours)])
    for u, t in zip(uniform[1:-1], ours[1:-1]):  # the other half of t is the quantile of the flips
        assert 1 / (1 + math.exp(-8 * (2 * (2 * t - u) - 1))) == pytest.approx(u)
    assert sum(0.25 < t < 0.75 for t in ours) >= sum(0.25 < t < 0.75 for t in uniform)


def test_generation_depends_on_the_generator_alone():
    """Broken: the same seed would not give the same images."""
    denoiser, labels = small_denoiser(), torch.arange(9) % 3
    for sampler in ("paper", "exchange"):
        first, again, other = (fsdd.generate(denoiser, labels, sampler=sampler, generator=generator(seed))
                               for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_unknown_sampler_is_refused():
    """Broken: a misspelt sampler would quietly be another one."""
    with pytest.raises(ValueError, match="'paper' or 'exchange', got 'exchang'"):
        fsdd.generate(small_denoiser(), torch.zeros(1, dtype=torch.int64), sampler="exchang")


# --- the exchange sampler --------------------------------------------------------------------------------------------


def marginal(t, a, C, M, prior):
    """p(X_t = k | x_0 = a) of one code, before adjusting, (M + 1,), by the dense formula."""
    p = torch.zeros(M + 1, dtype=torch.float64)
    for b, p_b in zip(*fsdd.noise_of_a_code(C, M, prior)):
        end = a if t == 0 else int(b)
        still = t in (0, 1) or int(b) == a
        mean, std = torch.tensor(t * float(b) + (1 - t) * a), torch.tensor(abs(float(b) - a) / 4)
        p += p_b * (torch.eye(M + 1, dtype=torch.float64)[end] if still else dense_gaussian(mean, std, M))
    return p


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
def test_noise_of_a_code(prior):
    """Broken: the posterior would be that of another noise than sample_noise() draws."""
    b, p = fsdd.noise_of_a_code(20, 8, prior)
    counts = sample_noise(50_000, 20, 8, prior, generator(30))[:, 3]
    expected = torch.zeros(9, dtype=torch.float64).index_put((b,), p)
    assert expected.sum() == pytest.approx(1, abs=1e-9)
    assert_same_distribution(counts, expected)


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
@pytest.mark.parametrize("t, s", [(1.0, 0.9), (1.0, 0.0), (0.8, 0.5), (0.52, 0.48), (0.3, 0.05), (0.04, 0.0)])
def test_posterior_leads_from_marginal_to_marginal(t, s, prior):
    """Broken: the steps of Eq. 8 would not follow the forward process: sum over k of q(X_s | X_t = k, x_0) q(X_t = k |
    x_0) must be q(X_s | x_0)."""
    C, M = 10, 6
    b, p_b = fsdd.noise_of_a_code(C, M, prior)
    F_t, F_s = fsdd.distribution_function(t, b, M), fsdd.distribution_function(s, b, M)
    tables = torch.stack([fsdd.posterior(k, F_t, F_s, p_b) for k in range(M + 1)])  # (k, a, j)
    assert torch.allclose(tables.sum(2), torch.ones(M + 1, M + 1, dtype=torch.float64))
    for a in range(M + 1):
        assert torch.allclose(marginal(t, a, C, M, prior) @ tables[:, a], marginal(s, a, C, M, prior), atol=1e-6)
    if s == 0:
        assert torch.allclose(tables, torch.eye(M + 1, dtype=torch.float64).expand_as(tables))  # X_0 is x_0
    stays = tables[1, 1, 1]
    assert stays > 0.5 or s < t - 0.2  # and a small step moves little


@pytest.mark.parametrize("C, M", [(6, 4), (64, 32), (3, 50), (1, 7), (200, 5)])
@pytest.mark.parametrize("kind", ["random", "spikes", "all go up", "all go down", "far"])
def test_exchange_keeps_the_sum(C, M, kind):
    """Broken: some distribution would leave a row with a wrong sum or a negative count, or never end."""
    g = generator(31)
    x = sample_noise(40, C, M, "multinomial", g)
    shape = (40, C, M + 1)
    q = {"random": torch.rand(shape, generator=g), "spikes": (torch.rand(shape, generator=g) < 0.1).float() + 1e-30,
         "all go up": torch.nn.functional.one_hot((x + 1).clamp(max=M), M + 1).float(),
         "all go down": torch.nn.functional.one_hot((x - 1).clamp(min=0), M + 1).float(),
         "far": torch.nn.functional.one_hot(M - x, M + 1).float()}[kind]
    out = fsdd.exchange(x, q / q.sum(2, keepdim=True), g)
    assert out.dtype == torch.int64 and (out.sum(1) == M).all() and out.min() >= 0 and out.max() <= M


def test_exchange_moves_as_many_tokens_as_independent_codes():
    """Broken: small steps would freeze, as they do by Algorithm 1, or run away; or likely moves would take all."""
    n, C, M = 20_000, 40, 20
    x = torch.cat([torch.ones(n, M), torch.zeros(n, C - M)], dim=1).long()
    rate = torch.linspace(0.002, 0.02, M).repeat(2)  # of going down where x is 1, of going up where it is 0
    q = torch.zeros(n, C, 3)
    q.scatter_(2, x[:, :, None], (1 - rate).expand(n, -1)[:, :, None])
    q.scatter_(2, 1 - x[:, :, None], rate.expand(n, -1)[:, :, None])
    moved = (fsdd.exchange(x, q, generator(32)) != x).double().mean(0)  # (C,), about rate
    assert moved.sum() / rate.sum() == pytest.approx(1, abs=0.03)
    assert ((moved / rate.double() - 1).abs() < 0.3).all()
    u = torch.rand(n, C, generator=generator(33))
    frozen = (greedy_adjust(draw(q, u), q.log(), M) != x).double().mean(0)
    assert frozen.sum() / rate.sum() < 0.4


def test_exchange_is_cheap_at_full_size():
    """Broken: at C = 4096, M = 128 a step outside the denoiser would take more time than the paper's sampler does, or a
    table of all counts a code."""
    B, C, M = 4, 4096, 128
    logits = torch.full((B, C, M + 1), -20.0)
    logits[:, :, :4] = torch.tensor([0.0, -3.0, -5.0, -9.0])
    p, x = logits.softmax(2), sample_noise(B, C, M, "distinct", generator(34))

    def seconds(step):
        times = []
        for _ in range(4):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        return min(times)

    ours = lambda: fsdd.exchange_step(x, p, 0.6, 0.5, "distinct", 1.0, 0, generator(35))  # noqa: E731
    assert seconds(ours) < seconds(lambda: fsdd.paper_step(x, p, 0.6, 0.5, 0.8, 0, generator(35)))
    with LargestTensor() as largest:
        ours()
    assert largest.elements < B * C * (M + 1) / 10


# --- a world in which the answer is known ----------------------------------------------------------------------------


class World:
    """Count vectors over C codes that sum to M, some of them the data, and a denoiser that is exact.

    q(X_t | x_0) is tabulated over all states by the forward process as it stands, adjusting included, and p(x_0 | X_t)
    follows by Bayes's rule. So what generation gets wrong is the sampler's alone.
    """

    num_classes = 1

    def __init__(self, C, M, images, prior, draws=4000):
        self.codebook_size, self.num_tokens, self.prior, self.draws = C, M, prior, draws
        self.states = torch.tensor([x for x in itertools.product(range(M + 1), repeat=C) if sum(x) == M])  # (S, C)
        self.place = (M + 1) ** torch.arange(C)
        self.index = torch.zeros((M + 1) ** C, dtype=torch.int64).index_put((self.states @ self.place,),
                                                                            torch.arange(len(self.states)))
        self.data = self.states[torch.randperm(len(self.states), generator=generator(40))[:images]]
        self.weights = torch.rand(images, generator=generator(41), dtype=torch.float64) + 0.2
        self.weights /= self.weights.sum()
        self.tables = {}

    def find(self, x):
        """(n, C) -> the numbers (n,) of the states."""
        return self.index[x @ self.place]

    def table(self, t):
        """q(X_t = state | x_0 = image), (images, S)."""
        if t not in self.tables:
            n, g = len(self.data) * self.draws, generator(42)
            x1 = sample_noise(n, self.codebook_size, self.num_tokens, self.prior, g)
            uniform = torch.rand(x1.shape, generator=g)
            x = forward_process(self.data.repeat_interleave(self.draws, 0), x1, torch.full((n,), t), uniform)
            found = self.find(x).view(len(self.data), self.draws)
            self.tables[t] = torch.stack([row.bincount(minlength=len(self.states))
                                          for row in found]).double() / self.draws
        return self.tables[t]

    def __call__(self, x, t, labels):
        known = (self.table(t[0].item())[:, self.find(x)] + 1e-9) * self.weights[:, None]  # (images, n)
        one_hot = torch.nn.functional.one_hot(self.data, self.num_tokens + 1).double()
        return torch.einsum("in,icm->ncm", known / known.sum(0), one_hot).clamp(min=1e-12).log().float()

    def distance(self, x):
        """Total variation between samples (n, C) and the data."""
        truth = torch.zeros(len(self.states), dtype=torch.float64).index_put((self.find(self.data),), self.weights)
        return (self.find(x).bincount(minlength=len(truth)) / len(x) - truth).abs().sum().item() / 2

    def distance_of_samples(self, sampler, steps, number=4000):
        """Total variation between samples and the data."""
        return self.distance(fsdd.generate(self, torch.zeros(number, dtype=torch.int64), prior=self.prior,
                                           sampler=sampler,
                                           steps=steps, guidance=1.0, top_p=1.0, generator=generator(43)))


@pytest.mark.parametrize("C, M, images, prior",
                         [(6, 4, 4, "multinomial"), (6, 4, 4, "distinct"), (8, 3, 5, "multinomial")])
def test_exchange_samples_the_data(C, M, images, prior, monkeypatch):
    """Broken: more steps of the exchange sampler would not come closer to the data, or not as close as the draws' own
    noise; or the paper's sampler, the exact posterior with Algorithm 1, or, in few steps, exchange at uniform times
    would do as well. Prints all distances."""
    world = World(C, M, images, prior)
    draws = torch.multinomial(world.weights, 4000, replacement=True, generator=generator(44))
    noise = world.distance(world.data[draws])
    distances = lambda sampler: {steps: world.distance_of_samples(sampler, steps)  # noqa: E731
                                 for steps in (5, 25, 100)}
    ours, papers = distances("exchange"), distances("paper")
    monkeypatch.setattr(fsdd, "time_grid", lambda steps, sampler: [1 - i / steps for i in range(steps + 1)])
    uniform = distances("exchange")
    monkeypatch.setattr(fsdd, "exchange", lambda x, q, generator: greedy_adjust(
        draw(q, torch.rand(x.shape, generator=generator)), q.log(), M))
    frozen = distances("exchange")
    print(f"C = {C}, M = {M}, {prior}, steps {tuple(ours)}: draws of the data {noise:.3f}", *(
        f"{name} {', '.join(f'{tv:.3f}' for tv in found.values())}" for name, found in (
            ("paper", papers), ("exact posterior and Algorithm 1", frozen), ("exchange at uniform times", uniform),
            ("exchange", ours))), sep="; ")
    assert ours[5] > ours[25] > ours[100] - 0.01
    assert max(ours[25], ours[100]) < noise + 0.06
    assert all(ours[steps] < min(papers[steps], frozen[steps]) for steps in (25, 100))
    assert frozen[100] > frozen[25] + 0.02  # a finer chain freezes
    assert ours[5] < uniform[5]
