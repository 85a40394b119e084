"""Masked tokens: the noise masks every token alike, generation unmasks them, and the sums stay exact.

    pytest --slow -rP tests/test_masked.py -k oracle     prints how far each sampler's images are from the data
"""
import math
from itertools import pairwise

import pytest
import torch

import masked
from beyond import SparseDenoiser, refine_by_exchange
from tests.test_beyond import Oracle
from tests.test_fsdd import KnowsData, assert_same_distribution, generator, skewed_counts, small_denoiser

# --- noise and generation --------------------------------------------------------------------------------------------


def test_every_token_is_masked_with_probability_t():
    """Fails if one token is more likely to be masked than another, or if a state does not sum to M."""
    x0 = torch.tensor([[3, 0, 1, 0, 0]]).expand(20_000, -1)  # M = 4, four codes and the mask code
    x1 = masked.sample_noise(len(x0), 5, 4)
    assert x1.tolist() == [[0, 0, 0, 0, 4]] * len(x0)
    for t in (0.0, 0.3, 1.0):
        x = masked.forward_process(x0, x1, torch.full((len(x0),), t), torch.rand(x0.shape, generator=generator(50)))
        assert (x.sum(1) == 4).all() and not x[:, [1, 3]].any()
        binomial = torch.distributions.Binomial(3, torch.tensor(1 - t)).log_prob(torch.arange(4.0)).exp()
        assert_same_distribution(x[:, 0], binomial)
        assert (x[:, 2].double().mean() - (1 - t)).abs() < 0.02


@pytest.mark.parametrize("steps", [1, 3, 7, 6, 40])
def test_unmasked_tokens_stay(steps):
    """Fails if a state does not sum to M, a visible token changes, or tokens stay hidden at the end."""
    denoiser, labels = small_denoiser(13, 6, model_class=SparseDenoiser), torch.arange(60) % 3
    for settings in ({}, {"top_p": 0.7}, {"top_k": 2}, {"guidance": [5.0]}):
        states = list(masked.refine(denoiser, labels, **{"guidance": [1.0]} | settings, steps=steps,
                                    generator=generator(51)))
        assert len(states) == steps + 1
        for before, after in pairwise(states):
            assert (after.sum(1) == 6).all() and (after[:, :-1] >= before[:, :-1]).all()
        assert not states[-1][:, -1].any() and len(states[-1].unique(dim=0)) > 30


def test_unmasking_ends_at_what_the_denoiser_knows():
    """Fails if masked tokens do not become those that a perfect denoiser predicts, also for counts above 1."""
    x0 = torch.nn.functional.pad(skewed_counts(50, 12, 6, 52), (0, 1))
    for steps in (1, 2, 4, 6):
        *_, end = masked.refine(KnowsData(x0), torch.arange(50), guidance=[1.0], steps=steps)
        assert torch.equal(end, x0)


# --- a toy problem with an exact denoiser ----------------------------------------------------------------------------


class MaskedOracle(Oracle):
    """The same with masked tokens, where p(x_0 | X_t) is known: there are C(x_0[j], X_t[j]) equally likely choices of
    the tokens of code j that are visible."""

    def __init__(self, C, M, images):
        super().__init__(C, M, images, "masked")
        self.codebook_size = C + 1

    def __call__(self, x, t, labels):
        counts = range(self.num_tokens + 1)
        choose = torch.tensor([[math.comb(n, k) for k in counts] for n in counts])
        visible = x[:, None, :-1].expand(-1, len(self.data), -1)  # (n, images, C)
        ways = choose[self.data.expand(len(x), -1, -1), visible].prod(2)  # (n, images)
        known = (ways + 1e-9) * self.weights
        data = torch.nn.functional.pad(self.data, (0, 1))  # no token is masked
        one_hot = torch.nn.functional.one_hot(data, self.num_tokens + 1).double()
        return torch.einsum("ni,icm->ncm", known / known.sum(1, keepdim=True), one_hot).clamp(min=1e-12).log().float()

    def distance(self, x):
        return super().distance(x[:, :self.data.shape[1]])


@pytest.mark.parametrize("C, M, images", [(6, 4, 4), pytest.param(8, 3, 5, marks=pytest.mark.slow),
                                          pytest.param(7, 6, 12, marks=pytest.mark.slow)])
def test_one_token_at_a_time_is_exact_by_an_oracle(C, M, images):
    """Fails if M steps, with the exact p(x_0 | X_t), do not draw from the data, or if they do not come closer than
    exchange does in 2 M. Prints all distances."""
    oracle, steps = MaskedOracle(C, M, images), range(1, 2 * M + 1)
    draws = torch.multinomial(oracle.weights, 4000, replacement=True, generator=generator(44))
    noise = oracle.distance(torch.nn.functional.pad(oracle.data[draws], (0, 1)))
    found = oracle.distances(steps, masked.refine)
    exchange = Oracle(C, M, images, "multinomial").distances(steps, refine_by_exchange)
    print(f"C = {C}, M = {M}, in 1 to {2 * M} steps: samples of the data {noise:.3f}", *(
        f"{name} {', '.join(f'{distance:.3f}' for distance in row.values())}" for name, row in (
            ("masked tokens", found), ("exchange", exchange))), sep="; ")
    assert all(found[n] < noise + 0.02 for n in steps if n >= M)
    assert found[1] > found[M] + 0.1 and found[M] < exchange[2 * M]
