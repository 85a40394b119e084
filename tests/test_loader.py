"""Batches of images: every image once an epoch, the same for any number of ranks and workers."""
import os
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from data import loader, open_dataset
from support.distributed import shard
from tests.image_folder import make_image_folder
from tests.scripts import on_ranks


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
