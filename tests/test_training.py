"""What surrounds a training loop: exact resume, signals, checks before the first step, the log, how a script ends."""
import csv
import math
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fsdd import Denoiser
from support import training
from support.files import read_checkpoint, save_checkpoint
from support.optimizers import make_optimizers
from support.training import (Signals, StoppedBySignal, check_finite, check_result, check_training, keep_previous,
                              open_log, replace_suffix, restore_training, run, save_training, stop_by_signal)
from tests.test_distributed import on_ranks


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- how a script ends -----------------------------------------------------------------------------------------------


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("main, code", [
    (lambda: None, 0), (raising(StoppedBySignal(143)), 143), (raising(KeyboardInterrupt), "error: interrupted"),
    (raising(OSError(28, "No space left on device", "a.pt")), "error: [Errno 28] No space left on device: 'a.pt'"),
    (lambda: torch.empty(2 ** 60, dtype=torch.uint8), "error: out of memory: ")])
def test_a_script_ends_with_one_sentence(main, code):
    """Broken: a full disk, a model too large, or a signal would end in a traceback or with the exit code 0."""
    with pytest.raises(SystemExit) as stopped:
        run(main)
    found = stopped.value.code
    assert found == code or str(found).startswith(str(code)) and code != 0 and "\n" not in found


def test_errors_of_the_code_keep_their_traceback():
    """Broken: a bug would be reported as too little memory, without the place where it is."""
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(lambda: torch.zeros(2) + torch.zeros(3))


def test_no_worker_outlives_the_script():
    """Broken: processes that read images ignore SIGTERM and would stay behind for ever."""
    def main():
        worker = multiprocessing.get_context("fork").Process(target=ignore_sigterm, daemon=True)
        worker.start()
        workers.append(worker)

    def ignore_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    workers, began = [], time.time()
    with pytest.raises(SystemExit):
        run(main)
    workers[0].join()
    assert workers[0].exitcode == -signal.SIGKILL and time.time() - began < 30


# --- signals ---------------------------------------------------------------------------------------------------------


