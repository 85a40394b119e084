"""The baselines of Table 5."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dual_transform import tokens_to_counts
from fsdd import sample_noise
from paper import baselines
from train_fsdd import Batch

SIZE = {"num_classes": 2, "width": 16, "layers": 2, "heads": 2}
STATES = torch.tensor([[2, 0, 1], [0, 3, 0], [1, 1, 1], [0, 0, 3]])  # a tiny world: C = 3, M = 3
SHARES = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.2, 0.7]])  # of the states in either class


def random_weights(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch_of(x0, labels, t=None):
    """A batch of which the losses here read x0, labels and t."""
    return Batch(x0, None, t, labels, None)


def shares_of(found, states):
    """The share of rows of found (N, C) that are each of states (S, C), (S,)."""
    return (found[:, None] == states).all(2).double().mean(0)


# Autoregressive


def autoregressive_logits(model, x, label):
    """The logits (N, length, symbols) of sequences x (N, length), all with one label."""
    return model(x[:, :-1], torch.zeros(len(x)), torch.full((len(x),), label))


@pytest.mark.parametrize("length, symbols", [(3, 4), (5, 2), (1, 6)])
def test_likelihoods_sum_to_one(length, symbols):
    """Fails if a symbol is predicted from itself or a later one, or the model gives probability to what is no sequence,
    such as the symbol that starts one."""
    model = random_weights(baselines.CausalDenoiser(length, symbols, **SIZE))
    x = torch.tensor(list(itertools.product(range(symbols), repeat=length)))
    for label in range(3):
        log_p = autoregressive_logits(model, x, label).double().log_softmax(-1).gather(2, x[:, :, None])[:, :, 0].sum(1)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert log_p.exp().std() > 0.01 / len(x)  # and not the uniform distribution, which always sums to one
        batch = batch_of(x, torch.full((len(x),), label))
        assert baselines.autoregressive_loss(model, batch).item() == pytest.approx(-log_p.mean().item() / length, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("label, weight", [(1, 1.0), (0, 3.0)])
def test_sequences_come_as_often_as_their_likelihood_says(label, weight):
    """Fails if generation is not that of the model that was trained, or guidance acts at another position."""
    model = random_weights(baselines.CausalDenoiser(3, 3, **SIZE))
    x = torch.tensor(list(itertools.product(range(3), repeat=3)))
    found = baselines.autoregressive_generate(model, torch.full((10000,), label), (weight,) * 3)
    # guided position by position, each renormalized
    p, null = (autoregressive_logits(model, x, number).double().softmax(-1) for number in (label, 2))
    guided = (null + weight * (p - null)).clamp(min=0)
    expected = (guided / guided.sum(-1, keepdim=True)).gather(2, x[:, :, None])[:, :, 0].prod(1)
    assert (shares_of(found, x) - expected).abs().max() < 0.02


# Discrete flow matching


class Exact:
    """The denoiser that a perfect training of the tiny world would give: p(x_0 | X_t) by Bayes' rule over all noise."""
    codebook_size, num_tokens, num_classes = 3, 3, 2

    def __init__(self):
        draws = torch.tensor(list(itertools.product(range(3), repeat=3)))
        self.noise = tokens_to_counts(draws, 3)  # (27, C), all equally likely

    def __call__(self, x_t, t, labels):
        kept = (x_t[:, None] == STATES).double() * (1 - t[:, None, None])  # (B, S, C)
        jumped = (x_t[:, None] == self.noise).double() * t[:, None, None]  # (B, 27, C)
        likelihood = (kept[:, :, None] + jumped[:, None]).prod(3).mean(2)  # (B, S): of X_t given the state
        posterior = likelihood * SHARES.double()[labels]
        posterior = posterior / posterior.sum(1, keepdim=True).clamp(min=1e-300)
        return (posterior @ F.one_hot(STATES, 4).double().flatten(1)).view(-1, 3, 4).clamp(min=1e-30).log()


# Continuous


def test_standardized_and_quantized_counts():
    """Fails if noise and data are of different scales, or rounding loses the sum that every state of the continuous
    diffusion has, or changes more than it must."""
    counts = sample_noise(5000, 12, 30, "multinomial")
    x = baselines.standardize(counts, 30)
    assert x.sum(1).abs().max() < 1e-4 and x.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(baselines.quantize(x, 30), counts)
    C, M = 4, 5
    every = torch.tensor([x for x in itertools.product(range(M + 1), repeat=C) if sum(x) == M])
    x = torch.randn(200, C) / 2  # no number is far below 0 or above M
    exact = (x * (M / C * (1 - 1 / C)) ** 0.5 + M / C).clamp(0, M)
    distance = (every - exact[:, None]).square().sum(2).amin(1)
    assert torch.allclose((baselines.quantize(x, M) - exact).square().sum(1), distance, atol=1e-4)
    wild = torch.tensor([[math.nan, 1.0, 0.0, 2.0], [math.inf, -math.inf, 0.0, 0.0], [1e30, 1e30, -1e30, 0.0]])
    assert (baselines.quantize(wild, M).sum(1) == M).all()


class ExactVelocity:
    """E[X_1 - X_0 | X_t] of the tiny world, where X_1 is Gaussian on the plane of sum 0."""
    codebook_size, num_tokens, num_classes = 3, 3, 2

    def __call__(self, x_t, t, labels):
        x_t, states = x_t[:, :, 0].double(), baselines.standardize(STATES, 3).double()
        t, mixture = t[:, None].double(), torch.cat([SHARES, SHARES.mean(0, keepdim=True)]).double()
        distance = (x_t[:, None] - (1 - t[:, :, None]) * states).square().sum(2)  # (B, S)
        posterior = (mixture[labels].log() - distance / (2 * t ** 2)).softmax(1)
        return ((x_t - posterior @ states) / t)[:, :, None]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("generate, exact", [
    pytest.param(baselines.flow_generate, Exact(), marks=pytest.mark.slow),
    (baselines.continuous_generate, ExactVelocity())])
def test_generation_reaches_a_known_distribution(generate, exact, label):
    """Fails if the steps from noise to data do not follow the process that the model is trained for."""
    found = generate(exact, torch.full((4000,), label), steps=100, times="even")
    assert (shares_of(found, STATES) - SHARES[label]).abs().max() < 0.03


@pytest.mark.parametrize("loss, exact", [(baselines.flow_loss, Exact()),
                                         (baselines.continuous_loss, ExactVelocity())])
def test_the_loss_is_least_for_the_exact_model(loss, exact):
    """Fails if training aims at something else than p(x_0 | X_t), or the mean of X_1 - X_0 at X_t."""
    labels = torch.arange(2).repeat(10000)
    x0 = STATES[torch.multinomial(SHARES[labels], 1)[:, 0]]
    batch, losses = batch_of(x0, labels, 1 - torch.rand(20000)), []
    for model in (exact, lambda *a: 0.7 * exact(*a), lambda *a: 1.5 * exact(*a), lambda x, t, y: exact(x, t, 1 - y),
                  lambda x, t, y: exact(x, (t + 0.2).clamp(max=1), y)):
        torch.manual_seed(1)  # the same noise for all
        losses.append(loss(model, batch))
    assert min(losses[1:]) > losses[0] + 0.003
