"""Batches of images for the scripts: which images a step takes, reading them ahead, leaving out unreadable files."""
import functools
import os
import signal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from data import open_dataset, records


@functools.lru_cache(maxsize=2)
def epoch_order(num_images, seed, epoch):
    """The order of all images in an epoch, (num_images,) int64, drawn from (seed, epoch)."""
    return torch.randperm(num_images, generator=common.generator("cpu", "epoch", seed, epoch))


def batch_indices(num_images, batch_size, seed, step):
    """The images in the global batch of a step, (batch_size,) int64: the same for any number of processes."""
    epoch, i = divmod(step, num_images // batch_size)  # the few images that fill no batch sit out this epoch
    return epoch_order(num_images, seed, epoch)[i * batch_size:(i + 1) * batch_size]


def loader(dataset, batch_size, rows, seed, start, steps, workers):
    """Batches for the steps start..steps - 1: this process's rows of the global batch, as the dataset gives them."""
    def items():
        for step in range(start, steps):
            epoch = step // (len(dataset) // batch_size)
            yield [(i, epoch) for i in batch_indices(len(dataset), batch_size, seed, step)[rows].tolist()]

    return read_ahead(dataset, items(), workers)


def in_order(dataset, parts, workers):
    """Batches for a list of slices of a dataset, one after the other."""
    return read_ahead(dataset, ([(i, 0) for i in range(part.start, part.stop)] for part in parts), workers)


def read_ahead(dataset, batches, workers):
    """What the dataset gives for lists of its items, read ahead by worker processes (0 = in this one, when it is
    needed).

    An image that can't be read any more ends the run with one sentence: the last checkpoint stands.
    """
    for batch in DataLoader(OrSentence(dataset), batch_sampler=batches, num_workers=workers, collate_fn=as_it_is,
                            worker_init_fn=leave_signals, pin_memory=torch.cuda.is_available()):
        if isinstance(batch, str):
            common.stop(f"{batch}; without images.json, which stands beside --out, the next run checks all files again")
        yield batch


class OrSentence(torch.utils.data.Dataset):
    """Batches of a dataset, or the sentence that says why there is none: an exception would come with a worker's
    traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, items):
        try:
            return self.dataset.__getitems__(items)
        except ValueError as problem:
            return str(problem)


def as_it_is(batch):
    return batch


def leave_signals(worker):
    """A process that reads images ends with the process it works for, and leaves the signals to that, which saves a
    checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def open_datasets(cfg, image_size, **training):
    """The training set, with open_dataset()'s further arguments in training, and the test set, the same for all
    processes.

    Image files that can't be read are left out of both (drop_unreadable()). ValueError where that is no good.
    """
    train_set = common.on_every_rank(open_dataset, cfg.data, "train", image_size, **training)
    test_set = common.on_every_rank(open_dataset, cfg.data, "test", image_size)
    for dataset in (train_set, test_set) if cfg.data != "digits" else ():
        if len(set(common.all_gather((dataset.fingerprint(), *dataset.class_names)))) > 1:
            raise ValueError(f"the images in {dataset.root} are not the same on all machines; "
                             "each needs the same files")
        drop_unreadable(dataset, os.path.join(os.path.dirname(cfg.out), "images.json"), cfg.workers)
    return train_set, test_set


def drop_unreadable(dataset, note_path, workers):
    """Leave out the image files that can't be read, so that every epoch and every share of it has the same images.

    Every file is read once, each rank reads a share. What they find is noted in a JSON file, by split, and holds for
    as long as names and sizes of the files are the same. ValueError where more than 1 % can't be read.
    """
    split, made_from = os.path.basename(dataset.root), dataset.fingerprint()
    known = common.all_gather(records.read_json(note_path).get(split) if common.is_main() else None)[0]
    if not known or known.get("made_from") != made_from:
        known = {"made_from": made_from, "unreadable": check_images(dataset, workers)}
        if common.is_main():
            records.write_json(records.read_json(note_path) | {split: known}, note_path)
    elif known["unreadable"] and common.is_main():
        print(f"{len(known['unreadable'])} of {len(dataset)} images in {dataset.root} could not be read when they were "
              f"checked; training goes without them ({note_path})", flush=True)
    dataset.drop(list(known["unreadable"]))


def check_images(dataset, workers, batch_size=64):
    """Those of a dataset's files that can't be read, {name: reason}. Rank 0 prints them; ValueError for too many."""
    rank, world_size = common.rank_and_world_size()
    mine = range(rank, len(dataset), world_size)
    batches = DataLoader(mine, batch_size, num_workers=workers, collate_fn=dataset.unreadable,
                         worker_init_fn=leave_signals)
    found = {}
    for some in tqdm(batches, desc=f"checking {dataset.root}", disable=not common.is_main(), mininterval=5):
        found |= some
    found = dict(sorted(item for some in common.all_gather(found) for item in some.items()))
    for name in list(found)[:1000] if common.is_main() else ():
        print(f"{os.path.join(dataset.root, name)} can't be read ({found[name]})", flush=True)
    if len(found) > 0.01 * len(dataset):
        raise ValueError(f"{len(found)} of the {len(dataset)} images in {dataset.root} can't be read, which is more "
                         f"than 1 %; the first is {next(iter(found))} ({next(iter(found.values()))})")
    if common.is_main():
        print(f"{len(found)} of {len(dataset)} images in {dataset.root} can't be read; training goes without them",
              flush=True)
    return found
