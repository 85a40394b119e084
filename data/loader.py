"""Batches of images for the scripts: which images a step uses, and reading them ahead."""
import ctypes
import functools
import signal
import sys

import torch
from torch.utils.data import DataLoader

from data import open_dataset
from support.command_line import list_first, stop
from support.distributed import all_gather
from support.seeds import generator
from support.training import SIGNALS


def batch_indices(num_images, batch_size, seed, step):
    """The images in the global batch of a step, (batch_size,) int64: the same for any number of ranks."""
    epoch, i = divmod(step, num_images // batch_size)  # the last images, fewer than a batch, are left out
    return epoch_order(num_images, seed, epoch)[i * batch_size:(i + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def epoch_order(num_images, seed, epoch):
    """The order of all images in an epoch, (num_images,) int64, drawn from (seed, epoch)."""
    return torch.randperm(num_images, generator=generator("cpu", "epoch", seed, epoch))


def training_batches(dataset, batch_size, rows, seed, start, steps, workers):
    """Images and labels for the steps start..steps - 1: this rank's rows of each global batch. Each batch is read
    before the step that precedes it. If that fails, the training is sent SIGTERM, and so ends after that step with a
    checkpoint."""
    def items():
        for step in range(start, steps):
            epoch = step // (len(dataset) // batch_size)
            yield [(i, epoch) for i in batch_indices(len(dataset), batch_size, seed, step)[rows].tolist()]

    batch = None
    try:
        for following in read_ahead(dataset, items(), workers):
            if batch:
                yield batch
            batch = following
    except SystemExit as problem:
        if not batch:  # no step precedes the failure
            raise
        print(f"\n{problem}", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGTERM)
    yield batch


def read_slices(dataset, slices, workers):
    """Images and labels for each of a list of slices of a dataset."""
    return read_ahead(dataset, ([(i, 0) for i in range(part.start, part.stop)] for part in slices), workers)


def read_ahead(dataset, batches, workers):
    """The dataset's batches for lists of its items, read ahead by worker processes (0: in this process). An image that
    can't be read, or a worker that dies, ends the run with one sentence."""
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=to_arrays,
                             worker_init_fn=start_reader))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a worker's death is noticed here, not in the middle of a step
    try:
        for arrays in loader:
            yield [torch.from_numpy(array) for array in arrays]
    except ValueError as problem:  # an error in a worker is a traceback, whose last line is the sentence
        stop(str(problem).splitlines()[-1].removeprefix("ValueError: "))
    except RuntimeError as problem:
        if "DataLoader worker" not in str(problem):
            raise
        stop(f"a process that reads images has died, perhaps because memory ran out; give fewer --workers "
             f"({str(problem).splitlines()[0]})")


def to_arrays(batch):
    """Tensors would go from a worker to this process through /dev/shm, which is small in containers, and a full one
    stops the training without a message. Arrays go through a pipe."""
    return [tensor.numpy() for tensor in batch]


def start_reader(worker):
    """A worker process leaves signals to the training process, which saves a checkpoint before it ends. On Linux it is
    killed with that process, whose connections to other ranks it would keep open."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def open_datasets(cfg, image_size, **training):
    """The training set and the test set, the same on all ranks. training: further arguments of open_dataset() for the
    training set. ValueError if one of the sets can't be used, or their classes differ."""
    train_set = open_dataset(cfg.data, "train", image_size, **training)
    test_set = open_dataset(cfg.data, "test", image_size)
    for dataset in (train_set, test_set):
        if len(set(all_gather(dataset.fingerprint()))) > 1:
            raise ValueError(f"the images in {dataset.root} are not the same on all machines; "
                             "each needs the same files")
    check_classes(train_set, test_set)
    return train_set, test_set


def check_classes(train_set, test_set):
    """ValueError unless both datasets have the same classes."""
    if different := sorted({*train_set.class_names} ^ {*test_set.class_names}):
        raise ValueError(f"the classes in {train_set.root} and {test_set.root} are not the same; only one of them has "
                         f"{list_first(different)}")
