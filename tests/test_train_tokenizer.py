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
from published.discriminator import Discriminator
from published.maskgit_vqgan import VQGAN
from tests.test_common import ROOT, assert_one_sentence, run, run_here
from tests.test_convnext import random_convnext

TINY = ["--recipe=digits", "--width=16", "--heads=2", "--encoder_layers=1", "--decoder_layers=1", "--num_tokens=4",
        "--codebook_size=16", "--batch_size=7", "--device_batch=3", "--steps=60", "--warmup=3", "--revive_after=2",
        "--log_every=1", "--save_every=3", "--picture_every=100", "--bf16=off", "--device=cpu"]


def read_log(path):
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def kill_in_the_middle(script, arguments, folder, log, processes, rows=5, **how):
    """Start a script and end it once its log has so many rows, see kill_when()."""
    return kill_when(lambda: os.path.exists(log) and len(open(log).readlines()) > rows, script, arguments, folder, processes, **how)


def kill_when(ready, script, arguments, folder, processes, sent=signal.SIGKILL, to_one=False):
    """Start a script and, once ready() holds, send a signal to it and its children, or to_one of the training processes.
    Returns its exit code and what it printed as errors."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    process = subprocess.Popen([sys.executable, *start, os.path.join(ROOT, script), *arguments], cwd=folder, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.time() + 90
    while time.time() < until and process.poll() is None:
        if ready():
            break
        time.sleep(0.005)
    children = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    family = [process.pid]  # torchrun's workers are in sessions of their own, so they are found by their parents
    for parent in family:
        family += [int(pid) for pid, its_parent in zip(children[::2], children[1::2]) if int(its_parent) == parent]
    for pid in [family[processes > 1]] if to_one else family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sent)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


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


def test_a_killed_run_resumes_exactly(tmp_path):
    """Broken: after a kill at any moment, --resume would not give the very numbers of the unbroken run (two processes:
    test_imagenet256.py)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    finished = run("train_tokenizer.py", *TINY, folder=whole)
    assert finished.returncode == 0, finished.stderr
    kill_in_the_middle("train_tokenizer.py", TINY, killed, killed / "tokenizer.csv", 1)
    assert 3 <= torch.load(killed / "tokenizer.pt", weights_only=True)["step"] < 60
    finished = run("train_tokenizer.py", "--resume", folder=killed)
    assert finished.returncode == 0, finished.stderr
    assert read_log(whole / "tokenizer.csv") == read_log(killed / "tokenizer.csv")
    assert_same_checkpoint(whole / "tokenizer.pt", killed / "tokenizer.pt")


def test_any_number_of_processes_trains_alike(tmp_path):
    """Broken: the global batch, its shuffle, or the average of the gradients would hang on the number of processes."""
    logs = []
    for processes in (1, 3):  # unequal shares
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
    assert_one_sentence(run_here(train_tokenizer.main, *TINY, *arguments, folder=tmp_path), *words)
    assert (tmp_path / "tokenizer.pt").read_bytes() == b"precious"


# --- the losses of the paper's recipe ----------------------------------------------------------------------------------


def test_hinge_and_lecam():
    """Broken: the discriminator would learn another loss, or its moving averages would not be those of the global batch."""
    cfg = SimpleNamespace(batch_size=6, device_batch=4, lecam=0.5, lecam_ema=0.9)
    images, drawn = torch.randn(6, 1, 2, 2, requires_grad=True), torch.randn(6, 1, 2, 2)
    lecam = torch.tensor([0.3, -0.4])
    loss = train_tokenizer.judge_backward(lambda x: x, images, drawn, lecam, slice(0, 6), cfg)
    real, fake = images.detach(), drawn
    expected = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    expected += 0.5 * ((real.mean((1, 2, 3)) + 0.4).clamp(min=0) ** 2 + (0.3 - fake.mean((1, 2, 3))).clamp(min=0) ** 2).mean()
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(lecam, torch.stack([0.27 + 0.1 * real.mean(), -0.36 + 0.1 * fake.mean()]), atol=1e-6)


@pytest.mark.parametrize("proxy", [True, False])
def test_accumulated_gradients_are_the_batchs(proxy):
    """Broken: the gradient would hang on how many images a device takes at once."""
    model = train_tokenizer.SetTokenizer(32, 3, 16, 6, 12, 4, 32, 2, 1, 1, vqgan_width=32, vqgan_dim=8)
    adversary, images = Discriminator(32), torch.rand(5, 3, 32, 32) * 2 - 1
    networks = SimpleNamespace(vqgan=VQGAN(32, 8, 16), convnext=random_convnext())
    cfg = SimpleNamespace(batch_size=5, num_tokens=6, squared=0.25, perceptual=0.1, adversarial=0.01, uniformity=0.1, bf16="off",
                          lecam=0.001, lecam_ema=0.999)
    gradients, losses = [], []
    for cfg.device_batch in (5, 2, 1):
        model.zero_grad(), adversary.zero_grad()
        random = common.generator("cpu", "step", 0)
        found, _, _, drawn = train_tokenizer.forward_backward(model, images, slice(0, 5), random, cfg, networks, proxy,
                                                              None if proxy else adversary)
        assert all(weight.grad is None for weight in adversary.parameters())  # this loss is not the discriminator's
        if not proxy:
            found["discriminator"] = train_tokenizer.judge_backward(adversary, images, drawn, torch.zeros(2), slice(0, 5), cfg)
        gradients.append([p.grad.clone() for p in [*model.parameters(), *adversary.parameters()] if p.grad is not None])
        losses.append(found)
    assert set(losses[0]) == ({"loss", "proxy", "quantizer"} if proxy else set(train_tokenizer.LOSSES) - {"proxy"})
    for i in (1, 2):
        assert all(torch.allclose(losses[0][name], losses[i][name], atol=1e-5) for name in losses[0])
        assert len(gradients[0]) == len(gradients[i]) > 40
        for whole, parts in zip(gradients[0], gradients[i]):
            assert torch.allclose(whole, parts, atol=1e-5 + 1e-3 * whole.abs().max())
