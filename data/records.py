"""What a training keeps on disk: its state in a checkpoint, a log in CSV, notes in JSON; and the progress bar."""
import contextlib
import csv
import json
import math
import os
import sys

from tqdm import tqdm

import common
from data import files


def beside(path, suffix):
    """The path of a file next to a checkpoint: tokenizer.pt -> tokenizer.csv."""
    return os.path.splitext(path)[0] + suffix


def write_json(content, path):
    """Write a JSON file so that a kill at any moment leaves the old file or the new one, whole."""
    with files.written(path, "w") as file:
        json.dump(content, file, indent=1)


def read_json(path):
    """The dict in a JSON file; {} where there is none."""
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError):
        return {}


def open_log(path, columns, step):
    """Open a CSV log and return the function that writes a row, a dict. A run that resumes at a step keeps the rows up
    to it."""
    if not common.is_main():
        return lambda row: None
    rows = []
    if os.path.isfile(path) and step:
        with open(path, newline="", errors="replace") as file:
            rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
        rows = [row for row in rows if int(row["step"]) <= step]
    with files.written(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    writer = csv.DictWriter(open(path, "a", newline="", buffering=1), columns, extrasaction="ignore")
    return files.naming(path)(writer.writerow)


def progress_bar(start, steps, batch_size):
    """A tqdm bar over training steps, on rank 0 only, that counts images; without a terminal, a line now and then."""
    tty = sys.stderr.isatty()
    return tqdm(range(start, steps), total=steps, initial=start, unit=" images", unit_scale=batch_size,
                disable=not common.is_main(), mininterval=0.5 if tty else 20, dynamic_ncols=tty)


def check_training(cfg, checkpoint, dataset):
    """ValueError where the batch does not fit the ranks or the data, the checkpoint is not of this dataset, or another
    run writes cfg.out. Returns a context, at whose end others may write it."""
    if not (least := common.rank_and_world_size()[1]) <= cfg.batch_size <= len(dataset):
        raise ValueError(f"batch_size {cfg.batch_size} must lie between the number of processes, {least}, and the "
                         f"number of training images, {len(dataset)}")
    if len(set(common.all_gather(checkpoint and checkpoint["step"]))) > 1:
        raise ValueError("the processes see different checkpoints; --out must lie in a folder that all machines share")
    known = (dataset.fingerprint(), dataset.fingerprint(contents=False))  # the latter in older checkpoints
    if checkpoint and (checkpoint["images"] not in known
                       or checkpoint.get("class_names", dataset.class_names) != dataset.class_names):
        raise ValueError("the training images or classes are not those of the checkpoint, so --resume can't continue "
                         "from it; restore them, or start a new training")
    claim = contextlib.ExitStack()
    common.on_every_rank(lambda: common.is_main() and claim.enter_context(files.claimed(cfg.out)))
    return claim


def check_finite(norm, step, cfg):
    """End the training, on all ranks, at a step whose gradient's norm, the same on all, is not finite."""
    if not norm.isfinite():
        diverged(f"the gradient of step {step + 1} is not finite", cfg.out, cfg.out + ".previous")


def check_result(value, cfg):
    """End, on all ranks, where what the trained model is measured to be, the same on all, is not finite."""
    if not math.isfinite(value):
        diverged(f"{cfg.out} gives {value} on the test images", cfg.out + ".previous")


def diverged(what, *checkpoints):
    """End with a sentence that names the first of the checkpoints that is there."""
    good = next(filter(os.path.isfile, checkpoints), None)
    common.stop(f"{what}: the training has diverged, so try a smaller learning rate; "
                f"{f'the last good checkpoint is {good}' if good else 'there is no good checkpoint'}")


def save_training(checkpoint, step, cfg, model, ema, optimizers, **state):
    """Add to a checkpoint the averaged weights and all that --resume needs, and write it (rank 0 does). All ranks end
    where a number of it is not finite."""
    state |= {"model": model.state_dict(), "n_averaged": ema.n_averaged,
              "optimizers": [(optimizer.state_dict(), schedule.state_dict()) for optimizer, schedule in optimizers]}
    state = {"step": step, "config": vars(cfg), "weights": ema.module.state_dict(), "training": state}
    if where := files.not_finite(state):
        diverged(f"after step {step} {where} is not finite", cfg.out, cfg.out + ".previous")
    if common.is_main():
        common.save_checkpoint(checkpoint | state, cfg.out)


def restore_training(checkpoint, model, ema, optimizers, first=0):
    """Load the training state of a checkpoint, if it is from after step first. Returns the step to go on from."""
    if not checkpoint or checkpoint["step"] <= first:
        return first
    training = checkpoint["training"]
    model.load_state_dict(training["model"])
    ema.module.load_state_dict(checkpoint["weights"])
    ema.n_averaged.copy_(training["n_averaged"])
    restore_optimizers(optimizers, training["optimizers"])
    return checkpoint["step"]


def restore_optimizers(optimizers, states):
    for (optimizer, schedule), (optimizer_state, schedule_state) in zip(optimizers, states):
        optimizer.load_state_dict(optimizer_state)
        schedule.load_state_dict(schedule_state)


def keep_previous(path):
    """Rename the checkpoint of an earlier run, and its log, to PATH.previous, so that a new run does not overwrite
    them; but one that can't be read to PATH.unreadable where there is a PATH.previous."""
    if not common.is_main() or not os.path.isfile(path):
        return
    suffix = ".previous"
    try:
        files.read_checkpoint(path)
    except ValueError:
        suffix = ".unreadable" if os.path.isfile(path + ".previous") else ".previous"
    for name in (beside(path, ".csv"), path):
        if os.path.isfile(name):
            os.replace(name, name + suffix)
    print(f"{path} already exists; it is kept as {path}{suffix}", flush=True)


def due(step, every, steps):
    """Whether something that is done every so many steps, and at the end, is due after a step (counted from 0)."""
    return (step + 1) % every == 0 or step + 1 == steps
