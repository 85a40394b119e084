"""Ranks: which rows each of them takes, what they exchange, and random numbers that do not depend on their number."""
import multiprocessing
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from support import distributed
from support.distributed import all_gather, all_reduce, is_main, local_batch
from support.seeds import generator


def on_ranks(world_size, function):
    """function() on every rank of a process group: a list of what it returns. The ranks are forked from this process,
    which takes a fraction of a second; torchrun takes several."""
    with tempfile.TemporaryDirectory() as folder:
        def run_rank(rank):
            os.environ["RANK"] = str(rank)
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
            torch.save(function(), f"{folder}/{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()

        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=run_rank, args=[rank]) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        assert codes == [0] * world_size
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.mark.parametrize("total", [1, 7, 128, 255])
def test_shards_cover_all_rows_in_order(total, monkeypatch):
    """Broken: with some world size an image would be missing from the batch, or be in it twice."""
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
    """Broken: two steps, or two seeds, would draw the same noise, or a step other noise after a resume."""
    keys = [(0,), (0, 0), (0, 1), (1, 0), (0, 2), (0, 0, 1)]
    draws = [torch.rand(4, generator=generator("cpu", purpose, *key)).tolist() for purpose in ("step", "epoch")
             for key in keys]
    assert len(set(map(tuple, draws))) == 12
    torch.rand(9)
    assert torch.rand(4, generator=generator("cpu", "step", 0, 1)).tolist() == draws[2]


def test_collectives():
    """Broken: a sum would lack a rank, what is gathered be in another order, or two ranks write one file."""
    found = on_ranks(3, lambda: (all_reduce(torch.tensor(dist.get_rank())).item(), all_gather(f"{dist.get_rank()}"),
                                 is_main()))
    assert found == [(3, ["0", "1", "2"], True), (3, ["0", "1", "2"], False), (3, ["0", "1", "2"], False)]
    assert all_reduce(torch.tensor(2)) == 2 and all_gather("a") == ["a"] and is_main()  # without a process group
