"""The process group: ranks, collectives, and which part of the work each rank does."""
import os

import torch.distributed as dist


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this is rank 0, which prints and writes files; also before the process group is initialized."""
    return os.environ.get("RANK", "0") == "0"


def all_reduce(tensor):
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value):
    """The value of every rank, anything that can be pickled, as a list in the order of ranks."""
    values = [value] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def shard(total, rank, world_size):
    """The slice of total rows that belongs to a rank; the slices of all ranks cover them in order, without overlap."""
    return slice(total * rank // world_size, total * (rank + 1) // world_size)


def chunks(rows, size):
    """Divide a slice into slices of at most size rows."""
    return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]


def local_batch(batch_size, device_batch):
    """This rank's rows of the global batch, a slice, and the micro-batches of gradient accumulation, slices of these
    rows that start at 0."""
    rows = shard(batch_size, *rank_and_world_size())
    return rows, chunks(slice(0, rows.stop - rows.start), device_batch)
