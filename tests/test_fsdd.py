"""Fixed-Sum Discrete Diffusion: every state sums to M, and every distribution is the paper's (Sec. 3.3)."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fsdd
from fsdd import Denoiser, discrete_gaussian, forward_process, greedy_adjust, sample_categorical, sample_noise


def generator(seed):
    return torch.Generator().manual_seed(seed)


def dense_gaussian(mean, std, num_tokens):
    """The formula itself: log of exp(-(k - mean)^2 / (2 std^2)), k = 0..M, normalized, in float64, (..., M + 1)."""
    k = torch.arange(num_tokens + 1, dtype=torch.float64)
    return (-(k - mean.double()[..., None]) ** 2 / (2 * std.double()[..., None] ** 2)).log_softmax(-1)


def assert_same_distribution(draws, p):
    """Chi-square test of draws (n,) against p (K,); fails if they are five standard deviations off."""
    observed, expected = draws.bincount(minlength=len(p)).double(), p * len(draws)
    rare = expected < 10  # merged into one bin, as the test needs some draws in each
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 1e-3:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    chi2, degrees = ((observed - expected) ** 2 / expected).sum(), max(1, len(expected) - 1)
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees) + 10, (chi2, observed, expected)


def skewed_counts(B, C, M, seed):
    """Counts as adversarial as data can be: all on one code, evenly spread, heavy on a few codes."""
    tokens = torch.randint(C, (B, M), generator=generator(seed))
    tokens[0::3] = tokens[0::3, :1]
    tokens[1::3, : M // 2] = 0
    return fsdd.tokens_to_counts(tokens, C)


def small_denoiser(C=12, M=6, model_class=Denoiser):
    """A denoiser of 12 codes, 6 tokens, 3 classes, with random weights, as a new one has the same output for all
    inputs."""
    torch.manual_seed(16)
    denoiser = model_class(C, M, 3, width=32, layers=2, heads=2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser


def random_batch(B, C, M, seed):
    """What the loss of a denoiser with 3 classes takes, see train_fsdd.Batch."""
    g = generator(seed)
    x0, x1, t = skewed_counts(B, C, M, seed), sample_noise(B, C, M, "multinomial", g), 1 - torch.rand(B, generator=g)
    return SimpleNamespace(x0=x0, x_t=forward_process(x0, x1, t, torch.rand(B, C, generator=g)), t=t,
                           labels=torch.randint(4, (B,), generator=g), u_codes=torch.rand(B, C, generator=g))


def look_up(log_p):
    """A table of log-probabilities (B, C, M + 1) as the function that greedy_adjust() takes."""
    return lambda k: log_p.gather(2, k[:, :, None])[:, :, 0]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
def test_noise_is_uniform_and_sums_to_M(prior):
    """Fails if noise does not sum to M (Eq. 4), or favours some codes."""
    counts = sample_noise(4000, 20, 8, prior, generator(0))
    assert (counts.sum(1) == 8).all() and counts.min() >= 0
    assert counts.max() == 1 if prior == "distinct" else counts.max() > 1
    assert (counts.double().mean(0) - 8 / 20).abs().max() < 0.06  # five standard deviations
    binomial = [math.comb(8, k) * 0.05 ** k * 0.95 ** (8 - k) for k in range(9)]
    p = torch.tensor(binomial if prior == "multinomial" else [0.6, 0.4], dtype=torch.float64)
    assert_same_distribution(counts[:, 0], p)


@pytest.mark.parametrize("wrong, error, words", [
    (lambda: sample_noise(1, 4, 2, "uniform"), ValueError, "'multinomial' or 'distinct', got 'uniform'"),
    (lambda: sample_noise(1, 4, 5, "distinct"), ValueError, "5 > 4"),
    (lambda: forward_process(torch.tensor([[2, 0]]), torch.tensor([[1, 2]]), torch.rand(1)), ValueError,
     r"same sum M, got .2, 3."),
    (lambda: fsdd.sampling_times(4, "late"), KeyError, "'late'"),
])
def test_bad_input_is_refused(wrong, error, words):
    """Fails if a misspelt word, vectors of different sums, or more tokens than codes where M <= C give some result."""
    with pytest.raises(error, match=words):
        wrong()


# --- forward process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C, M, prior", [(64, 32, "multinomial"), (8, 128, "multinomial"), (300, 40, "distinct"),
                                         (1, 5, "multinomial"), (5, 1, "distinct")])
def test_every_state_sums_to_M(C, M, prior):
    """Fails if a state in training does not sum to M (Eq. 3)."""
    x0, x1 = skewed_counts(60, C, M, 1), sample_noise(60, C, M, prior, generator(2))
    for t in (0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0):
        x = forward_process(x0, x1, torch.full((60,), t))
        assert x.dtype == torch.int64 and (x.sum(1) == M).all() and x.min() >= 0


def test_the_ends_are_data_and_noise():
    """Fails if t = 0 does not give the data, or t = 1 the noise."""
    x0, x1 = skewed_counts(30, 40, 16, 3), sample_noise(30, 40, 16, "multinomial", generator(4))
    x = forward_process(x0, x1, torch.tensor([0.0, 1.0, 0.5] * 10))
    assert torch.equal(x[0::3], x0[0::3]) and torch.equal(x[1::3], x1[1::3])
    assert (x[2::3] != x0[2::3]).any() and (x[2::3] != x1[2::3]).any()


def test_equal_counts_stay():
    """Fails if a code with X_1 = X_0, whose std is 0, does not keep its count, or gives NaN on the way."""
    x0 = skewed_counts(30, 40, 16, 5)
    x, log_prob = discrete_gaussian(x0.float(), torch.zeros(30, 40), 16, torch.rand(30, 40))
    assert torch.equal(x, x0) and (log_prob(x0) == 0).all() and (log_prob(x0 + 1) == -math.inf).all()
    x0, x1 = (sample_noise(200, 64, 32, "multinomial", generator(seed)) for seed in (5, 6))
    x = forward_process(x0, x1, torch.rand(200))  # many other codes can take the steps of adjusting
    assert torch.equal(x[x0 == x1], x0[x0 == x1]) and not torch.equal(x, x0)


@pytest.mark.parametrize("x0, x1, t", [(0, 1, 0.2), (0, 1, 0.5), (3, 1, 0.7), (0, 9, 0.3), (32, 0, 0.5), (0, 32, 0.02),
                                       (31, 32, 0.9), (2, 10, 1.0), (5, 0, 1e-4)])
def test_the_discrete_gaussian_is_the_dense_formula(x0, x1, t):
    """Fails if X_t before adjusting does not follow Eq. 5-6. A rounded Gaussian does not, for example."""
    M, n = 32, 50_000
    mean, std = torch.full((1, n), t * x1 + (1 - t) * x0), torch.full((1, n), abs(x1 - x0) / 4)
    x, log_prob = discrete_gaussian(mean, std, M, torch.rand(1, n, generator=generator(7)))
    log_p = dense_gaussian(mean[0, 0], std[0, 0], M)
    assert_same_distribution(x[0], log_p.exp())
    ours = torch.stack([log_prob(torch.full((1, n), i))[0, 0] for i in range(M + 1)])
    assert torch.allclose(ours.double(), log_p, atol=1e-3, rtol=1e-4)


@pytest.fixture
def gaussians(monkeypatch):
    """A list to which every later call of discrete_gaussian() appends its mean and std."""
    calls, real = [], fsdd.discrete_gaussian
    monkeypatch.setattr(fsdd, "discrete_gaussian",
                        lambda mean, std, *rest: calls.append((mean, std)) or real(mean, std, *rest))
    return calls


def test_the_forward_process_has_the_mean_and_std_of_equation_6(gaussians):
    """Fails if X_t follows another path from data to noise."""
    x0, x1, t = skewed_counts(30, 20, 16, 3), sample_noise(30, 20, 16, "multinomial"), torch.rand(30)
    forward_process(x0, x1, t)
    (mean, std), = gaussians
    assert torch.allclose(mean, t[:, None] * x1 + (1 - t[:, None]) * x0) and torch.equal(std, (x1 - x0).abs() / 4)


def test_no_tensor_over_all_counts():
    """Fails if the forward process at ImageNet's size takes B x C x (M + 1) numbers."""
    B, C, M = 4, 4096, 128
    x0, x1 = sample_noise(B, C, M, "multinomial", generator(9)), sample_noise(B, C, M, "multinomial", generator(10))
    with LargestTensor() as largest:
        forward_process(x0, x1, torch.rand(B))
    assert largest.elements < B * C * (M + 1) / 10


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


