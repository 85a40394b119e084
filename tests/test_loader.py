"""Batches of images: every image once an epoch, the same for any number of ranks and workers, and reading errors."""
import multiprocessing
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from data import loader, open_dataset
from support.distributed import chunks, shard
from support.training import Signals, run
from tests.image_folder import add_truncated_image, make_image_folder
from tests.scripts import fork_ranks, on_ranks


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_image_folder(folder, 100)
    return str(folder)


@pytest.fixture
def copy(images, tmp_path):
    return shutil.copytree(images, tmp_path / "copy")


def test_an_epoch_has_every_image_once():
    """Fails if images repeat within an epoch, or if all epochs have the same order."""
    N, B = 103, 10
    steps = [loader.batch_indices(N, B, seed=5, step=step) for step in range(30)]
    epochs = [torch.cat(steps[i:i + 10]) for i in (0, 10, 20)]
    for epoch in epochs:
        assert len(epoch.unique()) == 100 and epoch.min() >= 0 and epoch.max() < N
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(steps[13], loader.batch_indices(N, B, seed=5, step=13))
    assert not torch.equal(steps[13], loader.batch_indices(N, B, seed=6, step=13))


def test_batches_do_not_depend_on_ranks_workers_or_a_resume(images):
    """Fails if an image is missing from an epoch or occurs twice in it, or if crops depend on the number of ranks or
    workers."""
    dataset = open_dataset(images, "train", 24, crop="random", flip=True, seed=3)
    B, steps = 20, 10  # two epochs
    expected = [images for images, _ in loader.training_batches(dataset, B, slice(0, B), 3, 0, steps, workers=0)]
    for world_size, workers, start in ((1, 2, 0), (2, 0, 0), (3, 1, 0), (1, 1, 7)):
        ranks = [loader.training_batches(dataset, B, shard(B, rank, world_size), 3, start, steps, workers)
                 for rank in range(world_size)]
        found = [torch.cat([images for images, _ in batch]) for batch in zip(*ranks, strict=True)]
        assert len(found) == steps - start and all(map(torch.equal, found, expected[start:])), (world_size, workers)
    for epoch in range(2):
        found = sorted(image.numpy().tobytes() for batch in expected[5 * epoch:5 * epoch + 5] for image in batch)
        assert found == sorted(dataset.read(i, epoch).transpose(2, 0, 1).tobytes() for i in range(100))
        assert len(set(found)) == 100


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_can_not_be_read(workers, copy):
    """Fails if a damaged file ends the training in a traceback, or goes unnoticed."""
    path = add_truncated_image(copy)
    dataset = open_dataset(str(copy), "train", 24)
    truncated = dataset.names.tolist().index(os.fsencode(os.path.relpath(path, dataset.root)))
    batches = loader.read_slices(dataset, [slice(truncated + 1, truncated + 9), *chunks(slice(0, 100), 20)], workers)
    first = dataset.__getitems__([(i, 0) for i in range(truncated + 1, truncated + 9)])
    assert all(map(torch.equal, next(batches), first))
    with pytest.raises(SystemExit) as stopped:
        run(lambda: list(batches))  # as a script does; it ends the workers
    assert stopped.value.code.startswith(f"error: {path} can't be read (OSError: image file is truncated")
    assert stopped.value.code.endswith("replace it by an image of the same name")
    assert "\n" not in stopped.value.code


class Killed(torch.utils.data.Dataset):
    """16 images, whose second epoch kills the process that reads it."""

    def __len__(self):
        return 16

    def __getitems__(self, items):
        if items[0][1] == 1:  # epoch 1
            time.sleep(2)  # until the batches of epoch 0 have arrived
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(items), 3, 4, 4, dtype=torch.uint8), torch.zeros(len(items), dtype=torch.int64)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_training_after_a_save(capsys):
    """Fails if a worker that is killed for its memory ends the run in a traceback, or before a checkpoint is saved."""
    with Signals() as signals:
        seen = list(loader.training_batches(Killed(), 8, slice(0, 8), 0, 0, 4, workers=1))
        assert len(seen) == 2 and signals.received() == signal.SIGTERM  # after the steps of epoch 0
    assert "a process that reads images has died" in capsys.readouterr().err


class Endless(Killed):
    """Images of 1 MB, which fill the pipe to the training process, so that a worker waits for it."""

    def __getitems__(self, items):
        return torch.zeros(len(items), 3, 600, 600, dtype=torch.uint8), torch.zeros(len(items), dtype=torch.int64)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_rank_takes_its_readers_along():
    """Fails if the workers of a killed rank live on: they keep its connections open, for which the others wait."""
    def train():
        batches = loader.training_batches(Endless(), 8, slice(0, 8), 0, 0, 10 ** 6, workers=2)
        next(batches)
        with open(f"workers{os.environ['RANK']}", "w") as file:
            file.write(" ".join(str(process.pid) for process in multiprocessing.active_children()))
        dist.init_process_group("gloo")
        if dist.get_rank() == 1:
            time.sleep(1)  # until the workers wait
            os.kill(os.getpid(), signal.SIGKILL)
        run(dist.barrier)

    began = time.monotonic()
    assert fork_ranks(2, train) == [1, -signal.SIGKILL] and time.monotonic() - began < 10
    for worker in (open("workers0").read() + " " + open("workers1").read()).split():
        assert not os.path.exists(f"/proc/{worker}") or open(f"/proc/{worker}/stat").read().split()[2] == "Z"


def test_images_do_not_travel_through_shared_memory(images):
    """Fails if a training with workers hangs where /dev/shm is small, as in containers."""
    def read(part):
        with mock.patch("torch.multiprocessing.reductions.reduce_storage", side_effect=AssertionError):
            return list(loader.read_slices(open_dataset(images, "train", 24), [part], workers=1))[0]

    assert read(slice(0, 8))[0].shape == (8, 3, 24, 24)


def test_train_and_val_have_the_same_classes(copy):
    """Fails if a label means different classes in the two splits, or if the error does not name these classes."""
    cfg = SimpleNamespace(data=str(copy))
    train_set, test_set = loader.open_datasets(cfg, 24, crop="random")
    assert (len(train_set), len(test_set), train_set.crop, test_set.crop) == (100, 25, "random", "center")
    for number in range(4):
        (copy / "val" / f"d{number}").rename(copy / "val" / f"other{number}")
    with pytest.raises(ValueError, match="train and .*val are .*; only one of them has d0, d1, d2 and 5 more$"):
        loader.open_datasets(cfg, 24)


def test_all_ranks_have_the_same_images(images, copy):
    """Fails if ranks train on different images."""
    os.remove(copy / "train" / "d1" / "00001.JPEG")

    def open_on_each():
        assert len(loader.open_datasets(SimpleNamespace(data=images), 24)[0]) == 100
        with pytest.raises(ValueError, match="train are not the same on all machines; each needs the same files"):
            loader.open_datasets(SimpleNamespace(data=str(copy) if dist.get_rank() else images), 24)

    on_ranks(2, open_on_each)
