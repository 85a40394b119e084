"""The check of a GPU, at toy sizes on the CPU: every part reports, and one that fails is no reason to stop."""
import time
from types import SimpleNamespace

import pytest
import torch

from paper import gpu
from tests.scripts import assert_one_sentence, run_here

TOY = ["--device=cpu", "--toy", "--workers=2"]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_part_reports_and_one_that_fails_does_not_stop_the_others(few_to_train_on, small_digits, monkeypatch,
                                                                        tmp_path):
    """Broken: a part could not be run at all, so that its time on a GPU would be lost; or what follows a failure; or
    the failure would be overlooked."""
    def fail(*_):
        raise RuntimeError("made to fail\nin two lines")

    monkeypatch.setattr(gpu, "check_states", fail)
    finished = run_here(gpu.main, *TOY, folder=tmp_path)
    assert finished.returncode == 1
    reports = dict(text.split("\n", 1) for text in finished.stdout.split("\n\n")[1:-2])
    assert list(reports) == ["states", "adjusting", "sets and counts", "draws", "stop and resume", "digits", "samples",
                             "reading", *gpu.trainings()]
    assert "FAILED after" in reports["states"] and "RuntimeError: made to fail" in reports.pop("states")
    assert all(text.splitlines()[-1].startswith("  passed in") for text in reports.values()), finished.stdout
    assert "two lines" not in finished.stdout and reports["stop and resume"].count("differ by at most 0.0e+00") == 2
    table, sentence = finished.stdout.split("\n\n")[-2:]
    assert table.startswith(f"| CPU, PyTorch {torch.__version__} | images/s") and len(table.splitlines()) == 2 + 6
    assert "by 1" in sentence and "by 2" in sentence and "stage 1, pixels" in sentence


def test_parts_that_pass(tmp_path):
    """Broken: --only would not choose parts, or a success would look like a failure."""
    finished = run_here(gpu.main, *TOY, "--only=count", folder=tmp_path)  # "sets and counts"
    assert finished.returncode == 0 and finished.stdout.count("passed in") == 1, finished.stdout


def test_the_time_bounds_a_part(capsys):
    """Broken: a part that hangs, such as a compilation, would take all of the time that the GPU is lent for."""
    assert gpu.run_parts({"slow": lambda: time.sleep(60)}, time.time(), CPU) == {}
    assert "TimeoutError: the time is over" in capsys.readouterr().out


def test_speed_and_share_of_the_peak(monkeypatch):
    """Broken: the warm-up would count as steps, or the table would have another share of the peak than the one that
    paper/cost.py assumes."""
    clock = SimpleNamespace(perf_counter=lambda: clock.seconds, seconds=0, steps=0)
    monkeypatch.setattr(gpu, "time", clock)

    def train(signals):
        while not signals.received():
            clock.seconds += 2 if clock.steps >= gpu.WARM_UP - 1 else 100  # what comes after the call is the next step
            clock.steps += 1

    assert gpu.step_seconds(train, CPU, 9) == 2 and clock.steps == gpu.WARM_UP - 1 + 5
    monkeypatch.setattr(gpu, "step_seconds", lambda *_: 0.5)
    cost = SimpleNamespace(training=2e12, step=3e12)  # 2 in bfloat16 and 1 in TF32 take the time of 4 in bfloat16
    speed, _, share = gpu.time_training(lambda *_: None, lambda: cost, 1e15, "", CPU, True)
    assert speed == gpu.BATCH / 0.5 and share == pytest.approx(4e12 * speed / 1e15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path):
    """Broken: it would begin hours of work on a CPU, or end in a traceback."""
    assert_one_sentence(run_here(gpu.main, folder=tmp_path), "needs a GPU", "--device cpu --toy")