def test_greedy_adjusting_makes_the_best_choice():
    """Fails if a round does not take the |delta| steps that Algorithm 1 ranks highest."""
    C, M, B = 5, 6, 300
    g = generator(11)
    log_p = torch.randn(B, C, M + 1, generator=g).double().mul(2).log_softmax(2)
    x = torch.randint(M + 1, (B, C), generator=g)
    x[::4] = torch.randint(2, (len(x[::4]), C), generator=g)  # sums below M too
    assert (x.sum(1) > M).any() and (x.sum(1) < M).any() and (x.sum(1) - M).abs().max() > C  # and more than one round
    ours = greedy_adjust(x, look_up(log_p), M)
    assert torch.equal(ours, torch.stack([brute_force_adjust(x[i], log_p[i], M) for i in range(B)]))


@pytest.mark.parametrize("C, M", [(6, 4), (64, 32), (3, 50), (1, 7), (200, 5)])
@pytest.mark.parametrize("scores", ["random", "equal", "-inf", "nan", "inf", "spikes"])
def test_adjusting_gives_the_sum_M_with_as_few_changes_as_possible(C, M, scores):
    """Fails if some input or score leaves a row with a wrong sum or a negative count, changes more than the sum
    requires, or never ends."""
    g = generator(12)
    rows = [torch.zeros(C), torch.full((C,), M), torch.full((C,), 10 * M), torch.full((C,), -5), torch.ones(C),
            torch.eye(C)[0] * M, torch.eye(C)[-1] * M * 100, torch.eye(C)[0] * (M - 1), torch.eye(C)[0] * M + 1]
    x = torch.stack(rows + list(torch.randint(-3, 3 * M, (20, C), generator=g))).long()
    shape = (len(x), C, M + 1)
    log_p = {"random": torch.randn(shape, generator=g).log_softmax(2), "equal": torch.zeros(shape),
             "-inf": torch.full(shape, -math.inf), "nan": torch.full(shape, math.nan),
             "inf": torch.full(shape, math.inf),
             "spikes": torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, -math.inf)}[scores]
    out = greedy_adjust(x, look_up(log_p), M)
    assert out.dtype == torch.int64 and (out.sum(1) == M).all() and out.min() >= 0 and out.max() <= M
    possible = x.clamp(0, M)
    assert torch.equal((out - possible).abs().sum(1), (possible.sum(1) - M).abs())


