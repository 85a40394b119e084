"""What we found beyond the paper: each remedy does what beyond.py says, and the sums stay exact.

    pytest --slow -rP tests/test_beyond.py -k oracle     prints how far each sampler's images are from the data
"""
import itertools
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import beyond
from beyond import SparseDenoiser, all_hidden, exchange_step, exchange_times, flip_times, hide_tokens, sparse_loss
from fsdd import (Denoiser, discrete_gaussian, draw, forward_process, fsdd_loss, generate, greedy_adjust, refine,
                  sample_noise, uniform_times)
from generation import SAMPLERS
from tests.test_fsdd import (KnowsData, LargestTensor, assert_generation_ends_at_the_data,
                             assert_generation_keeps_the_sum, assert_same_distribution, dense_gaussian, generator,
                             random_batch, skewed_counts, small_denoiser)

EXCHANGE = SAMPLERS["exchange"]

# --- 1. training times -----------------------------------------------------------------------------------------------


def test_training_times_are_uniform_in_flips():
    """Broken: training would not see every share of flips equally often."""
    t = flip_times(torch.rand(100_000, generator=generator(25)))
    assert 0 < t.min() < 0.08 and 0.92 < t.max() < 1
    x0, x1 = torch.tensor([[1, 0]]).expand(len(t), 2), torch.tensor([[0, 1]]).expand(len(t), 2)
    x, _ = discrete_gaussian(t[:, None] * x1 + (1 - t[:, None]) * x0, torch.full((len(t), 2), 0.25), 1,
                             torch.rand(x0.shape))
    tenths = t.argsort().view(10, -1)  # in the order of t; the share of flips rises evenly
    flipped = (x[:, 0] == 0).double()[tenths].mean(1)
    assert (flipped - torch.linspace(0.05, 0.95, 10)).abs().max() < 0.02


# --- 2. start at the codebook ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("C, code_dim", [(96, 3), (40, 12), (7, 2)])
def test_similar_codes_start_with_similar_embeddings(C, code_dim):
    """Broken: inner products of the embeddings would not be in proportion to exp(-2 |e - e'|^2)."""
    denoiser = SimpleNamespace(code_embedding=torch.nn.Parameter(torch.zeros(1, C, 4096)))
    codes = torch.nn.functional.normalize(torch.randn(C, code_dim), dim=1)
    beyond.start_from_codebook(denoiser, codes)
    embedding = denoiser.code_embedding[0].double()
    products = embedding @ embedding.t() / (4096 / 2 * 0.3 ** 2)
    assert (products - (-2 * torch.cdist(codes, codes) ** 2).exp()).abs().max() < 0.1


# --- 3. the exchange sampler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 6, 12, 100, 1000, 10_000])
def test_sampling_times_are_denser_where_counts_change(steps):
    """Broken: generation would not begin at noise and end at data, or go back in time, or not spend more steps where
    more flips happen."""
    uniform, ours = uniform_times(steps), exchange_times(steps)
    assert len(ours) == steps + 1 and ours[0] == 1 and ours[-1] == 0
    assert ours == sorted(ours, reverse=True) and ours == pytest.approx([1 - t for t in reversed(ours)])
    for u, t in zip(uniform, ours):  # the other half of t is the quantile of the flips
        if 0 < t < 1:
            assert 1 / (1 + math.exp(-8 * (2 * (2 * t - u) - 1))) == pytest.approx(u)
    assert len(set(ours)) > 0.99 * steps  # only with thousands of steps some times are equal
    assert sum(0.25 < t < 0.75 for t in ours) >= sum(0.25 < t < 0.75 for t in uniform)


def test_the_guidance_ramp_follows_the_flips():
    """Broken: the first weight would not hold at noise, the last not at data, or others in between."""
    weight = beyond.guidance_ramp(2, 6)
    assert [weight(t) for t in (1, 0.5, 0)] == pytest.approx([2, 4, 6], abs=0.01)
    assert weight(0.3) == pytest.approx(6 - 4 / (1 + math.exp(-8 * (2 * 0.3 - 1))))


