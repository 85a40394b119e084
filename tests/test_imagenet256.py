"""The recipe imagenet256 from end to end, narrow, on a folder of small image files: both phases of stage 1, stage 2,
samples."""
import pytest
import torch
from PIL import Image

import sample
import train_fsdd
import train_tokenizer
from published.convnext import ConvNeXt
from published.maskgit_vqgan import VQGAN
from tests.image_folder import add_truncated_image, make_image_folder
from tests.scripts import (assert_one_sentence, assert_same_gradients, assert_same_training, crash, read_log, run_here,
                           run_ranks, send_sigterm, stop_and_resume, successful)

SMALL = ["--recipe=imagenet256", "--data=images", "--width=16", "--heads=2", "--batch_size=4", "--device_batch=3",
         "--workers=0", "--compile=false", "--bf16=off", "--device=cpu", "--log_every=1", "--save_every=3",
         "--picture_every=100"]
STAGE1 = [*SMALL, "--image_size=32", "--num_tokens=4", "--codebook_size=16", "--code_dim=4", "--encoder_layers=1",
          "--decoder_layers=1", "--vqgan=vqgan.bin", "--convnext=convnext.pth", "--discriminator=32",
          "--adversarial_from=3", "--steps=12", "--proxy_steps=6", "--warmup=2", "--proxy_warmup=2", "--lr=0.001"]