def test_ties_go_to_the_nearest_mean():
    """Fails if codes whose Gaussians are spikes are adjusted by their index, not by how near the mean is."""
    mean, std = torch.tensor([[2.01, 2.4, 2.3, 0.0]]), torch.full((1, 4), 1e-3)
    x, log_prob = discrete_gaussian(mean, std, 8, torch.rand(1, 4))
    assert x.tolist() == [[2, 2, 2, 0]]
    assert greedy_adjust(x, log_prob, 7).tolist() == [[2, 3, 2, 0]]
    assert greedy_adjust(x, log_prob, 8).tolist() == [[2, 3, 3, 0]]


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p, top_k, kept", [
    (1.0, 0, [0, 2, 3]), (0.45, 0, [0]), (0.875, 0, [0, 3, 2]), (0.86, 0, [0, 3]), (0.0, 0, [0]), (1.0, 2, [0, 3]),
    (1.0, 1, [0]), (1.0, 9, [0, 2, 3])])
def test_draws_follow_p_top_p_and_top_k(top_p, top_k, kept):
    """Fails if draws do not follow the probabilities, or if top-p does not keep the smallest set of counts whose
    probability exceeds top_p, or keeps none."""
    p = torch.tensor([0.5, 0.0, 0.125, 0.375])
    draws = sample_categorical(p.double().expand(50_000, 4), torch.rand(50_000, generator=generator(15)), top_p, top_k)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = p.double()[kept] / p.double()[kept].sum()
    assert_same_distribution(draws, expected)


