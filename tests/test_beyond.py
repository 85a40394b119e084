"""Changes of ours: each does what beyond.py says, and the sums stay exact.

    pytest --slow -rP tests/test_beyond.py -k oracle     prints how far each sampler's images are from the data
"""
import itertools
from types import SimpleNamespace

import pytest
import torch

import beyond
from beyond import SparseDenoiser, flip_times, refine_by_exchange, sparse_loss
from fsdd import (Denoiser, discrete_gaussian, forward_process, fsdd_loss, greedy_adjust, refine, sample_categorical,
                  sample_noise)
from tests.test_fsdd import (assert_generation_ends_at_the_data, assert_generation_keeps_the_sum,
                             assert_same_distribution, dense_gaussian, generator, look_up, random_batch, skewed_counts,
                             small_denoiser)

# --- 1. training times -----------------------------------------------------------------------------------------------


def test_training_times_are_uniform_in_flips():
    """Fails if training does not see every share of flips equally often."""
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
    """Fails if inner products of the embeddings are not in proportion to exp(-2 |e - e'|^2)."""
    denoiser = SimpleNamespace(code_embedding=torch.nn.Parameter(torch.zeros(1, C, 4096)))
    codes = torch.nn.functional.normalize(torch.randn(C, code_dim), dim=1)
    beyond.start_from_codebook(denoiser, codes)
    embedding = denoiser.code_embedding[0].double()
    products = embedding @ embedding.t() / (4096 / 2 * 0.3 ** 2)
    assert (products - (-2 * torch.cdist(codes, codes) ** 2).exp()).abs().max() < 0.1


