"""What surrounds a training loop: its state in a checkpoint, its log, signals, and how a script ends."""
import contextlib
import csv
import gc
import math
import multiprocessing
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.command_line import stop
from support.distributed import all_gather, is_main, rank_and_world_size
from support.files import atomic_open, naming, not_finite, save_checkpoint
from support.optimizers import warmup_cosine

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(main):
    """Run a script's main() and leave the process group. Errors that a user can fix become one sentence."""
    code = 0
    while os.open(os.devnull, os.O_RDWR) < 2:  # if closed: no file that is opened later must take their place
        pass
    sys.stdout, sys.stderr = (Output(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))
    try:
        main()
    except StoppedBySignal as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        stop("interrupted")
    except OSError as problem:
        stop(str(problem))
    except (MemoryError, RuntimeError) as problem:
        if "closed by peer" in str(problem):
            stop("another process of this run has died; if it printed no reason, it was killed, perhaps because memory "
                 "ran out; the last checkpoint remains")
        if "allocate" not in str(problem):
            raise
        stop(f"out of memory: {str(problem).splitlines()[0]}; take a smaller model, or fewer images at once")
    finally:  # Python ends workers by SIGTERM, which those that read images ignore
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    gc.collect()  # a DDP model that outlives the process group may abort
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(code)


class Output:
    """Standard output or error. A run goes on when nobody reads it any more."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class StoppedBySignal(SystemExit):
    """Raised on all ranks after the same step, with the exit code 128 + the signal's number."""


class Signals:
    """In this context a SIGTERM, SIGINT (Ctrl-C) or SIGHUP is only recorded, so that the training loop can save first.
    A second signal ends the process, unless it comes within 2 seconds: torchrun repeats each signal at once."""

    def __enter__(self):
        self.number, self.first = 0, math.inf
        self.handlers = {number: signal.signal(number, self.record) for number in SIGNALS}
        return self

    def record(self, number, frame):
        if time.monotonic() > self.first + 2:
            self.__exit__()
            os.kill(os.getpid(), number)
        self.number, self.first = number, min(self.first, time.monotonic())

    def received(self):
        """The number of the signal that any rank has received, else 0; the same on all ranks."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number.item()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def stop_by_signal(number, path):
    """End a training that is saved at path, on all ranks."""
    if is_main():
        name = signal.Signals(number).name
        print(f"\nstopped by {name}; {path} is saved, the same command with --resume continues from it",
              file=sys.stderr, flush=True)
    raise StoppedBySignal(128 + number)


# --- checkpoints -----------------------------------------------------------------------------------------------------
def check_training(cfg, checkpoint, dataset):
    """ValueError if the batch does not fit the ranks or the dataset, or the checkpoint is not of this dataset."""
    world_size = rank_and_world_size()[1]
    if not world_size <= cfg.batch_size <= len(dataset):
        raise ValueError(f"batch_size {cfg.batch_size} must lie between the number of processes, {world_size}, and the "
                         f"number of training images, {len(dataset)}")
    if len(set(all_gather(checkpoint and checkpoint["step"]))) > 1:
        raise ValueError("the ranks have different checkpoints; --out must lie in a folder that all machines share")
    if checkpoint and checkpoint["images"] != dataset.fingerprint():
        raise ValueError("the training images or classes are not those of the checkpoint, so --resume can't continue "
                         "from it; restore them, or start a new training")
    if checkpoint and cfg.steps != checkpoint["config"]["steps"] and is_main():
        first, step = getattr(cfg, "proxy_steps", 0), checkpoint["step"]  # the schedule of phase 1 does not change
        before, after = (cfg.lr * warmup_cosine(step - first, steps - first, cfg.warmup, cfg.lr_end)
                         for steps in (checkpoint["config"]["steps"], cfg.steps))
        if step >= first:
            print(f"--steps has changed: the learning rate continues with {after:.3g} in place of {before:.3g}")


def keep_previous(path):
    """Rename the checkpoint of an earlier run, and its log, to NAME.previous, so that a new run does not overwrite
    them."""
    if is_main() and os.path.isfile(path):
        for name in filter(os.path.isfile, (replace_suffix(path, ".csv"), path)):
            os.replace(name, name + ".previous")
        print(f"{path} already exists; it is kept as {path}.previous", flush=True)


def save_training(header, step, cfg, model, ema, optimizers, **state):
    """Write a checkpoint (rank 0 does): the header, a dict, the averaged weights, and all that --resume needs. Ends the
    training on all ranks if a number of it is not finite."""
    state |= {"model": model.state_dict(), "n_averaged": ema.n_averaged,
              "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    state = {"step": step, "config": vars(cfg), "weights": ema.module.state_dict(), "training": state}
    if where := not_finite(state):
        diverged(f"after step {step} {where} is not finite", cfg)
    if is_main():
        save_checkpoint(header | state, cfg.out)


def restore_training(checkpoint, model, ema, optimizers, first=0):
    """Load the training state of a checkpoint, if it is from after step first. Returns the step to continue from."""
    if not checkpoint or checkpoint["step"] <= first:
        return first
    training = checkpoint["training"]
    model.load_state_dict(training["model"])
    ema.module.load_state_dict(checkpoint["weights"])
    ema.n_averaged.copy_(training["n_averaged"])
    for optimizer, state in zip(optimizers, training["optimizers"]):
        optimizer.load_state_dict(state)
    return checkpoint["step"]


def diverged(what, cfg):
    """End a training whose numbers are no longer finite."""
    good = next(filter(os.path.isfile, (cfg.out, cfg.out + ".previous")), None)
    stop(f"{what}: the training has diverged, so try a smaller learning rate; "
         f"{f'the last checkpoint is {good}' if good else 'there is no checkpoint'}")


# --- log and progress bar --------------------------------------------------------------------------------------------
def replace_suffix(path, suffix):
    """The path of a file next to a checkpoint: tokenizer.pt -> tokenizer.csv."""
    return os.path.splitext(path)[0] + suffix


def open_log(path, columns, step):
    """Open a CSV log and return the function that writes a row, a dict. A run that resumes at a step keeps the rows up
    to it."""
    if not is_main():
        return lambda row: None
    rows = []
    if os.path.isfile(path) and step:
        with open(path, newline="", errors="replace") as file:
            rows = [row for row in file if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= step]
    with atomic_open(path, "w", newline="") as file:
        file.writelines([",".join(columns) + "\r\n", *rows])
    writer = csv.DictWriter(open(path, "a", newline="", buffering=1), columns, extrasaction="ignore")
    return naming(path)(writer.writerow)


def progress_bar(start, steps, batch_size):
    """A tqdm bar over training steps that counts images, on rank 0; without a terminal, a line now and then."""
    tty = sys.stderr.isatty()
    return tqdm(range(start, steps), total=steps, initial=start, unit=" images", unit_scale=batch_size,
                disable=not is_main(), mininterval=0.5 if tty else 20, dynamic_ncols=tty)