def marginal(t, a, C, M, prior):
    """p(X_t = k | x_0 = a) of one code, before adjusting, (M + 1,), by the dense formula."""
    p = torch.zeros(M + 1, dtype=torch.float64)
    for b, p_b in zip(*beyond.noise_of_a_code(C, M, prior)):
        end = a if t == 0 else int(b)
        still = t in (0, 1) or int(b) == a
        mean, std = torch.tensor(t * float(b) + (1 - t) * a), torch.tensor(abs(float(b) - a) / 4)
        p += p_b * (torch.eye(M + 1, dtype=torch.float64)[end] if still else dense_gaussian(mean, std, M))
    return p


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
def test_noise_of_a_code_is_that_of_sample_noise(prior):
    """Broken: the posterior would be that of another noise than sample_noise() draws."""
    b, p = beyond.noise_of_a_code(20, 8, prior)
    counts = sample_noise(50_000, 20, 8, prior, generator(30))[:, 3]
    expected = torch.zeros(9, dtype=torch.float64).index_put((b,), p)
    assert expected.sum() == pytest.approx(1, abs=1e-9)
    assert_same_distribution(counts, expected)


def test_noise_of_a_code_is_finite_for_large_sets():
    """Broken: with M in the thousands, factorials would overflow; and the values kept would not be few."""
    b, p = beyond.noise_of_a_code(4096, 1100, "multinomial")
    assert p.sum() == pytest.approx(1, abs=1e-9) and b.tolist() == list(range(len(b))) and len(b) < 20
    assert (p * b).sum() == pytest.approx(1100 / 4096)


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
@pytest.mark.parametrize("t, s", [(1.0, 0.9), (1.0, 0.0), (0.8, 0.5), (0.52, 0.48), (0.3, 0.05), (0.04, 0.0)])
def test_posterior_leads_from_marginal_to_marginal(t, s, prior):
    """Broken: steps by Eq. 8 would not follow the forward process: q(X_s | x_0) must be the sum over k of
    q(X_s | X_t = k, x_0) q(X_t = k | x_0)."""
    C, M = 10, 6
    b, p_b = beyond.noise_of_a_code(C, M, prior)
    F_t, F_s = beyond.distribution_function(t, b, M), beyond.distribution_function(s, b, M)
    tables = torch.stack([beyond.posterior(k, F_t, F_s, p_b) for k in range(M + 1)])  # (k, a, j)
    assert torch.allclose(tables.sum(2), torch.ones(M + 1, M + 1, dtype=torch.float64))
    for a in range(M + 1):
        assert torch.allclose(marginal(t, a, C, M, prior) @ tables[:, a], marginal(s, a, C, M, prior), atol=1e-6)
    if s == 0:
        assert torch.allclose(tables, torch.eye(M + 1, dtype=torch.float64).expand_as(tables))  # X_0 is x_0
    assert tables[1, 1, 1] > 0.5 or s < t - 0.2  # a small step changes little


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
    out = beyond.exchange(x, q / q.sum(2, keepdim=True), g)
    assert out.dtype == torch.int64 and (out.sum(1) == M).all() and out.min() >= 0 and out.max() <= M


def test_exchange_moves_as_many_tokens_as_independent_codes():
    """Broken: small steps would stall, as they do with Algorithm 1, or change too much, or only the likeliest codes."""
    n, C, M = 20_000, 40, 20
    x = torch.cat([torch.ones(n, M), torch.zeros(n, C - M)], dim=1).long()
    rate = torch.linspace(0.002, 0.02, M).repeat(2)  # of going down where x is 1, of going up where it is 0
    q = torch.zeros(n, C, 3)
    q.scatter_(2, x[:, :, None], (1 - rate).expand(n, -1)[:, :, None])
    q.scatter_(2, 1 - x[:, :, None], rate.expand(n, -1)[:, :, None])
    moved = (beyond.exchange(x, q, generator(32)) != x).double().mean(0)  # (C,), about rate
    assert moved.sum() / rate.sum() == pytest.approx(1, abs=0.03)
    assert ((moved / rate.double() - 1).abs() < 0.3).all()
    u = torch.rand(n, C, generator=generator(33))
    stalled = (greedy_adjust(draw(q, u), q.log(), M) != x).double().mean(0)
    assert stalled.sum() / rate.sum() < 0.4


def test_an_exchange_step_makes_no_table_over_all_counts():
    """Broken: at ImageNet's size a step would take B x C x (M + 1) numbers besides the denoiser's p."""
    B, C, M = 2, 4096, 128
    logits = torch.full((B, C, M + 1), -20.0)
    logits[:, :, :4] = torch.tensor([0.0, -3.0, -5.0, -9.0])
    p, x = logits.softmax(2), sample_noise(B, C, M, "distinct", generator(34))
    with LargestTensor() as largest:
        exchange_step(x, p, 0.6, 0.5, generator=generator(35), prior="distinct")
    assert largest.elements < B * C * (M + 1) / 10