STAGE2 = [*SMALL, "--layers=1", "--steps=8", "--sample_steps=2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with images/ and random weights in the two published formats, narrow."""
    folder = tmp_path_factory.mktemp("imagenet256")
    make_image_folder(folder / "images", 40, classes=5)
    torch.manual_seed(0)
    vqgan = VQGAN(32, 8, 16)
    with torch.no_grad():
        vqgan.encoder.conv_out.weight *= 20  # so that images have several codes
    torch.save(vqgan.state_dict(), folder / "vqgan.bin")
    convnext = ConvNeXt((4, 4, 8, 8), (1, 1, 2, 1), 10)
    torch.save({name: weight + torch.randn(weight.shape) * 0.1 for name, weight in convnext.state_dict().items()},
               folder / "convnext.pth")
    return folder


def linked(files, folder, *names):
    """A folder to train in, with links to what the training needs."""
    folder.mkdir()
    for name in names or ("images", "vqgan.bin", "convnext.pth"):
        (folder / name).symlink_to(files / name)
    return folder


@pytest.fixture(scope="module")
def whole(files):
    """A folder in which both stages were trained without a break."""
    folder = linked(files, files / "whole")
    for script, options in ((train_tokenizer, STAGE1), (train_fsdd, STAGE2)):
        successful(run_here(script.main, *options, folder=folder))
    return folder


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def test_the_whole_training(whole):
    """Broken: the paper's training would not run from proxy codes to samples, or a loss not come in at its step."""
    log = read_log(whole / "tokenizer.csv")
    assert [row["step"] for row in log] == list(range(1, 13))
    for row in log:
        assert ("proxy" in row) == (row["step"] <= 6) and ("mse" in row) == ("perceptual" in row) == (row["step"] > 6)
        assert ("adversarial" in row) == ("discriminator" in row) == (row["step"] > 9)
    assert [row["lr"] for row in log[:6]] == [row["lr"] for row in log[6:]]  # each phase has its own warm-up and decay
    assert (whole / "tokenizer.png").exists() and (whole / "fsdd.png").exists()
    assert torch.load(whole / "fsdd.pt", weights_only=True)["denoiser"] == "dense"
    successful(run_here(sample.main, "--ckpt=fsdd.pt", "--num=20", "--out=samples.png", folder=whole))
    with Image.open(whole / "samples.png") as picture:
        assert picture.mode == "RGB" and picture.height == 5 * 64 and len(picture.getcolors(2 ** 16)) > 50


@pytest.mark.slow
def test_both_phases_learn(files, tmp_path):
    """Broken: a phase would not learn its task."""
    folder = linked(files, tmp_path / "longer")
    successful(run_here(train_tokenizer.main, *STAGE1, "--batch_size=8", "--device_batch=8", "--lr=0.003", "--steps=80",
                        "--proxy_steps=60", folder=folder))
    log = read_log(folder / "tokenizer.csv")
    assert mean(log[50:60], "proxy") < mean(log[:10], "proxy") / 2 and mean(log[75:], "mse") < mean(log[60:65], "mse")


@pytest.mark.parametrize("stops", [
    [(5, send_sigterm, 5), (11, send_sigterm, 11)],
    pytest.param([(5, crash, 3), (8, crash, 6), (12, crash, 9)], marks=pytest.mark.slow),
    pytest.param([(6, send_sigterm, 6), (7, send_sigterm, 7)], marks=pytest.mark.slow)])
def test_stage_1_resumes_in_every_phase(stops, files, whole, tmp_path, monkeypatch):
    """Broken: after a stop in the proxy phase, at the beginning of the pixel phase, or with the discriminator in
    training, --resume would not give the numbers of the unbroken run."""
    out = linked(files, tmp_path / "stopped") / "tokenizer.pt"
    stop_and_resume(monkeypatch, train_tokenizer, STAGE1, out, stops)
    assert_same_training(whole / "tokenizer.pt", out)


@pytest.mark.parametrize("world_size, device_batch", [(1, 3), pytest.param(2, 4, marks=pytest.mark.slow),
                                                      pytest.param(3, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("steps, losses",
                         [("1", {"proxy"}), ("2", {"mse", "perceptual", "adversarial", "discriminator"})])
def test_ranks_and_micro_batches_change_nothing(steps, losses, world_size, device_batch, files, tmp_path):
    """Broken: a phase's losses, noise or gradients would depend on the number of ranks, or on how many images each of
    them takes at once. (The shares of 3 ranks are unequal.)"""
    logs, lecam = [], []
    for name, ranks, size in (("one", 1, 4), ("other", world_size, device_batch)):
        successful(run_ranks("train_tokenizer.py", *STAGE1, f"--steps={steps}", "--proxy_steps=1",
                             "--adversarial_from=0", "--warmup=1", "--proxy_warmup=1", "--clip=0",
                             f"--device_batch={size}", folder=linked(files, tmp_path / name), world_size=ranks))
        logs.append(read_log(tmp_path / name / "tokenizer.csv")[-1])
        training = torch.load(tmp_path / name / "tokenizer.pt", weights_only=True)["training"]
        lecam.append(training.get("lecam", torch.ones(2)))  # only the pixel phase has it
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-5) and losses <= logs[0].keys()
    assert torch.allclose(*lecam, rtol=1e-3, atol=1e-7) and lecam[0].all()
    assert_same_gradients(tmp_path / "one" / "tokenizer.pt", tmp_path / "other" / "tokenizer.pt")


def test_the_pixel_phase_keeps_the_tokens(files, tmp_path):
    """Broken: the pixel phase would change the tokens that it learns to decode."""
    folder = linked(files, tmp_path / "frozen")
    checkpoints = []
    for options in ([*STAGE1, "--steps=3", "--proxy_steps=3"], ["--resume", "--steps=5"]):
        successful(run_here(train_tokenizer.main, *options, folder=folder))
        checkpoints.append(torch.load(folder / "tokenizer.pt", weights_only=True))
    before, after = checkpoints
    for name, weight in before["weights"].items():
        frozen = name.startswith(("encoder.", "quantizer."))
        assert torch.equal(weight, after["weights"][name]) == frozen, name
        if frozen:
            assert torch.equal(weight, after["training"]["model"][name]), name
    assert after["training"]["discriminator"]


def test_other_images_without_published_networks(files, tmp_path):
    """Broken: without the published files there would be no way to train on a folder of images."""
    folder = linked(files, tmp_path / "plain", "images")
    successful(run_here(train_tokenizer.main, *STAGE1, "--steps=30", "--proxy_steps=0", "--vqgan=", "--convnext=",
                        "--perceptual=0", "--adversarial=0", "--uniformity=0.25", "--reset_after=3", "--workers=1",
                        folder=folder))
    log = read_log(folder / "tokenizer.csv")
    assert mean(log[-3:], "mse") < mean(log[:3], "mse") and "proxy" not in log[0]


@pytest.mark.parametrize("arguments, words", [
    (["--vqgan=none.bin"], ["MaskGIT-VQGAN is needed at none.bin", "huggingface.co/fun-research/TiTok"]),
    (["--convnext=none.pth"], ["ConvNeXt-S is needed at none.pth", "download.pytorch.org"]),
    (["--vqgan=convnext.pth"], ["convnext.pth can't be read as MaskGIT-VQGAN"]),
    (["--convnext=broken.pth"], ["classifier.2.weight", "(10, 8)"]),
    (["--vqgan="], ["--vqgan", "--proxy_steps 0"]), (["--convnext="], ["--convnext", "--perceptual 0"]),
    (["--proxy_steps=33"], ["proxy_steps 33", "12"]), (["--patch_size=8"], ["16 pixels"]),
    (["--discriminator=33"], ["33"]),
])
def test_mistakes_get_one_sentence(arguments, words, files, tmp_path):
    """Broken: a missing or wrong file would end in a traceback, or only after hours of training."""
    folder = linked(files, tmp_path / "wrong")
    if "broken" in arguments[0]:
        weights = torch.load(files / "convnext.pth")
        weights["classifier.2.weight"] = torch.zeros(3, 3)
        torch.save(weights, folder / "broken.pth")
    assert_one_sentence(run_here(train_tokenizer.main, *STAGE1, *arguments, folder=folder), *words)
    assert not (folder / "tokenizer.pt").exists()


def test_other_or_damaged_images_end_the_training(whole, files, tmp_path):
    """Broken: --resume on other images would give other batches and call it the same run; or an image that can't be
    read would end in a traceback, or be left out silently."""
    folder = linked(files, tmp_path / "other", "vqgan.bin", "convnext.pth")
    (folder / "tokenizer.pt").write_bytes((whole / "tokenizer.pt").read_bytes())
    make_image_folder(folder / "images", 32, classes=5)
    assert_one_sentence(run_here(train_tokenizer.main, "--resume", "--steps=40", folder=folder),
                        "images or classes are not those")
    path = add_truncated_image(folder / "images")
    finished = run_here(train_tokenizer.main, *STAGE1, "--batch_size=33", "--device_batch=33", "--out=new.pt",
                        folder=folder)
    assert_one_sentence(finished, path.removeprefix(f"{folder}/"), "can't be read (OSError: image file is truncated")
