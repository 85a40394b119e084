"""Ranks: which rows each of them takes, what they exchange, and random numbers that do not depend on their number."""
import pytest
import torch
import torch.distributed as dist

from support import distributed
from support.distributed import all_gather, all_reduce, is_main, local_batch
from support.seeds import generator
from tests.scripts import on_ranks


@pytest.mark.parametrize("total", [1, 7, 128, 255])
def test_shards_cover_all_rows_in_order(total, monkeypatch):
    """Fails if, for some number of ranks, an image is missing from the batch or is in it twice."""
    for world_size in range(1, 12):
        slices = []
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (rank, world_size))
            rows, micro_batches = local_batch(total, device_batch=3)
            local = list(range(total)[rows])
            assert [row for part in micro_batches for row in local[part]] == local
            assert all(part.stop - part.start <= 3 for part in micro_batches)
            slices.append(local)
        assert sum(slices, []) == list(range(total))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_random_numbers_depend_on_purpose_and_key_only():
    """Fails if two steps or two seeds have the same noise, or if a step has other noise after a resume."""
    keys = [(0,), (0, 0), (0, 1), (1, 0), (0, 2), (0, 0, 1)]
    draws = [torch.rand(4, generator=generator("cpu", purpose, *key)).tolist() for purpose in ("step", "epoch")
             for key in keys]
    assert len(set(map(tuple, draws))) == 12
    torch.rand(9)
    assert torch.rand(4, generator=generator("cpu", "step", 0, 1)).tolist() == draws[2]


def test_collectives():
    """Fails if a sum lacks a rank, if gathered values are in another order, or if two ranks write the same file."""
    found = on_ranks(3, lambda: (all_reduce(torch.tensor(dist.get_rank())).item(), all_gather(f"{dist.get_rank()}"),
                                 is_main()))
    assert found == [(3, ["0", "1", "2"], True), (3, ["0", "1", "2"], False), (3, ["0", "1", "2"], False)]
    assert all_reduce(torch.tensor(2)) == 2 and all_gather("a") == ["a"] and is_main()  # without a process group