@pytest.mark.parametrize("model_class", [Denoiser, SparseDenoiser])
@pytest.mark.parametrize("settings", [{}, {"prior": "distinct"}, {"top_k": 2}, {"steps": 1}, {"top_p": 0.8},
                                      {"guidance": beyond.guidance_ramp(0.5, 12), "steps": 100}])
def test_every_state_of_exchange_sums_to_M(settings, model_class):
    """Broken: the fixed-sum constraint in generation by exchange, of either denoiser."""
    assert_generation_keeps_the_sum(small_denoiser(model_class=model_class), **EXCHANGE | settings)


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_exchange_ends_at_what_the_denoiser_knows(steps, prior):
    """Broken: exchange would not lead from noise to X_0 even with a perfect denoiser."""
    assert_generation_ends_at_the_data(steps=steps, prior=prior, **EXCHANGE)


@pytest.mark.parametrize("sampler", [{}, EXCHANGE])
def test_generation_depends_on_the_generator_alone(sampler):
    """Broken: the same seed would not give the same images, by the paper's sampler or by exchange."""
    denoiser, labels = small_denoiser(), torch.arange(9) % 3
    first, again, other = (generate(denoiser, labels, **sampler, guidance=1, top_p=1,
                                    generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- a toy problem with an exact denoiser ----------------------------------------------------------------------------


class Oracle:
    """Count vectors over C codes that sum to M, a few of them the data, and p(x_0 | X_t) of them.

    q(X_t | x_0) is estimated for all states by many draws of the forward process, adjusting included, and p(x_0 | X_t)
    follows by Bayes' rule. So all that generation gets wrong is due to the sampler.
    """

    num_classes = 1

    def __init__(self, C, M, images, prior, draws=4000):
        self.codebook_size, self.num_tokens, self.prior, self.draws = C, M, prior, draws
        self.states = torch.tensor([x for x in itertools.product(range(M + 1), repeat=C) if sum(x) == M])  # (S, C)
        self.powers = (M + 1) ** torch.arange(C)
        self.index = torch.zeros((M + 1) ** C, dtype=torch.int64)
        self.index[self.states @ self.powers] = torch.arange(len(self.states))
        self.data = self.states[torch.randperm(len(self.states), generator=generator(40))[:images]]
        self.weights = torch.rand(images, generator=generator(41), dtype=torch.float64) + 0.2
        self.weights /= self.weights.sum()
        self.tables = {}

    def find(self, x):
        """Count vectors (n, C) -> the indices (n,) of the states."""
        return self.index[x @ self.powers]

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

    def distances(self, all_steps, **sampler):
        """Total variation between 4000 samples and the data, by the number of steps."""
        labels = torch.zeros(4000, dtype=torch.int64)
        return {steps: self.distance(generate(self, labels, prior=self.prior, steps=steps, guidance=1.0, top_p=1.0,
                                              generator=generator(43), **sampler)) for steps in all_steps}


@pytest.mark.parametrize("C, M, images, prior, all_steps", [
    (6, 4, 4, "multinomial", (5, 25)),
    pytest.param(6, 4, 4, "multinomial", (5, 25, 100), marks=pytest.mark.slow),
    pytest.param(6, 4, 4, "distinct", (5, 25, 100), marks=pytest.mark.slow),
    pytest.param(8, 3, 5, "multinomial", (5, 25, 100), marks=pytest.mark.slow)])
def test_exchange_samples_the_data_of_an_oracle(C, M, images, prior, all_steps, monkeypatch):
    """Broken: with the exact p(x_0 | X_t), more steps of exchange would not come closer to the data, or not as close as
    the noise of the draws; or what beyond.py says of the paper's sampler, of the posterior with Algorithm 1 and of
    evenly spaced times would not hold. Prints all distances."""
    oracle = Oracle(C, M, images, prior)
    draws = torch.multinomial(oracle.weights, 4000, replacement=True, generator=generator(44))
    noise = oracle.distance(oracle.data[draws])
    papers, ours = oracle.distances(all_steps), oracle.distances(all_steps, **EXCHANGE)
    evenly = {"step": exchange_step, "times": uniform_times}
    uniform = oracle.distances(all_steps, **evenly)
    monkeypatch.setattr(beyond, "exchange", lambda x, q, generator: greedy_adjust(
        draw(q, torch.rand(x.shape, generator=generator)), q.log(), M))
    stalled = oracle.distances(all_steps, **evenly)
    print(f"C = {C}, M = {M}, {prior}, steps {all_steps}: samples of the data {noise:.3f}", *(
        f"{name} {', '.join(f'{distance:.3f}' for distance in found.values())}" for name, found in (
            ("paper", papers), ("posterior and Algorithm 1", stalled), ("exchange at the paper's times", uniform),
            ("exchange", ours))), sep="; ")
    assert ours[5] > ours[25] and ours[5] < uniform[5] and ours[25] < noise + 0.06
    assert all(ours[steps] < min(papers[steps], stalled[steps]) for steps in all_steps if steps >= 25)
    if 100 in all_steps:
        assert ours[25] > ours[100] - 0.01 and ours[100] < noise + 0.06
        assert stalled[100] > stalled[25] + 0.02  # small steps stall


class HiddenOracle(Oracle):
    """The same with hidden tokens, where p(x_0 | X_t) is known: there are C(x_0[j], X_t[j]) equally likely choices of
    the tokens of code j that are visible."""

    def __init__(self, C, M, images):
        super().__init__(C, M, images, "hidden")
        self.codebook_size = C + 1

    def __call__(self, x, t, labels):
        counts = range(self.num_tokens + 1)
        choose = torch.tensor([[math.comb(n, k) for k in counts] for n in counts])
        visible = x[:, None, :-1].expand(-1, len(self.data), -1)  # (n, images, C)
        ways = choose[self.data.expand(len(x), -1, -1), visible].prod(2)  # (n, images)
        known = (ways + 1e-9) * self.weights
        data = torch.nn.functional.pad(self.data, (0, 1))  # no token is on the null code
        one_hot = torch.nn.functional.one_hot(data, self.num_tokens + 1).double()
        return torch.einsum("ni,icm->ncm", known / known.sum(1, keepdim=True), one_hot).clamp(min=1e-12).log().float()

    def distance(self, x):
        return super().distance(x[:, :self.data.shape[1]])


REVEAL = SAMPLERS["reveal"]


@pytest.mark.parametrize("C, M, images", [(6, 4, 4), pytest.param(8, 3, 5, marks=pytest.mark.slow),
                                          pytest.param(7, 6, 12, marks=pytest.mark.slow)])
def test_one_token_at_a_time_is_exact_by_an_oracle(C, M, images):
    """Broken: with the exact p(x_0 | X_t), M steps would not draw from the data, or fewer steps not come closer to it
    than exchange does. Prints all distances."""
    oracle, steps = HiddenOracle(C, M, images), range(1, 2 * M + 1)
    draws = torch.multinomial(oracle.weights, 4000, replacement=True, generator=generator(44))
    noise = oracle.distance(torch.nn.functional.pad(oracle.data[draws], (0, 1)))
    found = oracle.distances(steps, **REVEAL)
    exchange = Oracle(C, M, images, "multinomial").distances(steps, **EXCHANGE)
    print(f"C = {C}, M = {M}, in 1 to {2 * M} steps: samples of the data {noise:.3f}", *(
        f"{name} {', '.join(f'{distance:.3f}' for distance in row.values())}" for name, row in (
            ("hidden tokens", found), ("exchange", exchange))), sep="; ")
    assert all(found[n] < noise + 0.02 for n in steps if n >= M)
    assert found[1] > found[M] + 0.1 and found[M] < exchange[2 * M]


# --- 4. the sparse denoiser ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C, M", [(12, 6), (5, 40), (300, 32), (1, 3)])
def test_sparse_attends_to_the_tokens(C, M):
    """Broken: a code would not attend to the tokens of X_t, each as often as it occurs, with the dense one's weights.
    Attention to all codes with log X_t added to their scores is the same, as exp(score + log k) = k exp(score)."""
    dense, sparse = (small_denoiser(C, M, model_class=kind).double() for kind in (Denoiser, SparseDenoiser))
    sparse.load_state_dict(dense.state_dict())  # a checkpoint of one can be used by the other
    x, t, labels = skewed_counts(9, C, M, 40), torch.rand(9), torch.randint(3, (9,))
    for block in dense.blocks:
        attend = block.attention.attend
        block.attention.attend = lambda q, k, v, attend=attend: attend(
            q, k, v, attn_mask=x.double().log()[:, None, None])
    for denoiser in (dense, sparse):  # the time's features are float32
        denoiser.time_mlp.register_forward_pre_hook(lambda module, args: args[0].double())
    torch.testing.assert_close(sparse(x, t, labels), dense(x, t, labels), rtol=1e-9, atol=1e-9)
    if C > 1:  # the embedding of an absent code reaches no other
        base, absent = sparse(x, t, labels), int((x[0] == 0).nonzero()[0])
        with torch.no_grad():
            sparse.code_embedding[0, absent, 0] += 1
        changed = (sparse(x, t, labels) - base).abs().amax(2)[0] > 1e-9
        assert changed.nonzero().flatten().tolist() == [absent]


def test_sparse_logits_of_some_codes_are_those_of_all():
    """Broken: training, which computes the logits of some codes, would see other logits than sampling."""
    denoiser = small_denoiser(30, 6, model_class=SparseDenoiser)
    x, t, labels = skewed_counts(9, 30, 6, 41), torch.rand(9), torch.randint(3, (9,))
    codes = (torch.rand(x.shape) + (x > 0)).topk(12, dim=1).indices
    expected = denoiser(x, t, labels).gather(1, codes[:, :, None].expand(-1, -1, 7))
    torch.testing.assert_close(denoiser(x, t, labels, codes), expected, rtol=1e-4, atol=1e-5)


def test_only_unlikely_codes_are_left_out_of_generation():
    """Broken: codes that may be in X_0, or that X_t contains, would vanish from samples; or none would be left out."""
    denoiser = small_denoiser(30, 6, model_class=SparseDenoiser)
    x, labels, (uniform, order) = skewed_counts(9, 30, 6, 42), torch.randint(3, (9,)), torch.rand(2, 9, 30)
    chance = uniform * (order > 0.5)  # of being in X_0: half of the codes have none, also some that X_t contains
    previous = torch.nn.functional.pad(torch.stack([1 - chance, chance], dim=2), (0, 5))
    for weight in (1, 3):
        every = beyond.guided_probabilities(denoiser, x, 0.5, labels, weight)
        found = beyond.likely_probabilities(denoiser, x, 0.5, labels, weight, previous)
        kept = (chance > beyond.LIKELY) | (x > 0)
        torch.testing.assert_close(found[kept], every[kept], rtol=1e-4, atol=1e-5)
        left_out = found[:, :, 0] == 1
        assert not left_out[kept].any() and left_out.sum() > 60 and found.sum(2).allclose(torch.tensor(1.0))
        for likely in (beyond.likely_probabilities(denoiser, x, 0.5, labels, weight),
                       beyond.likely_probabilities(denoiser, x, 0.5, labels, weight, torch.ones(9, 30, 7) / 7)):
            torch.testing.assert_close(likely, every, rtol=1e-4, atol=1e-5)
        early = [beyond.guided_probabilities(denoiser, x, 0.9, labels, weight),
                 beyond.likely_probabilities(denoiser, x, 0.9, labels, weight, previous)]
        assert torch.equal(*early)
    dense = small_denoiser(30, 6)  # which needs all codes
    assert torch.equal(beyond.likely_probabilities(dense, x, 0.5, labels, 3, previous),
                       beyond.guided_probabilities(dense, x, 0.5, labels, 3))


def test_sparse_loss_estimates_the_loss_of_all_codes():
    """Broken: training on some of the codes would minimize something else than the mean over all."""
    denoiser, batch = small_denoiser(40, 6, model_class=SparseDenoiser), random_batch(8, 40, 6, 43)
    batch.x0[0], batch.x1[0], batch.t[0] = torch.arange(40) < 6, torch.arange(40) >= 34, 1.0  # 2 M codes in X_t and X_0
    with torch.no_grad():
        full, every = fsdd_loss(denoiser, batch), sparse_loss(denoiser, batch, 40)
        orders = torch.rand(100, 8, 40)
        some = torch.stack([sparse_loss(denoiser, SimpleNamespace(**vars(batch) | {"order": order}), 14)
                            for order in orders])
    assert every.item() == pytest.approx(full.item(), rel=1e-5)
    assert some.std() > 0.001 and abs(some.mean() - full) < 5 * some.std() / 10
    with pytest.raises(ValueError, match="at least 2 M = 12, got 11"):
        sparse_loss(denoiser, batch, 11)


def test_sparse_gradients_do_not_depend_on_chance():
    """Broken: on several threads, the same training would give other weights in every run, and so after a resume."""
    batch, denoiser = random_batch(64, 256, 32, 44), small_denoiser(256, 32, model_class=SparseDenoiser)
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(20):
        denoiser.zero_grad()
        sparse_loss(denoiser, batch, 64).backward()
        gradients.append([parameter.grad.clone() for parameter in denoiser.parameters()])
    torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for others in gradients[1:] for first, other in zip(gradients[0], others))


@pytest.mark.slow
def test_sparse_compiled_is_the_same():
    """Broken: torch.compile would train another sparse denoiser."""
    batch, gradients = random_batch(8, 40, 6, 44), []
    for compiled in (False, True):
        denoiser = small_denoiser(40, 6, model_class=SparseDenoiser)
        sparse_loss(torch.compile(denoiser, backend="aot_eager") if compiled else denoiser, batch, 18).backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    for plain, other in zip(*gradients):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-6)


