"""Batches of images for the scripts: which images a step takes, reading them ahead, leaving out unreadable files."""
import functools
import os
import signal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from data import open_dataset, records
from data.command_line import listed


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
    folders = [train_set, test_set] if cfg.data != "digits" else []
    for dataset in folders:
        if len(set(common.all_gather((dataset.fingerprint(contents=False), *dataset.class_names)))) > 1:
            raise ValueError(f"the images in {dataset.root} are not the same on all machines; "
                             "each needs the same files")
        drop_unreadable(dataset, os.path.join(os.path.dirname(cfg.out), "images.json"), cfg.workers)
    check_classes(*folders)
    return train_set, test_set


def check_classes(*folders):
    """ValueError unless all datasets have the same classes."""
    for one, other in zip(folders, folders[1:]):
        only = [sorted({*a.class_names} - {*b.class_names}) for a, b in ((one, other), (other, one))]
        if any(only):
            raise ValueError(f"the classes in {one.root} and {other.root} are not the same; only in the first: "
                             f"{listed(only[0])}; only in the second: {listed(only[1])}")


def without_unreadable(dataset):
    """A dataset to evaluate with, without the image files that can't be read, as a training leaves them out."""
    if hasattr(dataset, "root"):  # the digits are not in files
        drop_unreadable(dataset, None, min(8, os.cpu_count(), len(dataset) // 1000))
    return dataset


def drop_unreadable(dataset, note_path, workers):
    """Leave out the image files that can't be read, so that every epoch and every share of it has the same images.

    Every file is read once, each rank reads a share. What they find is noted in a JSON file, if there is a note_path,
    by split, and holds for as long as names, sizes and times of the files are the same. ValueError where more than 1 %
    can't be read.
    """
    split = os.path.basename(dataset.root)
    made_from = sorted(set(common.all_gather(dataset.fingerprint())))  # machines may have copies with other times
    known = common.all_gather(records.read_json(note_path or "").get(split) if common.is_main() else None)[0]
    if not known or known.get("made_from") != made_from:
        unreadable, contents = check_images(dataset, workers)
        known = {"made_from": made_from, "unreadable": unreadable, "contents": contents}
        if note_path and common.is_main():
            records.write_json(records.read_json(note_path) | {split: known}, note_path)
    elif known["unreadable"] and common.is_main():
        print(f"{len(known['unreadable'])} of {len(dataset)} images in {dataset.root} could not be read when they were "
              f"checked; they are left out ({note_path})", flush=True)
    dataset.drop(list(known["unreadable"]))
    dataset.contents = known["contents"]
    if common.is_main():
        print(dataset.summary(), flush=True)


def check_images(dataset, workers, batch_size=64):
    """Those of a dataset's files that can't be read, {name: reason}, and a text that tells the contents of the others.
    Rank 0 prints the former; ValueError for too many."""
    rank, world_size = common.rank_and_world_size()
    mine = range(rank, len(dataset), world_size)
    batches = DataLoader(mine, batch_size, num_workers=workers, collate_fn=dataset.check,
                         worker_init_fn=leave_signals)
    found, contents = {}, 0
    for some, content in tqdm(batches, desc=f"checking {dataset.root}", disable=not common.is_main(), mininterval=5):
        found, contents = found | some, contents + content
    shares = common.all_gather((found, contents))
    found = dict(sorted(item for some, _ in shares for item in some.items()))
    for name in list(found)[:1000] if common.is_main() else ():
        print(f"{os.path.join(dataset.root, name)} can't be read ({found[name]})", flush=True)
    if len(found) > 0.01 * len(dataset):
        raise ValueError(f"{len(found)} of the {len(dataset)} images in {dataset.root} can't be read, which is more "
                         f"than 1 %; the first is {next(iter(found))} ({next(iter(found.values()))})")
    if common.is_main():
        print(f"{len(found)} of {len(dataset)} images in {dataset.root} can't be read; they are left out", flush=True)
    return found, f"{sum(contents for _, contents in shares) % 2 ** 64:016x}"