# --- 3. the sparse denoiser ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C, M", [(12, 6), (5, 40), (300, 32), (1, 3)])
def test_sparse_attends_to_the_tokens(C, M):
    """Fails if a code does not attend to the tokens of X_t, each as often as it occurs, with the dense one's weights.
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


def test_sparse_loss_estimates_the_loss_of_all_codes():
    """Fails if training on some of the codes minimizes something else than the mean over all."""
    denoiser, batch = small_denoiser(40, 6, model_class=SparseDenoiser), random_batch(8, 40, 6, 43)
    batch.x0[0], batch.x_t[0], batch.t[0] = torch.arange(40) < 6, torch.arange(40) >= 34, 1.0  # 2 M codes in the two
    with torch.no_grad():
        full, every = fsdd_loss(denoiser, batch), sparse_loss(denoiser, batch, 40)
        some = torch.stack([sparse_loss(denoiser, SimpleNamespace(**vars(batch) | {"u_codes": u_codes}), 14)
                            for u_codes in torch.rand(100, 8, 40)])
    assert every.item() == pytest.approx(full.item(), rel=1e-5)
    assert some.std() > 0.001 and abs(some.mean() - full) < 5 * some.std() / 10


def test_sparse_gradients_do_not_depend_on_chance():
    """Fails if the same training on several threads gives other weights in every run, and so after a resume."""
    batch, denoiser = random_batch(32, 256, 32, 44), small_denoiser(256, 32, model_class=SparseDenoiser)
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(4):
        denoiser.zero_grad()
        sparse_loss(denoiser, batch, 64).backward()
        gradients.append([parameter.grad.clone() for parameter in denoiser.parameters()])
    torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for others in gradients[1:] for first, other in zip(gradients[0], others))


# --- 4. the exchange sampler -----------------------------------------------------------------------------------------


def marginal(t, a, C, M, prior):
    """p(X_t = k | x_0 = a) of one code, before adjusting, (M + 1,), by the dense formula."""
    p = torch.zeros(M + 1, dtype=torch.float64)
    for b, p_b in zip(*beyond.noise_of_a_code(C, M, prior)):
        end = a if t == 0 else int(b)
        still = t in (0, 1) or int(b) == a
        mean, std = torch.tensor(t * float(b) + (1 - t) * a), torch.tensor(abs(float(b) - a) / 4)
        p += p_b * (torch.eye(M + 1, dtype=torch.float64)[end] if still else dense_gaussian(mean, std, M).exp())
    return p


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
def test_noise_of_a_code_is_that_of_sample_noise(prior):
    """Fails if the posterior is that of another noise than sample_noise() draws."""
    b, p = beyond.noise_of_a_code(20, 8, prior)
    counts = sample_noise(50_000, 20, 8, prior, generator(30))[:, 3]
    expected = torch.zeros(9, dtype=torch.float64).index_put((b,), p)
    assert expected.sum() == pytest.approx(1, abs=1e-9)
    assert_same_distribution(counts, expected)


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
@pytest.mark.parametrize("t, s", [(1.0, 0.9), (1.0, 0.0), (0.8, 0.5), (0.52, 0.48), (0.3, 0.05), (0.04, 0.0)])
def test_posterior_leads_from_marginal_to_marginal(t, s, prior):
    """Fails if steps by Eq. 8 do not follow the forward process: q(X_s | x_0) is the sum over k of q(X_s | X_t = k,
    x_0) q(X_t = k | x_0)."""
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
    """Fails if some distribution leaves a row with a wrong sum or a negative count, or never ends."""
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
    """Fails if small steps stall, change too much, or change only the likeliest codes."""
    n, C, M = 20_000, 40, 20
    x = torch.cat([torch.ones(n, M), torch.zeros(n, C - M)], dim=1).long()
    rate = torch.linspace(0.002, 0.02, M).repeat(2)  # of going down where x is 1, of going up where it is 0
    q = torch.zeros(n, C, 3)
    q.scatter_(2, x[:, :, None], (1 - rate).expand(n, -1)[:, :, None])
    q.scatter_(2, 1 - x[:, :, None], rate.expand(n, -1)[:, :, None])
    moved = (beyond.exchange(x, q, generator(32)) != x).double().mean(0)  # (C,), about rate
    assert moved.sum() / rate.sum() == pytest.approx(1, abs=0.03)
    assert ((moved / rate.double() - 1).abs() < 0.3).all()


@pytest.mark.parametrize("model_class", [Denoiser, SparseDenoiser])
@pytest.mark.parametrize("settings", [{}, {"prior": "distinct"}, {"top_k": 2}, {"steps": 1}, {"top_p": 0.8},
                                      {"guidance": [4.0], "steps": 50}])
def test_every_state_of_exchange_sums_to_M(settings, model_class):
    """Fails if a state of generation by exchange does not sum to M, with either denoiser."""
    assert_generation_keeps_the_sum(small_denoiser(model_class=model_class), refine_by_exchange, **settings)


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_exchange_ends_at_what_the_denoiser_knows(steps, prior):
    """Fails if exchange does not lead from noise to X_0 even with a perfect denoiser."""
    assert_generation_ends_at_the_data(refine_by_exchange, steps=steps, prior=prior)


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

    def distances(self, all_steps, refine, **settings):
        """Total variation between 4000 samples and the data, by the number of steps."""
        found, labels = {}, torch.zeros(4000, dtype=torch.int64)
        for steps in all_steps:
            *_, x = refine(self, labels, prior=self.prior, steps=steps, guidance=[1.0], top_p=1.0,
                           generator=generator(43), **settings)
            found[steps] = self.distance(x)
        return found


@pytest.mark.parametrize("C, M, images, prior, all_steps", [
    (6, 4, 4, "multinomial", (5, 25)),
    pytest.param(6, 4, 4, "multinomial", (5, 25, 100), marks=pytest.mark.slow),
    pytest.param(6, 4, 4, "distinct", (5, 25, 100), marks=pytest.mark.slow),
    pytest.param(8, 3, 5, "multinomial", (5, 25, 100), marks=pytest.mark.slow)])
def test_exchange_samples_the_data_of_an_oracle(C, M, images, prior, all_steps, monkeypatch):
    """Fails if more steps of exchange, with the exact p(x_0 | X_t), do not come closer to the data, or not as close as
    the noise of the draws, or if what beyond.py says of the paper's sampler, of the posterior with Algorithm 1 and of
    times in the middle does not hold. Prints all distances."""
    oracle = Oracle(C, M, images, prior)
    draws = torch.multinomial(oracle.weights, 4000, replacement=True, generator=generator(44))
    noise = oracle.distance(oracle.data[draws])
    papers, ours = (oracle.distances(all_steps, sampler, times="even") for sampler in (refine, refine_by_exchange))
    middle = oracle.distances(all_steps, refine_by_exchange, times="middle")
    monkeypatch.setattr(beyond, "exchange", lambda x, q, generator: greedy_adjust(
        sample_categorical(q, torch.rand(x.shape, generator=generator)),
        look_up(torch.nn.functional.pad(q, (0, M + 1 - q.shape[2])).log()), M))
    stalled = oracle.distances(all_steps, refine_by_exchange, times="even")
    print(f"C = {C}, M = {M}, {prior}, steps {all_steps}: samples of the data {noise:.3f}", *(
        f"{name} {', '.join(f'{distance:.3f}' for distance in found.values())}" for name, found in (
            ("paper", papers), ("posterior and Algorithm 1", stalled), ("exchange", ours),
            ("exchange in the middle", middle))), sep="; ")
    assert ours[5] > ours[25] and middle[5] < ours[5] and max(ours[25], middle[25]) < noise + 0.06
    assert all(ours[steps] < min(papers[steps], stalled[steps]) for steps in all_steps if steps >= 25)
    if 100 in all_steps:
        assert ours[25] > ours[100] - 0.01 and ours[100] < noise + 0.06
        assert stalled[100] > stalled[25] + 0.02  # small steps stall
