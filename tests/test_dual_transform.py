"""The dual transformation is a bijection between sets of M tokens and count vectors with sum M (Sec. 3.2)."""
import itertools
import math

import pytest
import torch

from dual_transform import counts_to_tokens, set_bits, tokens_to_counts

SIZES = [(1, 1, 1), (5, 3, 7), (4, 32, 64), (3, 128, 4096), (2, 50, 1), (6, 0, 5), (0, 4, 5)]  # B, M, C


@pytest.mark.parametrize("B, M, C", SIZES)
def test_tokens_come_back_sorted(B, M, C):
    """Fails if an image's tokens change on the way to counts and back, or if counts depend on their order."""
    tokens = torch.randint(C, (B, M))
    counts = tokens_to_counts(tokens, C)
    assert counts.dtype == torch.int64 and counts.shape == (B, C)
    assert (counts.sum(1) == M).all()  # Eq. 3
    assert torch.equal(tokens_to_counts(tokens[:, torch.randperm(M)], C), counts)
    if B:  # an empty batch of counts does not know M
        assert torch.equal(counts_to_tokens(counts), tokens.sort(1).values)
        assert torch.equal(tokens_to_counts(counts_to_tokens(counts), C), counts)


def test_every_set_has_its_own_count_vector():
    """Fails if two sets share a count vector, or if some count vector represents no set."""
    M, C = 4, 5
    sets = torch.tensor(list(itertools.combinations_with_replacement(range(C), M)))
    counts = tokens_to_counts(sets, C)
    vectors = {v for v in itertools.product(range(M + 1), repeat=C) if sum(v) == M}
    assert set(map(tuple, counts.tolist())) == vectors and len(sets) == len(vectors) == math.comb(M + C - 1, C - 1)
    assert torch.equal(counts_to_tokens(counts), sets)
    assert set_bits(M, C) == pytest.approx(math.log2(len(sets)))


def test_counts_by_hand():
    """Fails if the counts of the README's example are not those of Eq. 2."""
    assert tokens_to_counts(torch.tensor([[7, 2, 2, 5]]), 8).tolist() == [[0, 0, 2, 0, 0, 1, 0, 1]]


def test_bits_of_the_paper():
    """Fails if the size of the space of sets for M = 128 and C = 4096 is not the paper's (Sec. 4.2.4)."""
    assert round(set_bits(128, 4096)) == 823


tokens = torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize("wrong, words", [
    (lambda: tokens_to_counts(tokens + 8, 8), "index 8 is out of bounds"),
    (lambda: tokens_to_counts(tokens - 1, 8), "index -1 is out of bounds"),
    (lambda: counts_to_tokens(torch.tensor([[3, 0], [2, 3]])), r"same sum, got \[3, 5\]"),  # 8 tokens, but not 4 a row
    (lambda: counts_to_tokens(torch.tensor([[4, -2, 2]])), "negative"),
])
def test_bad_input_gives_no_result(wrong, words):
    """Fails if values that no set has give the counts or tokens of another set."""
    with pytest.raises((ValueError, RuntimeError), match=words):
        wrong()
