"""What surrounds a training loop: its state in a checkpoint, its log, signals, and how a script ends."""
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
from support.files import atomic_open, not_finite, save_checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
DIVERGED = "the training has diverged, so try a smaller learning rate; the last checkpoint, if there is one, remains"


def run(main):
    """Run a script's main() and leave the process group. Errors that a user can fix become one sentence."""
    code = 0
    try:
        main()
    except StoppedBySignal as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        stop("interrupted")
    except (OSError, MemoryError, RuntimeError) as problem:
        if not explain(problem):
            raise
        stop(explain(problem))
    finally:  # Python ends workers by SIGTERM, which those that read images ignore
        for worker in multiprocessing.active_children():
            worker.kill()
    gc.collect()  # a DDP model that outlives the process group may abort
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(code)


def explain(problem):
    """A sentence about an error that a user can fix; None for any other error."""
    text = " ".join(str(problem).splitlines()[:1])
    if isinstance(problem, OSError):
        return str(problem)
    if isinstance(problem, dist.DistError) or "gloo" in text:
        return (f"another process of this run has died ({text.split('. ')[0]}); if it printed no reason, it was "
                "killed, perhaps because memory ran out; the last checkpoint remains")
    if "is non-finite" in text:  # from clip_grad_norm_()
        return f"the gradient is not finite: {DIVERGED}"
    if type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed: {text}; it needs a C++ compiler such as g++; --compile false does without it"
    if isinstance(problem, MemoryError) or "allocate" in text or "start new thread" in text:
        return f"out of memory or threads: {text}; take a smaller model, fewer images at once or fewer --workers"


class StoppedBySignal(SystemExit):
    """Raised on all ranks after the same step, with the exit code 128 + the signal's number."""


class Signals:
    """In this context SIGNALS, such as Ctrl-C, are only recorded, so that the training loop can save first.
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
    """ValueError if the batch does not fit the ranks or the dataset, or the checkpoint is of images with other names.
    Their contents may change, as a damaged one can be replaced; this is printed."""
    world_size = rank_and_world_size()[1]
    if not world_size <= cfg.batch_size <= len(dataset):
        raise ValueError(f"batch_size {cfg.batch_size} must lie between the number of processes, {world_size}, and the "
                         f"number of training images, {len(dataset)}")
    if len(set(all_gather(checkpoint and checkpoint["step"]))) > 1:
        raise ValueError("the ranks have different checkpoints; --out must lie in a folder that all machines share")
    saved, found = (checkpoint or {}).get("images", "").split(), dataset.fingerprint().split()
    if checkpoint and saved[0] != found[0]:
        raise ValueError("the names of the training images are not those of the checkpoint, so --resume can't continue "
                         "from it; restore them, or start a new training")
    if checkpoint and saved != found and is_main():
        print("some training images have other contents than when the training began; it continues with them")
    if (share := cfg.ema ** cfg.steps) > 0.01 and is_main():
        print(f"--ema {cfg.ema} is too slow for {cfg.steps} steps: the averaged weights, which are evaluated and "
              f"sampled, will be {share:.0%} initial weights")
    if checkpoint and cfg.steps != checkpoint["config"]["steps"] and is_main():
        print("--steps has changed, and with it the learning rate from here on, except in the phase of proxy codes")


def keep_previous(path):
    """Rename what is at the paths of a checkpoint, its log and its picture to NAME.previous, or the first of
    NAME.previous2, NAME.previous3, ... that is free, so that a new run overwrites nothing."""
    names = [*filter(os.path.isfile, (replace_suffix(path, ".csv"), replace_suffix(path, ".png"), path))]
    suffixes = (f".previous{number}" for number in ("", *range(2, 10 ** 6)))
    if is_main() and names:
        suffix = next(suffix for suffix in suffixes if not any(os.path.exists(name + suffix) for name in names))
        for name in names:
            os.replace(name, name + suffix)
            print(f"{name} already exists; it is kept as {name}{suffix}", flush=True)


def save_training(header, step, cfg, model, ema, optimizers, **state):
    """Write a checkpoint (rank 0 does): the header, a dict, the averaged weights, and all that --resume needs. Ends the
    training on all ranks if a number of it is not finite."""
    state |= {"model": model.state_dict(), "n_averaged": ema.n_averaged,
              "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    state = {"step": step, "config": vars(cfg), "weights": ema.module.state_dict(), "training": state}
    if where := not_finite(state):
        stop(f"after step {step} {where} is not finite: {DIVERGED}")
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
    return csv.DictWriter(open(path, "a", newline="", buffering=1), columns, extrasaction="ignore").writerow


def progress_bar(start, steps, batch_size):
    """A tqdm bar over training steps that counts images, on rank 0; without a terminal, a line now and then."""
    tty = sys.stderr.isatty()
    return tqdm(range(start, steps), total=steps, initial=start, unit=" images", unit_scale=batch_size,
                disable=not is_main(), mininterval=0.5 if tty else 20, dynamic_ncols=tty)
