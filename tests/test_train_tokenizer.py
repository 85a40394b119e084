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
from published.critics import Critics, discriminator_loss
from published.discriminator import Discriminator
from tests.test_common import ROOT, assert_one_sentence, run_here, run_ranks
from tests.test_convnext import random_convnext

TINY = ["--recipe=digits", "--width=16", "--heads=2", "--encoder_layers=1", "--decoder_layers=1", "--num_tokens=4",
        "--codebook_size=16", "--batch_size=7", "--device_batch=3", "--steps=60", "--warmup=3", "--revive_after=2",
        "--log_every=1", "--save_every=3", "--picture_every=100", "--bf16=off", "--device=cpu"]


def read_log(path):
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def kill_in_the_middle(script, arguments, folder, log, processes, rows=5, **how):
    """Start a script and end it once its log has so many rows, see kill_when()."""
    return kill_when(lambda: os.path.exists(log) and len(open(log).readlines()) > rows, script, arguments, folder,
                     processes, **how)


def kill_when(ready, script, arguments, folder, processes, sent=signal.SIGKILL, to_one=False):
    """Start a script and, once ready() holds, send a signal to it and its children, or to_one of the training
    processes.
    Returns its exit code and what it printed as errors."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    process = subprocess.Popen([sys.executable, *start, os.path.join(ROOT, script), *arguments], cwd=folder, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
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


def assert_same_gradients(path, other):
    """After one step AdamW's first moment is the gradient of the global batch, but for a factor."""
    states, others = (torch.load(p, weights_only=True)["training"]["optimizers"] for p in (path, other))
    for (ours, _), (theirs, _) in zip(states, others, strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for i in ours["state"]:
            gradient, its = ours["state"][i]["exp_avg"], theirs["state"][i]["exp_avg"]
            assert (gradient - its).abs().max() <= 0.01 * gradient.abs().max() + 1e-7


def test_a_killed_run_resumes_exactly(tmp_path):
    """Broken: after a kill at any moment, --resume would not give the very numbers of the unbroken run (two processes:
    test_imagenet256.py)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    finished = run_here(train_tokenizer.main, *TINY, folder=whole)
    assert finished.returncode == 0, finished.stderr
    kill_in_the_middle("train_tokenizer.py", TINY, killed, killed / "tokenizer.csv", 1)
    assert 3 <= torch.load(killed / "tokenizer.pt", weights_only=True)["step"] < 60
    finished = run_here(train_tokenizer.main, "--resume", folder=killed)
    assert finished.returncode == 0, finished.stderr
    assert read_log(whole / "tokenizer.csv") == read_log(killed / "tokenizer.csv")
    assert_same_checkpoint(whole / "tokenizer.pt", killed / "tokenizer.pt")


def test_any_number_of_processes_trains_alike(tmp_path):
    """Broken: the global batch, its shuffle, or the average of the gradients would depend on the number of
    processes."""
    alone, three = tmp_path / "1", tmp_path / "3"  # unequal shares of the batch
    alone.mkdir(), three.mkdir()
    options = [*TINY, "--steps=4", "--optimizer=adamw"]
    for finished in (run_here(train_tokenizer.main, *options, folder=alone),
                     run_ranks("train_tokenizer.py", *options, folder=three, processes=3)):
        assert finished.returncode == 0, finished.stderr
    logs = [read_log(folder / "tokenizer.csv") for folder in (alone, three)]
    assert len(logs[0]) == len(logs[1]) == 4
    for ours, theirs in zip(*logs):
        for key in ("step", "loss", "mse", "quantizer", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_what_a_run_leaves(few_to_train_on, tmp_path):
    """Broken: the checkpoint could not be read safely, the picture or the last line would be missing, or the run
    before lost."""
    finished = run_here(train_tokenizer.main, *TINY, "--steps=3", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("recipe digits: as asked for")
    for words in ("mean squared error", "codes in use", "distinct codes"):
        assert words in finished.stdout.splitlines()[-1]
    assert all(word in finished.stderr for word in ("step 3", "loss", "PSNR", "codes in use", "images/s"))  # the bar
    first = (tmp_path / "tokenizer.pt").read_bytes()
    assert (tmp_path / "tokenizer.png").stat().st_size > 1000
    assert torch.load(tmp_path / "tokenizer.pt", weights_only=True)["step"] == 3
    finished = run_here(train_tokenizer.main, *TINY, "--steps=2", folder=tmp_path)
    assert "kept as tokenizer.pt.previous" in finished.stdout
    assert (tmp_path / "tokenizer.pt.previous").read_bytes() == first


def code_use(idle, **settings):
    """CodeUse of a codebook (C, 2) of zeros and its average, at some numbers of steps without use."""
    cfg = SimpleNamespace(**dict(revive_after=0, revive_until=0.8, steps=10, batch_size=4, num_tokens=5) | settings)
    codes = train_tokenizer.CodeUse([torch.zeros(len(idle), 2, requires_grad=True), torch.zeros(len(idle), 2)], cfg)
    codes.idle = torch.tensor(idle)
    return codes


def test_dead_codes_are_reset():
    """Broken: codes that no image uses would stay dead, or codes in use would be moved."""
    latents = torch.randn(4, 5, 2)
    for step in (7, 8):
        codes = code_use([4, 2, 1, 8, 0, 4], revive_after=3)
        codes.see(torch.tensor([[0, 5, 0, 5, 0]] * 2), latents[:2]), codes.see(torch.tensor([[0] * 5] * 2), latents[2:])
        codes.update(step, slice(0, 4), common.generator("cpu", "step", 0))
        model, average = codes.codebooks
        assert torch.equal(model, average)
        moved = model.abs().sum(1) > 0
        if step == 8:  # revive_until
            assert codes.idle.tolist() == [0, 3, 2, 9, 1, 0] and not moved.any()
            continue
        assert codes.idle.tolist() == [0, 0, 2, 0, 1, 0]
        assert moved.tolist() == [False, True, False, True, False, False]
        for code in model[moved]:
            assert (latents.flatten(0, 1) == code).all(1).any()


def test_counting_use():
    """Broken: a code would be thought idle while images use it, or a step would count the batches before it too."""
    codes, latents = code_use([0, 5, 7, 0]), torch.zeros(1, 2, 2)
    codes.see(torch.tensor([[1, 1]]), latents), codes.see(torch.tensor([[3, 1]]), latents)
    codes.update(0, slice(0, 2), None)
    assert codes.in_use == 0.5 and codes.idle.tolist() == [1, 0, 8, 0]  # two of the four codes are in use
    codes.see(torch.tensor([[2, 2]]), latents)
    codes.update(1, slice(0, 1), None)
    assert codes.in_use == 0.25 and codes.idle.tolist() == [2, 1, 0, 1]


def test_uniformity():
    """Broken: the loss would not fall when an image's latents spread out."""
    crowded = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    apart = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert train_tokenizer.uniformity(crowded).item() == pytest.approx(1.0)
    assert train_tokenizer.uniformity(apart).item() == pytest.approx((1 + torch.tensor(-4.0).exp().item()) / 2)


@pytest.mark.parametrize("arguments, words", [
    (["--width=15"], ["width 15 is not a multiple of heads 2"]),
    (["--patch_size=5"], ["image_size 28", "patch_size 5"]),
    (["--out="], ["--out must not be empty"]),
    (["--batch_size=0"], ["--batch_size", "at least 1"]), (["--optimizer=sgd"], ["optimizer", "sgd"]),
    (["--stepz=3"], ["--stepz"]),
    (["--data=nowhere"], ["nowhere/train"]), (["--resume", "--out=none.pt"], ["no checkpoint none.pt"]),
    (["--device=cuda:99"], ["--device cuda:99"]), (["--steps=0"], ["steps"]),
    (["--bf16=maybe"], ["bf16", "maybe"]), (["--seed=-1"], ["--seed"]),
    (["--image_size=32", "--patch_size=8"], ["28 pixels"]),
    (["--flip=true"], ["mirrored"]), (["--out=no/t.pt"], ["no folder no"]),
])
def test_mistakes_get_one_sentence(arguments, words, tmp_path):
    """Broken: a mistake on the command line would end in a traceback, or cost what is on disk."""
    (tmp_path / "tokenizer.pt").write_bytes(b"precious")
    assert_one_sentence(run_here(train_tokenizer.main, *TINY, *arguments, folder=tmp_path), *words)
    assert (tmp_path / "tokenizer.pt").read_bytes() == b"precious"


# --- the losses of the paper's recipe --------------------------------------------------------------------------------


def test_hinge_and_lecam():
    """Broken: the discriminator would learn another loss, or its moving averages would not be those of the global
    batch."""
    real, fake, lecam = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0.3, -0.4])
    expected = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    expected += 0.5 * ((real.mean(1) + 0.4).clamp(min=0) ** 2 + (0.3 - fake.mean(1)).clamp(min=0) ** 2).mean()
    assert torch.allclose(discriminator_loss(real, fake, lecam, 0.5), expected, atol=1e-6)
    cfg = SimpleNamespace(batch_size=6, device_batch=4, lecam=0.5, lecam_ema=0.9, lr=0.0, beta2=0.9, weight_decay=0.0,
                          clip=0.0, optimizer="adamw", fused_adamw=True, lr_end=1.0, warmup=0, steps=10, proxy_steps=0,
                          adversarial_from=0, adversarial=2.0, compile=False)
    discriminator = Discriminator(32)
    critics = Critics(None, discriminator, None, cfg)
    critics.lecam.copy_(lecam)
    images, recon = torch.randn(6, 1, 32, 32), torch.randn(6, 1, 32, 32)
    with torch.no_grad():
        real, fake = (discriminator(x).flatten(1) for x in (images, recon))
    total = sum(critics.loss(recon[part], images[part], 0) * n / 6 for part, n in ((slice(0, 4), 4), (slice(4, 6), 2)))
    assert torch.allclose(total, -2 * fake.mean(), atol=1e-6)
    means = critics.step(images, 0)
    assert means.keys() == {"adversarial", "discriminator"}
    assert torch.allclose(means["adversarial"], -fake.mean(), atol=1e-6)
    assert torch.allclose(means["discriminator"], discriminator_loss(real, fake, lecam, 0.5), atol=1e-5)
    assert torch.allclose(critics.lecam, torch.stack([0.27 + 0.1 * real.mean(), -0.36 + 0.1 * fake.mean()]), atol=1e-6)


def test_the_tokenizers_loss_is_not_the_discriminators():
    """Broken: the adversarial loss would teach the discriminator to take reconstructions for images."""
    cfg = SimpleNamespace(batch_size=2, optimizer="adamw", fused_adamw=True, lr=0.1, lr_end=1.0, beta2=0.9, warmup=0,
                          weight_decay=0.0, steps=10, proxy_steps=3, adversarial_from=2, perceptual=0.1,
                          adversarial=0.01,
                          compile=False)
    critics = Critics(random_convnext(), Discriminator(32), None, cfg)
    recon, images = torch.randn(2, 3, 32, 32, requires_grad=True), torch.randn(2, 3, 32, 32)
    critics.loss(recon, images, 4).backward()
    assert critics.step(images, 4).keys() == {"perceptual"}  # before its time
    alone = recon.grad.clone()
    critics.loss(recon, images, 5).backward()
    assert critics.means.keys() == {"perceptual", "adversarial"} and not torch.allclose(recon.grad, 2 * alone)
    assert all(weight.grad is None for weight in critics.discriminator.parameters())
