"""What surrounds a training loop: exact resume, signals, checks before the first step, the log, how a script ends."""
import math
import os
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

from support import training
from support.optimizers import set_lr
from support.training import (Signals, StoppedBySignal, check_training, keep_previous, open_log, run,
                              save_training)
from tests.scripts import on_ranks


@pytest.mark.parametrize("error, code", [
    (None, 0), (StoppedBySignal(143), 143), (KeyboardInterrupt, "error: interrupted"),
    (OSError(28, "No space left on device", "a.pt"), "error: [Errno 28] No space left on device: 'a.pt'"),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "error: another process of this run"),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Read error: Connection reset by peer"), "error: another process"),
    (dist.DistNetworkError("The client socket has failed to connect"), "error: another process of this run has died"),
    (RuntimeError("can't start new thread"), "error: out of memory or threads: can't start new thread; take"),
    (MemoryError(), "error: out of memory")])
def test_a_script_ends_with_one_sentence(error, code):
    """Fails if a full disk or a signal ends a script with a traceback or with the exit code 0."""
    with pytest.raises(SystemExit) as stopped:
        run(mock.Mock(side_effect=error))
    assert stopped.value.code == code or isinstance(code, str) and stopped.value.code.startswith(code)


def test_sizes_beyond_memory_end_with_one_sentence():
    """Fails if a model that does not fit into memory ends in a traceback, or if a bug is reported as a lack of
    memory."""
    with pytest.raises(SystemExit, match="^error: out of memory[^\n]*: [^\n]*; take a smaller model"):
        run(lambda: torch.empty(2 ** 60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(lambda: torch.zeros(2) + torch.zeros(3))


def test_signals_are_recorded_and_a_late_second_one_ends(monkeypatch):
    """Fails if Ctrl-C loses the steps since the last checkpoint, if torchrun's second signal interrupts the save, or if
    a training that hangs can't be ended."""
    before = [signal.getsignal(number) for number in training.SIGNALS]
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"} == {
        signal.Signals(number).name for number in training.SIGNALS}  # by which clusters announce the end of a job
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
    """Fails if the other ranks wait forever for the gradient of a rank that has stopped."""
    def receive():
        with Signals() as signals:
            if dist.get_rank() == 1:
                signal.raise_signal(signal.SIGTERM)
            return signals.received()

    assert on_ranks(3, receive) == [signal.SIGTERM] * 3


def test_a_resumed_training_follows_its_new_schedule():
    """Fails if a training that resumes with more --steps keeps the final learning rate of its old schedule."""
    weight = torch.nn.Parameter(torch.zeros(2))
    old, new = (torch.optim.AdamW([weight], lr=0.1) for _ in range(2))
    set_lr([old], 0.0)
    new.load_state_dict(old.state_dict())
    set_lr([new], 0.5)
    assert new.param_groups[0]["lr"] == pytest.approx(0.05)


def test_numbers_that_are_not_finite_end_the_training():
    """Fails if a training that has diverged continues, overwrites the good checkpoint with NaN, or ends with the exit
    code 0."""
    cfg, model = SimpleNamespace(out="a.pt"), torch.nn.Linear(2, 3)
    ema, optimizer = AveragedModel(model), torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_training({}, 1, cfg, model, ema, [optimizer])
    good = open("a.pt", "rb").read()
    optimizer.state[model.bias]["exp_avg"][0] = math.nan
    with pytest.raises(SystemExit, match="after step 2 training optimizers .* is not finite: .* has diverged"):
        save_training({}, 2, cfg, model, ema, [optimizer])
    assert open("a.pt", "rb").read() == good


def test_an_earlier_training_is_kept(tmp_path, capsys):
    """Fails if a new run with the same --out overwrites the checkpoint, the log or the picture of an earlier one, also
    when that is started by mistake more than once."""
    for number in ("", "2", "3"):
        for name in ("a.pt", "a.csv", "a.png"):
            (tmp_path / name).write_text(name + number)
        keep_previous("a.pt")
        assert f"a.pt already exists; it is kept as a.pt.previous{number}\n" in capsys.readouterr().out
    assert {name: open(name).read() for name in os.listdir()} == {
        f"{name}.previous{number}": name + number for name in ("a.pt", "a.csv", "a.png") for number in ("", "2", "3")}


class FewImages(list):
    def fingerprint(self):
        return "".join(map(str, self)) + " abc"


def test_checks_before_the_first_step():
    """Fails if a run resumes on other images, or if a rank has no image of the batch."""
    def check():
        checkpoint = {"step": 1, "images": "012 abc", "config": {"steps": 2}}
        check_training(SimpleNamespace(batch_size=2, steps=2, ema=0), checkpoint, FewImages(range(3)))
        for batch_size, found, images, words in (
                (1, None, range(3), "batch_size 1 must lie between"), (4, None, range(3), "batch_size 4 must lie"),
                (2, checkpoint, range(4), "the names of the training images are not those"),
                (2, dist.get_rank() and checkpoint, range(3), "different checkpoints")):
            with pytest.raises(ValueError, match=words):
                check_training(SimpleNamespace(batch_size=batch_size, steps=2, ema=0), found, FewImages(images))

    on_ranks(2, check)


def test_what_a_resumed_training_is_told(capsys):
    """Fails if another learning rate is taken without a word."""
    config = dict(steps=10, batch_size=2, ema=0.5)
    checkpoint = {"step": 10, "images": "012 abc", "config": config}
    check_training(SimpleNamespace(**config), checkpoint, FewImages(range(3)))
    assert not capsys.readouterr().out
    check_training(SimpleNamespace(**config | {"steps": 20}), checkpoint, FewImages(range(3)))
    assert "--steps has changed, and with it the learning rate" in capsys.readouterr().out


def test_the_log_continues_from_the_checkpoint():
    """Fails if the log has the steps after the last checkpoint twice, or if a new run appends to an old log."""
    write = open_log("a.csv", ["step", "loss"], 0)
    for step in (10, 20, 30):
        write({"step": step, "loss": 0.5, "unknown": 1})
    write = open_log("a.csv", ["step", "loss"], 20)
    write({"step": 30, "loss": 0.25})
    assert open("a.csv").read().split() == ["step,loss", "10,0.5", "20,0.5", "30,0.25"]
    open_log("a.csv", ["step"], 0)
    assert open("a.csv").read().split() == ["step"]
