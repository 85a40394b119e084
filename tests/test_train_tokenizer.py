"""Stage 1 as it is run: resumed runs, any number of processes, revived codes, clear errors."""
import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import common
import train_tokenizer
from tests.test_common import ROOT, assert_one_sentence, run

TINY = ["--recipe=digits", "--width=16", "--heads=2", "--encoder_layers=1", "--decoder_layers=1", "--num_tokens=4",
        "--codebook_size=16", "--batch_size=12", "--device_batch=5", "--steps=60", "--warmup=3", "--revive_after=2",
        "--log_every=1", "--save_every=3", "--picture_every=100", "--bf16=off", "--device=cpu"]


def read_log(path):
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def kill_in_the_middle(script, arguments, folder, log, processes):
    """Start a script and kill it once its log has some rows beyond the first checkpoint."""
    kill_when(lambda: os.path.exists(log) and len(open(log).readlines()) > 5, script, arguments, folder, processes)


def kill_when(ready, script, arguments, folder, processes):
    """Start a script and send SIGKILL to it and its children once ready() holds."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    process = subprocess.Popen([sys.executable, *start, os.path.join(ROOT, script), *arguments], cwd=folder,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    until = time.time() + 90
    while time.time() < until and process.poll() is None:
        if ready():
            break
        time.sleep(0.005)
    children = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    doomed = {process.pid}  # torchrun's workers are in sessions of their own, so they are found by their parents
    for _ in range(5):
        doomed |= {int(pid) for pid, parent in zip(children[::2], children[1::2]) if int(parent) in doomed}
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def assert_same_checkpoint(path, other):
    """Both checkpoints hold the very same numbers, the optimizers' included."""
    def compare(ours, theirs, place):
        if torch.is_tensor(ours):
            assert torch.equal(ours, theirs), place
        elif isinstance(ours, (dict, list, tuple)):
            assert len(ours) == len(theirs), place
            for key in ours if isinstance(ours, dict) else range(len(ours)):
                compare(ours[key], theirs[key], f"{place} {key}")
        else:
            assert ours == theirs, place

    ours, theirs = (torch.load(p, weights_only=True) for p in (path, other))
    for name in ("step", "weights", "training"):
        compare(ours[name], theirs[name], name)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_exactly(processes, tmp_path):
    """Broken: after a kill at any moment, --resume would not give the very numbers of the unbroken run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    finished = run("train_tokenizer.py", *TINY, folder=whole, processes=processes)
    assert finished.returncode == 0, finished.stderr
    kill_in_the_middle("train_tokenizer.py", TINY, killed, killed / "tokenizer.csv", processes)
    assert 3 <= torch.load(killed / "tokenizer.pt", weights_only=True)["step"] < 60
    finished = run("train_tokenizer.py", "--resume", folder=killed, processes=processes)
    assert finished.returncode == 0, finished.stderr
    assert read_log(whole / "tokenizer.csv") == read_log(killed / "tokenizer.csv")
    assert_same_checkpoint(whole / "tokenizer.pt", killed / "tokenizer.pt")


def test_any_number_of_processes_trains_alike(tmp_path):
    """Broken: the global batch, its shuffle, or the average of the gradients would hang on the number of processes."""
    logs = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        finished = run("train_tokenizer.py", *TINY, "--steps=4", "--optimizer=adamw", folder=folder, processes=processes)
        assert finished.returncode == 0, finished.stderr
        logs.append(read_log(folder / "tokenizer.csv"))
    assert len(logs[0]) == 4
    for log in logs[1:]:
        for ours, theirs in zip(logs[0], log):
            for key in ("step", "loss", "mse", "quantizer", "lr"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_what_a_run_leaves(tmp_path):
    """Broken: the checkpoint could not be read safely, the picture or the last line would be missing, or the run before lost."""
    finished = run("train_tokenizer.py", *TINY, "--steps=3", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("recipe digits: as asked for")
    for words in ("mean squared error", "codes in use", "distinct codes"):
        assert words in finished.stdout.splitlines()[-1]
    assert {"loss", "PSNR", "codes in use", "images/s"} <= {word for word in ("loss", "PSNR", "codes in use", "images/s")
                                                            if word in finished.stderr}  # the progress bar
    first = (tmp_path / "tokenizer.pt").read_bytes()
    assert (tmp_path / "tokenizer.png").stat().st_size > 1000
    assert torch.load(tmp_path / "tokenizer.pt", weights_only=True)["step"] == 3
    finished = run("train_tokenizer.py", *TINY, "--steps=2", folder=tmp_path)
    assert "kept as tokenizer.pt.previous" in finished.stdout
    assert (tmp_path / "tokenizer.pt.previous").read_bytes() == first


def test_unused_codes_are_revived():
    """Broken: codes that no image uses would stay dead, or codes in use would be moved."""
    cfg = SimpleNamespace(revive_after=3, batch_size=4, num_tokens=5)
    model, average = torch.zeros(6, 2), torch.zeros(6, 2)
    idle, latents = torch.tensor([0, 3, 2, 9, 1, 0]), torch.randn(4, 5, 2)
    train_tokenizer.revive([model, average], idle, latents, slice(0, 4), common.generator("cpu", "step", 0), cfg)
    assert idle.tolist() == [0, 0, 2, 0, 1, 0] and torch.equal(model, average)
    moved = model.abs().sum(1) > 0
    assert moved.tolist() == [False, True, False, True, False, False]
    for code in model[moved]:
        assert (latents.flatten(0, 1) == code).all(1).any()


def test_counting_use():
    """Broken: a code would be thought idle while images use it."""
    idle = torch.tensor([0, 5, 7, 0])
    assert train_tokenizer.count_use(idle, torch.tensor([[1, 1], [3, 1]])) == 0.5  # two of the four codes are in use
    assert idle.tolist() == [1, 0, 8, 0]


def test_uniformity():
    """Broken: the loss would not fall when an image's latents spread out."""
    crowded = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    apart = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert train_tokenizer.uniformity(crowded).item() == pytest.approx(1.0)
    assert train_tokenizer.uniformity(apart).item() == pytest.approx((1 + torch.tensor(-4.0).exp().item()) / 2)


@pytest.mark.parametrize("arguments, words", [
    (["--width=15"], ["width 15 is not a multiple of heads 2"]), (["--patch_size=5"], ["image_size 28", "patch_size 5"]),
    (["--batch_size=0"], ["--batch_size", "at least 1"]), (["--optimizer=sgd"], ["optimizer", "sgd"]), (["--stepz=3"], ["--stepz"]),
    (["--data=nowhere"], ["nowhere/train"]), (["--resume", "--out=none.pt"], ["no checkpoint none.pt"]),
    (["--device=cuda:99"], ["--device cuda:99"]), (["--steps=0"], ["steps"]),
    (["--bf16=maybe"], ["bf16", "maybe"]), (["--seed=-1"], ["--seed"]), (["--image_size=32", "--patch_size=8"], ["28 pixels"]),
    (["--flip=true"], ["mirrored"]), (["--out=no/t.pt"], ["no folder no"]),
])
def test_mistakes_get_one_sentence(arguments, words, tmp_path):
    """Broken: a mistake on the command line would end in a traceback, or cost what is on disk."""
    (tmp_path / "tokenizer.pt").write_bytes(b"precious")
    assert_one_sentence(run("train_tokenizer.py", *TINY, *arguments, folder=tmp_path), *words)
    assert (tmp_path / "tokenizer.pt").read_bytes() == b"precious"
