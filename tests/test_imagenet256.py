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
from tests.image_folder import make_image_folder
from tests.scripts import (assert_one_sentence, assert_ranks_train_alike, assert_same_training, crash, read_log,
                           run_here, send_sigterm, stop_and_resume, successful)

SMALL = ["--recipe=imagenet256", "--data=images", "--width=16", "--heads=2", "--batch_size=4", "--device_batch=3",
         "--workers=0", "--compile=false", "--bf16=off", "--device=cpu", "--log_every=1", "--save_every=3",
         "--picture_every=100"]
STAGE1 = [*SMALL, "--image_size=32", "--num_tokens=4", "--codebook_size=16", "--code_dim=4", "--encoder_layers=1",
          "--decoder_layers=1", "--vqgan=vqgan.bin", "--convnext=convnext.pth", "--discriminator=32",
          "--adversarial_from=3", "--steps=12", "--proxy_steps=6", "--warmup=2", "--proxy_warmup=2", "--lr=0.001"]
STAGE2 = [*SMALL, "--layers=1", "--steps=8", "--device_batch=50"]  # 50: the samples are drawn at once


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with images/ and random weights in the two published formats, narrow."""
    folder = tmp_path_factory.mktemp("imagenet256")
    make_image_folder(folder / "images", 40, classes=5)
    torch.manual_seed(0)
    save_networks(VQGAN(32, 8, 16), ConvNeXt((4, 4, 8, 8), (1, 1, 2, 1), 10), folder / "vqgan.bin",
                  folder / "convnext.pth")
    return folder


def save_networks(vqgan, convnext, vqgan_path, convnext_path):
    """Write the two networks as the published files, changed so that images differ in their codes and logits."""
    with torch.no_grad():
        vqgan.encoder.conv_out.weight *= 20
        for name, weight in convnext.named_parameters():
            if "layer_scale" in name:
                weight.fill_(0.1)
    torch.save(vqgan.state_dict(), vqgan_path)
    torch.save(convnext.state_dict(), convnext_path)


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


def test_the_whole_training(whole):
    """Fails if the paper's training does not run from proxy codes to samples, or if a loss does not come in at its
    step."""
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


@pytest.mark.parametrize("stops", [
    [(5, send_sigterm, 5), (11, send_sigterm, 11)],
    pytest.param([(5, crash, 3), (8, crash, 6), (12, crash, 9)], marks=pytest.mark.slow),
    pytest.param([(6, send_sigterm, 6), (7, send_sigterm, 7)], marks=pytest.mark.slow)])
def test_stage_1_resumes_in_every_phase(stops, files, whole, tmp_path, monkeypatch):
    """Fails if --resume does not give the numbers of the unbroken run after a stop in the proxy phase, at the beginning
    of the pixel phase, or with the discriminator in training."""
    out = linked(files, tmp_path / "stopped") / "tokenizer.pt"
    stop_and_resume(monkeypatch, train_tokenizer, STAGE1, out, stops)
    assert_same_training(whole / "tokenizer.pt", out)


@pytest.mark.slow
def test_any_number_of_ranks_trains_alike(files, tmp_path):
    """Fails if a phase's losses, noise, gradients or LeCam's averages depend on the number of ranks, or on how many
    images each of them takes at once. The learning rate is small, as AdamW enlarges the rounding of small gradients."""
    options = [*STAGE1, "--steps=3", "--proxy_steps=1", "--adversarial_from=0", "--clip=0", "--lr=1e-9"]
    folder = linked(files, tmp_path / "ranks")
    assert_ranks_train_alike("train_tokenizer.py", options, folder)
    one, three = (torch.load(folder / f"{ranks}.pt", weights_only=True)["training"]["lecam"] for ranks in (1, 3))
    assert one.all() and torch.allclose(one, three, rtol=1e-3, atol=1e-7)


def test_the_pixel_phase_keeps_the_tokens(files, tmp_path):
    """Fails if the pixel phase changes the tokens that it learns to decode, or does not learn to decode them."""
    folder = linked(files, tmp_path / "frozen")
    weights = []
    for options in ([*STAGE1, "--steps=3", "--proxy_steps=3"], ["--resume", "--steps=5"]):
        successful(run_here(train_tokenizer.main, *options, folder=folder))
        weights.append(torch.load(folder / "tokenizer.pt", weights_only=True)["weights"])
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]) == name.startswith(("encoder.", "quantizer.")), name


def test_other_images_without_published_networks(files, tmp_path):
    """Fails if there is no way to train on a folder of images without the published files."""
    folder = linked(files, tmp_path / "plain", "images")
    successful(run_here(train_tokenizer.main, *STAGE1, "--steps=30", "--proxy_steps=0", "--vqgan=", "--convnext=",
                        "--perceptual=0", "--adversarial=0", "--uniformity=0.25", "--workers=1", folder=folder))
    log = read_log(folder / "tokenizer.csv")
    first, last = (sum(row["mse"] for row in rows) for rows in (log[:3], log[-3:]))
    assert last < first and "proxy" not in log[0]


@pytest.mark.parametrize("arguments, words", [
    (["--vqgan=none.bin"], ["MaskGIT-VQGAN is needed at none.bin", "huggingface.co/fun-research/TiTok"]),
    (["--convnext=none.pth"], ["ConvNeXt-S is needed at none.pth", "download.pytorch.org"]),
    (["--vqgan=convnext.pth"], ["convnext.pth can't be read as MaskGIT-VQGAN"]),
    (["--vqgan="], ["--vqgan", "--proxy_steps 0"]), (["--convnext="], ["--convnext", "--perceptual 0"]),
    (["--proxy_steps=33"], ["proxy_steps 33", "12"]), (["--patch_size=8"], ["16 pixels"]),
])
def test_mistakes_get_one_sentence(arguments, words, files, tmp_path):
    """Fails if a missing or wrong file ends in a traceback, or is found only after hours of training."""
    folder = linked(files, tmp_path / "wrong")
    assert_one_sentence(run_here(train_tokenizer.main, *STAGE1, *arguments, folder=folder), *words)
    assert not (folder / "tokenizer.pt").exists()