# --- denoiser and loss -----------------------------------------------------------------------------------------------


def test_the_loss_starts_at_log_M_plus_1():
    """Fails if the initial values are not DiT's, by which all M + 1 counts are equally likely."""
    loss = fsdd.fsdd_loss(Denoiser(12, 6, 3, width=32, layers=2, heads=2), random_batch(20, 12, 6, 17))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_the_loss_is_the_mean_cross_entropy():
    """Fails if the loss is not -log p(X_0), mean over codes and vectors, at the X_t of the given noise."""
    denoiser, batch = small_denoiser(), random_batch(20, 12, 6, 18)
    p = denoiser(batch.x_t, batch.t, batch.labels).softmax(2)
    by_hand = -sum(p[b, j, batch.x0[b, j]].log() for b in range(20) for j in range(12)) / 240
    assert fsdd.fsdd_loss(denoiser, batch).item() == pytest.approx(by_hand.item(), rel=1e-5)


# --- generation ------------------------------------------------------------------------------------------------------


def assert_generation_keeps_the_sum(denoiser, refine=fsdd.refine, **settings):
    """Every state of generation sums to M, and there is one for the noise and one for each step."""
    states = list(refine(denoiser, torch.arange(30) % 3, generator=generator(20), **{"steps": 25} | settings))
    assert len(states) == settings.get("steps", 25) + 1
    for x in states:
        assert x.dtype == torch.int64 and (x.sum(1) == denoiser.num_tokens).all() and x.min() >= 0


@pytest.mark.parametrize("settings", [{}, {"prior": "distinct"}, {"top_k": 2, "top_p": 1.0}, {"steps": 1}, {"steps": 2},
                                      {"top_p": 1.0, "guidance": [1]}, {"guidance": [3], "steps": 50},
                                      {"times": "middle"}])
def test_every_state_of_generation_sums_to_M(settings):
    """Fails if a state of generation does not sum to M."""
    assert_generation_keeps_the_sum(small_denoiser(), **settings)


class KnowsData:
    """A denoiser that knows X_0."""
    num_classes = 3

    def __init__(self, x0):
        self.x0, self.codebook_size, self.num_tokens = x0, x0.shape[1], int(x0[0].sum())

    def __call__(self, x_t, t, labels):
        return torch.nn.functional.one_hot(self.x0, self.num_tokens + 1) * 50.0


def assert_generation_ends_at_the_data(refine=fsdd.refine, **settings):
    """With a denoiser that knows X_0, generation ends at X_0."""
    x0 = skewed_counts(30, 20, 16, 21)
    *_, end = refine(KnowsData(x0), torch.zeros(30, dtype=torch.int64), generator=generator(22), **settings)
    assert torch.equal(end, x0)


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_generation_ends_at_what_the_denoiser_knows(steps, prior):
    """Fails if Eq. 8-10 do not lead from noise to X_0 even with a perfect denoiser."""
    assert_generation_ends_at_the_data(steps=steps, prior=prior)


def test_steps_follow_equation_10(gaussians):
    """Fails if mean and std of a step are not those of the noise end that X_t and x_0 imply, std reduced by f."""
    x0 = skewed_counts(30, 20, 16, 23).double()
    states = list(fsdd.refine(KnowsData(x0.long()), torch.zeros(30, dtype=torch.int64), generator=generator(24)))
    assert len(gaussians) == 25
    for step, (mean, std) in enumerate(gaussians):  # the release counts time from noise to data
        s, s_next = step / 25, (step + 1) / 25
        x1 = (states[step] - s * x0) / (1 - s)
        assert torch.allclose(mean.double(), s_next * x0 + (1 - s_next) * x1, atol=1e-4)
        f = torch.sigmoid(torch.tensor(-100 * (s_next - 0.8), dtype=torch.float64))
        assert torch.allclose(std.double(), (x1 - x0).abs() / 4 * f, atol=1e-4)