def test_signals_are_recorded_and_a_late_second_one_ends(monkeypatch):
    """Broken: Ctrl-C would lose the steps since the last checkpoint, torchrun's second signal would cut the save
    short, or a training that hangs could not be ended."""
    before = [signal.getsignal(number) for number in training.SIGNALS]
    now, sent = [100.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    with Signals() as signals:
        assert signals.received() == 0
        signal.raise_signal(signal.SIGTERM)
        assert signals.received() == signal.SIGTERM
        now[0] = 101.9
        signal.raise_signal(signal.SIGINT)  # no KeyboardInterrupt
        assert not sent
        monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
        now[0] = 102.1
        signal.raise_signal(signal.SIGTERM)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert [signal.getsignal(number) for number in training.SIGNALS] == before  # so that it ends the process
    assert [signal.getsignal(number) for number in training.SIGNALS] == before


def test_a_signal_to_one_rank_stops_all():
    """Broken: the other ranks would wait forever for the gradient of the rank that has stopped."""
    def receive():
        with Signals() as signals:
            if dist.get_rank() == 1:
                signal.raise_signal(signal.SIGTERM)
            return signals.received()

    assert on_ranks(3, receive) == [signal.SIGTERM] * 3


def test_a_stopped_training_says_how_to_resume(capsys):
    """Broken: the exit code would be 0, or the sentence missing."""
    with pytest.raises(StoppedBySignal) as stopped:
        stop_by_signal(signal.SIGINT, "a.pt")
    assert stopped.value.code == 130 and "stopped by SIGINT; a.pt is saved" in capsys.readouterr().err


# --- checkpoints -----------------------------------------------------------------------------------------------------


def make_training(seed, optimizer="muon"):
    """A model, its moving average, its optimizers, and a function that trains them from a step to another."""
    torch.manual_seed(seed)
    model = Denoiser(6, 3, 2, 16, 1, 2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    cfg = SimpleNamespace(optimizer=optimizer, fused_adamw=True, lr=0.1, muon_lr=0.1, weight_decay=0.5, out="a.pt")
    optimizers = make_optimizers(model, cfg, 0.99)

    def train(first, last):
        for step in range(first, last):
            random = torch.Generator().manual_seed(step)
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=random)
            for one in optimizers:
                one.step()
            ema.update_parameters(model)

    return cfg, model, ema, optimizers, train


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_gives_the_same_numbers(optimizer):
    """Broken: weights, their moving average or an optimizer's state would not come back exactly."""
    cfg, model, ema, optimizers, train = make_training(0, optimizer)
    train(0, 3)
    save_training({"kind": "fsdd"}, 3, cfg, model, ema, optimizers, idle=torch.arange(2))
    train(3, 6)
    _, other, other_ema, other_optimizers, resume = make_training(1, optimizer)
    checkpoint = read_checkpoint("a.pt")
    assert checkpoint["kind"] == "fsdd" and checkpoint["training"]["idle"].tolist() == [0, 1]
    assert restore_training(checkpoint, other, other_ema, other_optimizers) == 3
    resume(3, 6)
    for weights, found in ((model, other), (ema, other_ema)):
        assert all(map(torch.equal, weights.state_dict().values(), found.state_dict().values()))
    for first in (3, 4):  # the checkpoint is of the phase before
        assert restore_training(checkpoint, other, other_ema, other_optimizers, first) == first
    assert restore_training(None, other, other_ema, other_optimizers) == 0


def test_numbers_that_are_not_finite_end_the_training():
    """Broken: a training that diverged would go on, save NaN over the good checkpoint, or end as a success."""
    cfg, model, ema, optimizers, train = make_training(0)
    words = "the training has diverged, .*there is no checkpoint"
    with pytest.raises(SystemExit, match=f"the gradient of step 8 is not finite: {words}"):
        check_finite(torch.tensor(math.inf), 7, cfg)
    with pytest.raises(SystemExit, match=f"a.pt gives nan on the test images: {words}"):
        check_result(math.nan, cfg)
    check_finite(torch.tensor(1.0), 7, cfg), check_result(1.0, cfg)
    train(0, 1)
    save_training({}, 1, cfg, model, ema, optimizers)
    good = open("a.pt", "rb").read()
    optimizers[0].state[model.to_logits.bias]["exp_avg"][0] = math.nan
    with pytest.raises(SystemExit, match="after step 2 training optimizers .* is not finite: .*checkpoint is a.pt$"):
        save_training({}, 2, cfg, model, ema, optimizers)
    assert open("a.pt", "rb").read() == good


def test_an_earlier_training_is_kept(capsys):
    """Broken: a new run with the same --out would overwrite the checkpoint and the log of an earlier one."""
    for name in ("a.pt", "a.csv"):
        with open(name, "w") as file:
            file.write(name)
    keep_previous("a.pt")
    assert {name: open(name).read() for name in os.listdir()} == {"a.pt.previous": "a.pt", "a.csv.previous": "a.csv"}
    assert "a.pt already exists; it is kept as a.pt.previous" in capsys.readouterr().out
    open("a.csv", "w").close()
    keep_previous("a.pt")  # a run that was killed before its first checkpoint
    assert open("a.csv.previous").read() == "a.csv"


class Dataset:
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return 9

    def fingerprint(self):
        return self.images


def test_checks_before_the_first_step():
    """Broken: a run would resume on other images, or some ranks have no image in the batch."""
    checkpoint, dataset = {"step": 1, "images": "these"}, Dataset("these")
    check_training(SimpleNamespace(batch_size=9), checkpoint, dataset)
    with pytest.raises(ValueError, match="batch_size 10 must lie between .* 1, and .* 9"):
        check_training(SimpleNamespace(batch_size=10), None, dataset)
    with pytest.raises(ValueError, match="not those of the checkpoint"):
        check_training(SimpleNamespace(batch_size=9), checkpoint, Dataset("others"))

    def check_both():
        said = []
        for batch_size, found in ((1, None), (2, dist.get_rank() and checkpoint), (2, checkpoint)):
            try:
                check_training(SimpleNamespace(batch_size=batch_size), found, dataset)
            except ValueError as problem:
                said.append(str(problem))
        return said

    for said in on_ranks(2, check_both):
        assert len(said) == 2 and "batch_size 1 must lie between" in said[0] and "different checkpoints" in said[1]


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_continues_from_the_checkpoint():
    """Broken: rows from after the last checkpoint would be in the log twice, or a new run append to an old log."""
    write = open_log("a.csv", ["step", "loss"], 0)
    for step in (10, 20, 30):
        write({"step": step, "loss": 0.5, "unknown": 1})
    write = open_log("a.csv", ["step", "loss"], 20)
    write({"step": 30, "loss": 0.25})
    assert open("a.csv").read().split() == ["step,loss", "10,0.5", "20,0.5", "30,0.25"]
    open_log("a.csv", ["step"], 0)
    assert open("a.csv").read().split() == ["step"]


def test_a_kill_while_the_log_is_rewritten(monkeypatch):
    """Broken: a kill right after --resume would leave the log without most of its rows."""
    write = open_log("a.csv", ["step"], 0)
    for step in range(1, 3001):
        write({"step": step})
    whole = open("a.csv").read()

    def killed(self, rows):
        self.writerow(rows[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        open_log("a.csv", ["step"], 3000)
    assert open("a.csv").read() == whole and os.listdir() == ["a.csv"]


def test_only_rank_0_writes(monkeypatch):
    """Broken: all ranks would write one file at the same time."""
    monkeypatch.setenv("RANK", "1")
    cfg, model, ema, optimizers, _ = make_training(0)
    save_training({}, 0, cfg, model, ema, optimizers)
    open_log(replace_suffix("a.pt", ".csv"), ["step"], 0)({"step": 1})
    assert os.listdir() == []
    save_checkpoint({}, "a.pt")
    keep_previous("a.pt")
    assert os.listdir() == ["a.pt"]
