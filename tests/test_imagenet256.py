"""The recipe imagenet256 from end to end, narrow, on a folder of small image files: both phases of stage 1, stage 2,
samples."""
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import sample
import train_tokenizer
from published.convnext import ConvNeXt
from published.maskgit_vqgan import VQGAN
from tests.image_folder import make_image_folder
from tests.test_common import assert_one_sentence, run_here, run_ranks
from tests.test_train_tokenizer import assert_same_checkpoint, assert_same_gradients, kill_in_the_middle, read_log

STAGE1 = ["--recipe=imagenet256", "--data=images", "--image_size=32", "--num_tokens=4", "--codebook_size=16",
          "--code_dim=4", "--width=16", "--heads=2", "--encoder_layers=1", "--decoder_layers=1", "--vqgan=vqgan.bin",
          "--convnext=convnext.pth", "--discriminator=32", "--adversarial_from=4", "--steps=32", "--proxy_steps=16",
          "--batch_size=7", "--device_batch=3", "--warmup=2", "--proxy_warmup=2", "--lr=0.001", "--workers=1",
          "--compile=false", "--bf16=off", "--device=cpu",
          "--log_every=1", "--save_every=3", "--picture_every=100"]
STAGE2 = ["--recipe=imagenet256", "--data=images", "--width=16", "--heads=2", "--layers=1", "--steps=20",
          "--batch_size=7", "--device_batch=3", "--sample_steps=3", "--workers=1", "--compile=false", "--bf16=off",
          "--device=cpu", "--log_every=1",
          "--save_every=3", "--picture_every=100"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with images/ and random weights in the two published formats, narrow."""
    folder = tmp_path_factory.mktemp("imagenet256")
    make_image_folder(folder / "images", 200)
    torch.manual_seed(0)
    vqgan = VQGAN(32, 8, 16)
    with torch.no_grad():
        vqgan.encoder.conv_out.weight *= 20  # so that images have several codes
    torch.save(vqgan.state_dict(), folder / "vqgan.bin")
    convnext = ConvNeXt((4, 4, 8, 8), (1, 1, 2, 1), 10)
    torch.save({name: weight + torch.randn(weight.shape) * 0.1 for name, weight in convnext.state_dict().items()},
               folder / "convnext.pth")
    return folder


def place(files, folder):
    """A folder to train in, with links to what the training needs."""
    folder.mkdir()
    for name in ("images", "vqgan.bin", "convnext.pth"):
        (folder / name).symlink_to(files / name)
    return folder


@pytest.fixture(scope="module")
def whole(files):
    """A folder where both stages were trained without a break, by two processes."""
    folder = place(files, files / "whole")
    for script, arguments in (("train_tokenizer.py", STAGE1), ("train_fsdd.py", STAGE2)):
        finished = run_ranks(script, *arguments, folder=folder, processes=2)
        assert finished.returncode == 0, finished.stderr
    return folder


def test_the_whole_training(whole):
    """Broken: the paper's training would not run from proxy codes to samples, or a phase would not learn what it is
    for."""
    log = read_log(whole / "tokenizer.csv")
    assert [row["step"] for row in log] == list(range(1, 33))
    for row in log:
        assert ("proxy" in row) == (row["step"] <= 16) and ("mse" in row) == ("perceptual" in row) == (row["step"] > 16)
        assert ("adversarial" in row) == ("discriminator" in row) == (row["step"] > 20)
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)  # noqa: E731
    assert mean(log[13:16], "proxy") < mean(log[:3], "proxy") and mean(log[29:], "mse") < mean(log[16:19], "mse")
    assert (whole / "tokenizer.png").exists() and (whole / "fsdd.png").exists()
    finished = run_here(sample.main, "--ckpt=fsdd.pt", "--num=20", "--out=samples.png", folder=whole)
    assert finished.returncode == 0, finished.stderr
    with Image.open(whole / "samples.png") as picture:
        assert picture.mode == "RGB" and picture.height >= 320 and len(picture.getcolors(2 ** 16)) > 50


def stop_in_the_middle(script, arguments, folder, log, rows, sent, to_one, steps):
    """Stop a training of two processes by a signal, to all or to one of them; look whether its checkpoint lies within
    the steps."""
    code, errors = kill_in_the_middle(script, arguments, folder, folder / log, 2, rows, sent=sent, to_one=to_one)
    step = torch.load(folder / log.replace("csv", "pt"), weights_only=True)["step"]
    assert step in steps and code != 0
    if sent != signal.SIGKILL:  # the checkpoint comes first, so it holds every step in the log
        assert f"stopped by {sent.name}" in errors and read_log(folder / log)[-1]["step"] == step, errors


# Rows of the log, the signal, whether to one process only, the steps that the checkpoint may hold
PROXY, PIXELS = (4, signal.SIGTERM, False, range(4, 32)), (25, signal.SIGKILL, True, range(18, 32))
KILL = (4, signal.SIGKILL, False, range(3, 20))
MORE = ([KILL, (9, signal.SIGTERM, False, range(9, 32)), PIXELS], [KILL, (9, signal.SIGINT, True, range(9, 20))])


@pytest.mark.parametrize("stage1, stage2", [([PROXY, PIXELS], [(4, signal.SIGINT, True, range(4, 20))]),
                                            pytest.param(*MORE, marks=pytest.mark.slow)])
def test_stopped_in_every_phase_and_resumed(stage1, stage2, files, whole, tmp_path):
    """Broken: after a signal or a kill in the proxy phase, the pixel phase or stage 2, --resume would not give the very
    numbers of the unbroken run; or a signal would lose steps; or the loss of one process would leave the other one
    hanging."""
    folder, second = place(files, tmp_path / "stopped"), place(files, tmp_path / "second")
    (second / "tokenizer.pt").symlink_to(whole / "tokenizer.pt")
    with ThreadPoolExecutor() as at_once:  # most of the time a process waits for its imports
        list(at_once.map(stop_and_resume, ("train_tokenizer.py", "train_fsdd.py"), (STAGE1, STAGE2), (folder, second),
                         ("tokenizer.csv", "fsdd.csv"), (stage1, stage2)))
    for done, out in ((folder, "tokenizer"), (second, "fsdd")):
        assert read_log(whole / f"{out}.csv") == read_log(done / f"{out}.csv")
        assert_same_checkpoint(whole / f"{out}.pt", done / f"{out}.pt")


def stop_and_resume(script, arguments, folder, log, stops):
    """Stop a training, resume and stop it again, at last resume it to its end."""
    for stop in stops:
        stop_in_the_middle(script, arguments, folder, log, *stop)
        arguments = ["--resume"]
    assert run_ranks(script, "--resume", folder=folder, processes=2).returncode == 0


def test_any_number_of_processes_trains_alike(files, tmp_path):
    """Broken: a phase's losses, noise or averaged gradients would depend on the number of processes."""
    short = ["--steps=2", "--proxy_steps=1", "--adversarial_from=0", "--warmup=1", "--proxy_warmup=1"]
    logs, states = [], []
    alone, three = place(files, tmp_path / "1"), place(files, tmp_path / "3")  # unequal shares
    for folder, finished in ((alone, run_here(train_tokenizer.main, *STAGE1, *short, folder=alone)),
                             (three, run_ranks("train_tokenizer.py", *STAGE1, *short, folder=three, processes=3))):
        assert finished.returncode == 0, finished.stderr
        logs.append(read_log(folder / "tokenizer.csv"))
        states.append(torch.load(folder / "tokenizer.pt", weights_only=True)["training"])
    for log, state in zip(logs[1:], states[1:]):
        for ours, theirs in zip(logs[0], log):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert torch.allclose(states[0]["lecam"], state["lecam"], rtol=1e-3, atol=1e-7)
        assert state["lecam"].abs().min() > 0
    assert len(states[0]["optimizers"]) == 2  # the tokenizer's, the discriminator's
    assert_same_gradients(alone / "tokenizer.pt", three / "tokenizer.pt")


@pytest.mark.parametrize("steps, losses",
                         [("1", {"proxy"}), ("2", {"mse", "perceptual", "adversarial", "discriminator"})])
def test_accumulated_gradients_are_the_batchs(steps, losses, files, tmp_path):
    """Broken: a phase's losses and gradients would depend on how many images a device takes at once."""
    logs = []
    for size in ("7", "3", "1"):
        folder = place(files, tmp_path / size)
        short = [f"--steps={steps}", "--proxy_steps=1", "--adversarial_from=0", "--warmup=1", "--proxy_warmup=1",
                 "--uniformity=0.1", "--workers=0", f"--device_batch={size}"]
        assert not run_here(train_tokenizer.main, *STAGE1, *short, folder=folder).returncode
        logs.append(read_log(folder / "tokenizer.csv")[-1])
        assert logs[0] == pytest.approx(logs[-1], rel=1e-4, abs=1e-5) and losses <= logs[0].keys()
        assert_same_gradients(tmp_path / "7" / "tokenizer.pt", folder / "tokenizer.pt")


def test_what_makes_the_tokens_is_frozen_in_the_pixel_phase(files, tmp_path, monkeypatch):
    """Broken: the pixel phase would change the tokens that it learns to decode."""
    monkeypatch.chdir(place(files, tmp_path / "frozen"))
    with torch.random.fork_rng():
        train_tokenizer.main([*STAGE1, "--steps=6", "--proxy_steps=6"])
        before = torch.load("tokenizer.pt", weights_only=True)["weights"]
        train_tokenizer.main(["--resume", "--steps=12"])
    after = torch.load("tokenizer.pt", weights_only=True)
    for name in before:
        frozen = name.startswith(("encoder.", "quantizer."))
        assert torch.equal(before[name], after["weights"][name]) == frozen, name
        if frozen:
            assert torch.equal(before[name], after["training"]["model"][name]), name
    assert after["training"]["optimizers"] and after["training"]["discriminator"]


def test_other_data_without_published_networks(files, tmp_path):
    """Broken: without the published files there would be no way to train on a folder of images."""
    folder = place(files, tmp_path / "plain")
    finished = run_here(train_tokenizer.main, *STAGE1, "--proxy_steps=0", "--vqgan=", "--convnext=", "--perceptual=0",
                        "--adversarial=0", "--uniformity=0.25", "--revive_after=3", folder=folder)
    assert finished.returncode == 0, finished.stderr
    log = read_log(folder / "tokenizer.csv")
    assert log[-1]["mse"] < log[0]["mse"] and "proxy" not in log[0]


@pytest.mark.parametrize("arguments, words", [
    (["--vqgan=none.bin"], ["MaskGIT-VQGAN is needed at none.bin", "huggingface.co/fun-research/TiTok"]),
    (["--convnext=none.pth"], ["ConvNeXt-S is needed at none.pth", "download.pytorch.org"]),
    (["--vqgan=convnext.pth"], ["convnext.pth can't be read as MaskGIT-VQGAN"]),
    (["--convnext=images"], ["ConvNeXt-S is needed at images"]),
    (["--convnext=broken.pth"], ["classifier.2.weight", "(10, 8)"]),
    (["--vqgan="], ["--vqgan", "--proxy_steps 0"]), (["--convnext="], ["--convnext", "--perceptual 0"]),
    (["--proxy_steps=33"], ["proxy_steps 33", "32"]), (["--patch_size=8"], ["16 pixels"]),
    (["--discriminator=33"], ["33"]),
])
def test_mistakes_get_one_sentence(arguments, words, files, tmp_path):
    """Broken: a missing or wrong file would end in a traceback, hours into the training or with something else in its
    place."""
    folder = place(files, tmp_path / "wrong")
    if "broken" in arguments[0]:
        weights = torch.load(files / "convnext.pth")
        weights["classifier.2.weight"] = torch.zeros(3, 3)
        torch.save(weights, folder / "broken.pth")
    assert_one_sentence(run_here(train_tokenizer.main, *STAGE1, *arguments, folder=folder), *words)
    assert not (folder / "tokenizer.pt").exists()


def test_other_images_are_not_gone_on_with(whole, tmp_path):
    """Broken: --resume on other images would give other batches and call it the same run."""
    folder = place(whole, tmp_path / "other")
    (folder / "tokenizer.pt").write_bytes((whole / "tokenizer.pt").read_bytes())
    (folder / "images").unlink()
    make_image_folder(folder / "images", 100)
    assert_one_sentence(run_here(train_tokenizer.main, "--resume", "--steps=40", folder=folder),
                        "images or classes are not those")