@pytest.mark.parametrize("top_k, adjusted", [(0, 8), (2, 0)])
def test_the_drawn_x0_is_adjusted_late_or_with_top_k_never(top_k, adjusted, monkeypatch):
    """Fails if x_0 is not adjusted in those of the 25 steps with 1 - t >= 0.65, or if it is with top_k, as in the
    release."""
    calls, real = [], fsdd.greedy_adjust
    monkeypatch.setattr(fsdd, "greedy_adjust", lambda *args: calls.append(1) or real(*args))
    fsdd.generate(small_denoiser(), torch.zeros(2, dtype=torch.int64), top_k=top_k)
    assert len(calls) == 25 + adjusted  # X_s is adjusted in every step


def test_the_last_step_is_adjusted_by_the_denoisers_p():
    """Fails if the wrong count is adjusted in the last step, where the Gaussians are spikes."""
    p = torch.tensor([[[0.1, 0.9, 0], [0.4, 0.6, 0], [0.1, 0.9, 0]]])  # the most probable counts, 1, 1, 1, exceed M = 2
    assert fsdd.sample_step(torch.tensor([[0, 2, 0]]), p, 0.04, 0, top_p=1, top_k=1).tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("weight", [0, 1, 3, 50])  # 1: the plain model, which is computed without the null class
def test_guidance_acts_on_probabilities(weight):
    """Fails if guidance is not clamp(p_null + w (p_class - p_null), min 0), normalized."""
    denoiser, x, labels = small_denoiser(), skewed_counts(9, 12, 6, 28), torch.arange(9) % 3
    t = torch.full((9,), 0.7)
    p_class, p_null = (denoiser(x, t, y).softmax(2) for y in (labels, torch.full((9,), 3)))
    by_hand = (p_null + weight * (p_class - p_null)).clamp(min=0)
    ours = fsdd.guided_probabilities(denoiser, x, 0.7, labels, weight)
    assert torch.allclose(ours, by_hand / by_hand.sum(2, keepdim=True), atol=1e-5)


def test_guidance_by_thirds(monkeypatch):
    """Fails if the three weights do not each hold for a third of the time from noise to data."""
    weights, real = [], fsdd.guided_probabilities
    monkeypatch.setattr(fsdd, "guided_probabilities", lambda *args: weights.append(args[-1]) or real(*args))
    fsdd.generate(small_denoiser(), torch.zeros(2, dtype=torch.int64), guidance=(4, 50, 55))
    assert weights == [4] * 9 + [50] * 8 + [55] * 8
    for steps in range(1, 200):  # rounding must not put a step into the third before
        weights = [fsdd.guidance_weight((0, 1, 2), t) for t in fsdd.sampling_times(steps)[:-1]]
        assert weights == [3 * step // steps for step in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 3, 36])
def test_sampling_times(steps):
    """Fails if generation does not begin at noise and end at data, if the paper's steps are not equal, or if times in
    the middle go back or leave the middle."""
    assert fsdd.sampling_times(steps) == [1 - i / steps for i in range(steps + 1)]
    times = fsdd.sampling_times(steps, "middle")
    assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
    assert all(t > s for t, s in zip(times, times[1:]))
    assert steps < 3 or (times[1], times[-2]) == pytest.approx(fsdd.MIDDLE)


def test_generation_continues_from_a_state():
    """Fails if start is not the first state, or if generation from it does not take the times that are left."""
    denoiser, x = small_denoiser(), skewed_counts(9, 12, 6, 29)
    states = list(fsdd.refine(denoiser, torch.arange(9) % 3, steps=10, start=(x, 0.45), generator=generator(1)))
    assert torch.equal(states[0], x) and len(states) == 1 + 5  # t = 0.4, 0.3, ..., 0
    assert all((state.sum(1) == 6).all() for state in states)
