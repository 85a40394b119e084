"""What surrounds a training loop: exact resume, signals, checks before the first step, the log, how a script ends."""
import math
import os
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

from support import training
from support.optimizers import set_lr
from support.training import (Signals, StoppedBySignal, check_training, diverged, keep_previous, open_log, run,
                              save_training)
from tests.scripts import ROOT, on_ranks


@pytest.mark.parametrize("error, code", [
    (None, 0), (StoppedBySignal(143), 143), (KeyboardInterrupt, "error: interrupted"),
    (OSError(28, "No space left on device", "a.pt"), "error: [Errno 28] No space left on device: 'a.pt'"),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1"),
     "error: another process of this run has died; if it printed no reason, it was killed, perhaps because memory ran "
     "out; the last checkpoint remains")])
def test_a_script_ends_with_one_sentence(error, code):
    """Broken: a full disk or a signal would end in a traceback or with the exit code 0."""
    with pytest.raises(SystemExit) as stopped:
        run(mock.Mock(side_effect=error))
    assert stopped.value.code == code


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&1 | head -c 1", ">&- 2>&-", "> /dev/full 2>&1"])
def test_a_run_goes_on_without_output(redirection):
    """Broken: when a terminal, tee or head that shows the output goes, hours of training would be lost."""
    script = ("import os, sys, time; from support.training import progress_bar, run\n"
              "def main():\n"
              "    for step in progress_bar(0, 30, 1):\n"
              "        print('step', step, flush=True); print(step, file=sys.stderr); time.sleep(0.01)\n"
              "    print('the end'); open('done', 'w').close()\n"
              "run(main)")
    command = f"{sys.executable} -c \"$SCRIPT\" {redirection}; echo ${{PIPESTATUS[0]}} > code"
    subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": ROOT, "SCRIPT": script}, check=True)
    assert os.path.exists("done") and open("code").read() == "0\n"


def test_windows_is_refused(monkeypatch):
    """Broken: on Windows, signals and forked processes would end in tracebacks."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="^error: Windows is not supported"):
        runpy.run_path(f"{ROOT}/support/__init__.py")


def test_sizes_beyond_memory_end_with_one_sentence():
    """Broken: a model that is too large would end in a traceback, or a bug be reported as too little memory."""
    with pytest.raises(SystemExit, match="^error: out of memory: [^\n]*; take a smaller model"):
        run(lambda: torch.empty(2 ** 60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(lambda: torch.zeros(2) + torch.zeros(3))


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


def test_a_resumed_training_follows_its_new_schedule():
    """Broken: a training that resumes with more --steps would go on with the ended learning rate of the old one."""
    weight = torch.nn.Parameter(torch.zeros(2))
    old, new = (torch.optim.AdamW([weight], lr=0.1) for _ in range(2))
    set_lr([old], 0.0)
    new.load_state_dict(old.state_dict())
    set_lr([new], 0.5)
    assert new.param_groups[0]["lr"] == pytest.approx(0.05)


def test_numbers_that_are_not_finite_end_the_training():
    """Broken: a training that diverged would go on, save NaN over the good checkpoint, or end as a success."""
    cfg, model = SimpleNamespace(out="a.pt"), torch.nn.Linear(2, 3)
    ema, optimizer = AveragedModel(model), torch.optim.AdamW(model.parameters())
    words = "the training has diverged, .*there is no checkpoint"
    with pytest.raises(SystemExit, match=f"the gradient of step 8 is not finite: {words}"):
        diverged("the gradient of step 8 is not finite", cfg)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_training({}, 1, cfg, model, ema, [optimizer])
    good = open("a.pt", "rb").read()
    optimizer.state[model.bias]["exp_avg"][0] = math.nan
    with pytest.raises(SystemExit, match="after step 2 training optimizers .* is not finite: .*checkpoint is a.pt$"):
        save_training({}, 2, cfg, model, ema, [optimizer])
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


class FewImages(list):
    def fingerprint(self):
        return str(self)


def test_checks_before_the_first_step():
    """Broken: a run would resume on other images, or some ranks have no image in the batch."""
    def check():
        said, checkpoint = [], {"step": 1, "images": "[0, 1, 2]", "config": {"steps": 2}}
        for batch_size, found, images in ((2, checkpoint, range(3)), (1, None, range(3)), (4, None, range(3)),
                                          (2, checkpoint, range(4)), (2, dist.get_rank() and checkpoint, range(3))):
            try:
                check_training(SimpleNamespace(batch_size=batch_size, steps=2), found, FewImages(images))
            except ValueError as problem:
                said.append(str(problem))
        return said

    for said in on_ranks(2, check):
        assert len(said) == 4 and "batch_size 1 must lie between" in said[0] and "batch_size 4 must lie" in said[1]
        assert "not those of the checkpoint" in said[2] and "different checkpoints" in said[3]


def test_a_jump_of_the_learning_rate_is_announced(capsys):
    """Broken: a resumed run with more --steps would continue at another rate, and nothing would say so."""
    config = dict(steps=10, batch_size=2, lr=0.1, lr_end=0.1, warmup=2)
    checkpoint = {"step": 10, "images": "[0, 1, 2]", "config": config}
    check_training(SimpleNamespace(**config), checkpoint, FewImages(range(3)))
    assert not capsys.readouterr().out
    check_training(SimpleNamespace(**config | {"steps": 20}), checkpoint, FewImages(range(3)))
    assert "the learning rate continues with 0.055 in place of 0.01" in capsys.readouterr().out


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
