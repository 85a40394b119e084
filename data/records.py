"""What a training keeps on disk: its state in a checkpoint, a log in CSV, notes in JSON; and the progress bar."""
import csv
import json
import os
import sys

from tqdm import tqdm

import common


def beside(path, suffix):
    """The path of a file next to a checkpoint: tokenizer.pt -> tokenizer.csv."""
    return os.path.splitext(path)[0] + suffix


def write_json(content, path):
    """Write a JSON file so that a kill at any moment leaves the old file or the new one, whole."""
    with open(path + ".tmp", "w") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".tmp", path)


def read_json(path):
    """The dict in a JSON file; {} where there is none."""
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError):
        return {}


def open_log(path, columns, step):
    """Open a CSV log and return the function that writes a row, a dict. A run that resumes at a step keeps the rows up
    to it; the log of another run is kept as PATH.previous."""
    if not common.is_main():
        return lambda row: None
    rows = []
    if os.path.isfile(path) and step:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= step]
    elif os.path.isfile(path):
        os.replace(path, path + ".previous")
    writer = csv.DictWriter(open(path, "w", newline="", buffering=1), columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return writer.writerow


def progress_bar(start, steps, batch_size):
    """A tqdm bar over training steps, on rank 0 only, that counts images; without a terminal, a line now and then."""
    tty = sys.stderr.isatty()
    return tqdm(range(start, steps), total=steps, initial=start, unit=" images", unit_scale=batch_size,
                disable=not common.is_main(), mininterval=0.5 if tty else 20, dynamic_ncols=tty)


def check_training(cfg, checkpoint, dataset):
    """ValueError where the batch does not fit the ranks or the data, or the checkpoint is not of this dataset."""
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


def save_training(checkpoint, step, cfg, model, ema, optimizers, **state):
    """Add to a checkpoint the averaged weights and all that --resume needs, and write it (rank 0 does)."""
    if common.is_main():
        state |= {"model": model.state_dict(), "n_averaged": ema.n_averaged,
                  "optimizers": [(optimizer.state_dict(), schedule.state_dict()) for optimizer, schedule in optimizers]}
        state = {"step": step, "config": vars(cfg), "weights": ema.module.state_dict(), "training": state}
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
    """Rename the checkpoint of an earlier run to PATH.previous, so that a new run does not overwrite it."""
    if common.is_main() and os.path.isfile(path):
        os.replace(path, path + ".previous")
        print(f"{path} already exists; it is kept as {path}.previous", flush=True)


def due(step, every, steps):
    """Whether something that is done every so many steps, and at the end, is due after a step (counted from 0)."""
    return (step + 1) % every == 0 or step + 1 == steps