# --- 5. hidden tokens ------------------------------------------------------------------------------------------------


def test_every_token_is_hidden_with_probability_t():
    """Broken: a token would be more likely to be hidden than another, or a state not sum to M."""
    x0 = torch.tensor([[3, 0, 1, 0, 0]]).expand(20_000, -1)  # M = 4, four codes and the null code
    x1 = all_hidden(len(x0), 5, 4)
    assert x1.tolist() == [[0, 0, 0, 0, 4]] * len(x0)
    for t in (0.0, 0.3, 1.0):
        x = hide_tokens(x0, x1, torch.full((len(x0),), t), torch.rand(x0.shape, generator=generator(50)))
        assert (x.sum(1) == 4).all() and not x[:, [1, 3]].any()
        binomial = torch.distributions.Binomial(3, torch.tensor(1 - t)).log_prob(torch.arange(4.0)).exp()
        assert_same_distribution(x[:, 0], binomial)
        assert (x[:, 2].double().mean() - (1 - t)).abs() < 0.02
    with pytest.raises(ValueError, match="'hidden' needs num_tokens <= codebook_size, got 5 > 4"):
        all_hidden(1, 5, 5)


@pytest.mark.parametrize("steps", [1, 3, 7, 6, 40])
def test_revealed_tokens_stay(steps):
    """Broken: a state would not sum to M, a token that is visible would change, or some stay hidden at the end."""
    denoiser, labels = small_denoiser(13, 6, model_class=SparseDenoiser), torch.arange(60) % 3
    for settings in ({}, {"top_p": 0.7}, {"top_k": 2}, {"guidance": 5.0}):
        states = list(refine(denoiser, labels, **REVEAL, **{"guidance": 1.0, "top_p": 1.0} | settings, steps=steps,
                             prior="hidden", generator=generator(51)))
        assert len(states) == steps + 1
        for before, after in pairwise(states):
            assert (after.sum(1) == 6).all() and (after[:, :-1] >= before[:, :-1]).all()
        assert not states[-1][:, -1].any() and len(states[-1].unique(dim=0)) > 30


