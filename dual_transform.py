"""The dual transformation (Sec. 3.2): an unordered set of tokens <-> a vector of counts over the codebook.

    tokens  {7, 2, 2, 5}                  M = 4 tokens, each one of C = 8 codes, in no order
    counts  [0, 0, 2, 0, 0, 1, 0, 1]      X[j] = how often code j occurs (Eq. 2); the sum is M (Eq. 3)

Nothing is lost but the order, and the order means nothing to the set tokenizer. So a model of count vectors, which have
a fixed length C, integer values and a fixed sum, is a model of sets.
"""
import math

import torch


def tokens_to_counts(tokens, codebook_size):
    """Set of tokens -> count vector X (Eq. 2).

    tokens: (B, M) int64 in [0, C), any order, any device.  codebook_size: C.
    Returns counts (B, C) int64, every row sums to M (Eq. 3).
    Raises RuntimeError (by scatter_add, on the CPU) for tokens that are no integers, or outside [0, C).
    """
    counts = tokens.new_zeros(tokens.shape[0], codebook_size)
    return counts.scatter_add_(1, tokens, torch.ones_like(tokens))


def counts_to_tokens(counts):
    """Count vector X -> set of tokens, the inverse of Eq. 2: codes in ascending order, code j repeated X[j] times.

    counts: (B, C) int64, none negative, every row with the same sum M, any device.
    Returns tokens (B, M) int64, ascending in every row.
    Raises ValueError for rows with unequal sums, and RuntimeError (by repeat_interleave, on the CPU)
    for a negative count.
    """
    B, C = counts.shape
    sums = counts.sum(1)
    if (sums != sums[:1]).any():
        raise ValueError(f"every row of counts must have the same sum, got {sums.unique().tolist()}")
    codes = torch.arange(C, device=counts.device).repeat(B)  # (B * C,)
    return codes.repeat_interleave(counts.flatten()).view(B, int(sums[0]) if B else 0)


def set_bits(num_tokens, codebook_size):
    """log2 of the number of sets of M tokens out of C codes, binomial(M + C - 1, C - 1) (Sec. 4.2.4). A sequence
    takes M log2(C) bits."""
    return math.log2(math.comb(num_tokens + codebook_size - 1, codebook_size - 1))