def test_revealing_ends_at_what_the_denoiser_knows():
    """Broken: hidden tokens would not become those that a perfect denoiser predicts, also counts above 1."""
    x0 = torch.nn.functional.pad(skewed_counts(50, 12, 6, 52), (0, 1))
    for steps in (1, 2, 4, 6):
        assert torch.equal(generate(KnowsData(x0), torch.zeros(50, dtype=torch.int64), **REVEAL, guidance=1.0,
                                    top_p=1.0, prior="hidden", steps=steps), x0)


def test_a_sum_changes_in_proportion_to_the_probabilities():
    """Broken: steps to the sum M would favour codes other than those whose counts are in doubt, or be taken where the
    probability is 0."""
    p = torch.tensor([[0.5, 0.5, 0], [0.2, 0.8, 0], [1, 0, 0], [0.8, 0.1, 0.1]])
    x = torch.tensor([[0, 0, 0, 1]]).expand(40_000, -1)
    changed = beyond.change_sum(x, p.log().expand(len(x), -1, -1), 2, generator(53))
    assert (changed.sum(1) == 2).all() and not changed[:, 2].any()
    odds = torch.tensor([1.0, 4.0, 0.0, 1.0])  # of 0 -> 1, 0 -> 1, none, 1 -> 2
    assert_same_distribution((changed - x).argmax(1), odds / odds.sum())
