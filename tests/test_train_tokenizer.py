"""Stage 1 as it is run: exact resume, any number of ranks, the losses of the paper's recipe, mistakes."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_tokenizer
from published.discriminator import Discriminator
from published.losses import PixelLosses, discriminator_loss
from tests.image_folder import add_truncated_image, make_image_folder
from tests.scripts import (assert_one_sentence, assert_ranks_train_alike, assert_same_training, crash, read_log,
                           run_here, send_sigterm, stop_and_resume, successful)
from tests.test_convnext import small_convnext

TINY = ["--recipe=digits", "--width=16", "--heads=2", "--encoder_layers=1", "--decoder_layers=1", "--num_tokens=4",
        "--codebook_size=16", "--batch_size=7", "--device_batch=3", "--steps=8", "--warmup=3", "--log_every=1",
        "--save_every=3", "--picture_every=100", "--bf16=off", "--device=cpu"]


def test_a_stopped_training_resumes_to_the_same_numbers(few_to_train_on, tmp_path, monkeypatch):
    """Fails if --resume does not give the numbers of an unbroken run, or if a signal loses the steps since the last
    checkpoint. (Real kills: tests/test_kills.py)"""
    successful(run_here(train_tokenizer.main, *TINY, folder=tmp_path))
    stop_and_resume(monkeypatch, train_tokenizer, TINY, tmp_path / "stopped.pt", [(5, send_sigterm, 5), (8, crash, 6)])
    assert_same_training(tmp_path / "tokenizer.pt", tmp_path / "stopped.pt")


def test_a_damaged_image_is_replaced_and_the_training_resumes(tmp_path):
    """Fails if an image that can't be read costs the steps before it, or if --resume refuses the image in its place."""
    make_image_folder(tmp_path / "images", 40, classes=4)
    path = Path(add_truncated_image(tmp_path / "images"))
    options = [*TINY, "--data=images", "--image_size=14", "--steps=12", "--out=a.pt", "--workers=1"]  # 41 images
    stopped = run_here(train_tokenizer.main, *options, folder=tmp_path)
    assert_one_sentence(stopped, "replace it by an image of the same name", "--resume continues")
    assert stopped.returncode == 143 and 0 < torch.load(tmp_path / "a.pt")["step"] < 12
    assert f"{path.name} can't be read (OSError: image file is truncated" in stopped.stderr
    path.write_bytes((path.parent / "00000.JPEG").read_bytes())
    finished = successful(run_here(train_tokenizer.main, "--resume", "--out=a.pt", folder=tmp_path))
    assert "some training images have other contents" in finished.stdout
    assert [row["step"] for row in read_log(tmp_path / "a.csv")] == list(range(1, 13))


def test_any_number_of_ranks_trains_alike(few_to_train_on, tmp_path):
    """Fails if the global batch, which of its images skip the quantizer, or the mean of the gradients depends on the
    number of ranks."""
    assert_ranks_train_alike("train_tokenizer.py", [*TINY, "--codebook_size=64", "--steps=4", "--optimizer=adamw",
                                                    "--clip=0"], tmp_path)


def test_what_a_run_writes(few_to_train_on, tmp_path):
    """Fails if the checkpoint can't be read safely, if the picture, progress or last line is missing, or if an earlier
    training of the same name is lost."""
    (tmp_path / "tokenizer.pt").write_text("trained for weeks")
    finished = successful(run_here(train_tokenizer.main, *TINY, "--steps=3", "--ema=0", folder=tmp_path))
    assert finished.stdout.startswith("recipe digits: as given")
    for words in ("mean squared error", "codes in use", "distinct codes"):
        assert words in finished.stdout.splitlines()[-1]
    assert all(word in finished.stderr for word in ("step 3", "loss", "PSNR", "codes in use", "images/s"))  # the bar
    assert (tmp_path / "tokenizer.png").stat().st_size > 1000
    checkpoint = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    assert (tmp_path / "tokenizer.pt.previous").read_text() == "trained for weeks"
    assert checkpoint["step"] == checkpoint["training"]["n_averaged"] == 3
    assert all(torch.equal(w, checkpoint["training"]["model"][name]) for name, w in checkpoint["weights"].items())


def test_the_loss_contains_the_absolute_error(few_to_train_on, tmp_path):
    """Fails if --absolute is not the weight of the mean absolute error of the pixels."""
    rows = []
    for weight in (0, 2):
        successful(run_here(train_tokenizer.main, *TINY, "--steps=1", f"--absolute={weight}", folder=tmp_path))
        rows += read_log(tmp_path / "tokenizer.csv")
    error = (rows[1]["loss"] - rows[0]["loss"]) / 2
    assert rows[0]["mse"] == rows[1]["mse"] and rows[0]["mse"] / 2 < error < rows[0]["mse"] ** 0.5  # |x| <= 2, Jensen


def test_uniformity_falls_as_latents_spread():
    """Fails if the loss does not fall when an image's latents spread out."""
    crowded = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    apart = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert train_tokenizer.uniformity(crowded).item() == pytest.approx(1.0)
    assert train_tokenizer.uniformity(apart).item() == pytest.approx((1 + torch.tensor(-4.0).exp().item()) / 2)


@pytest.mark.parametrize("arguments, words", [
    (["--width=15"], ["width 15 is not a multiple of heads 2"]),
    (["--patch_size=5"], ["image_size 28", "patch_size 5"]),
    (["--image_size=32", "--patch_size=8"], ["28 pixels"]),
    (["--data=nowhere"], ["nowhere/train"]), (["--resume"], ["tokenizer.pt can't be read"]),
    (["--batch_size=70000"], ["batch_size 70000"]), (["--proxy_steps=2"], ["--vqgan"]),
])
def test_mistakes_get_one_sentence(arguments, words, tmp_path):
    """Fails if a mistake on the command line ends in a traceback, or destroys what is on disk."""
    (tmp_path / "tokenizer.pt").write_bytes(b"precious")
    assert_one_sentence(run_here(train_tokenizer.main, *TINY, *arguments, folder=tmp_path), *words)
    assert (tmp_path / "tokenizer.pt").read_bytes() == b"precious"


# --- the losses of the paper's recipe --------------------------------------------------------------------------------


def pixel_losses(convnext, **settings):
    """PixelLosses with a small discriminator."""
    defaults = dict(batch_size=6, device_batch=4, lecam=0.5, lecam_ema=0.9, lr=0.0, beta2=0.9, weight_decay=0.0,
                    clip=0.0, optimizer="adamw", lr_end=1.0, warmup=0, steps=10, proxy_steps=0,
                    adversarial_from=0, adversarial=2.0, perceptual=0.1, compile=False)
    return PixelLosses(convnext, Discriminator(32), None, SimpleNamespace(**defaults | settings))


def test_hinge_and_lecam():
    """Fails if the discriminator learns another loss, or if its moving averages are not those of the global batch."""
    real, fake, lecam = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0.3, -0.4])
    expected = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    expected += 0.5 * ((real.mean(1) + 0.4).clamp(min=0) ** 2 + (0.3 - fake.mean(1)).clamp(min=0) ** 2).mean()
    assert torch.allclose(discriminator_loss(real, fake, lecam, 0.5), expected, atol=1e-6)
    losses = pixel_losses(None)
    losses.lecam.copy_(lecam)
    images, recon = torch.randn(6, 1, 32, 32), torch.randn(6, 1, 32, 32)
    with torch.no_grad():
        real, fake = (losses.discriminator(x).flatten(1) for x in (images, recon))
    parts = (slice(0, 4), 4), (slice(4, 6), 2)
    total = sum(losses(recon[part], images[part], 0) * number / 6 for part, number in parts)
    assert torch.allclose(total, -2 * fake.mean(), atol=1e-6)
    means = losses.train_discriminator(images, 0)
    assert means.keys() == {"adversarial", "discriminator"}
    assert torch.allclose(means["adversarial"], -fake.mean(), atol=1e-6)
    assert torch.allclose(means["discriminator"], discriminator_loss(real, fake, lecam, 0.5), atol=1e-5)
    assert torch.allclose(losses.lecam, torch.stack([0.27 + 0.1 * real.mean(), -0.36 + 0.1 * fake.mean()]), atol=1e-6)


def test_the_tokenizers_loss_does_not_train_the_discriminator():
    """Fails if the adversarial loss teaches the discriminator that reconstructions are images, or comes in before its
    step."""
    losses = pixel_losses(small_convnext(), batch_size=2, proxy_steps=3, adversarial_from=2)
    recon, images = torch.randn(2, 3, 32, 32, requires_grad=True), torch.randn(2, 3, 32, 32)
    losses(recon, images, 4).backward()
    assert losses.train_discriminator(images, 4).keys() == {"perceptual"}
    alone = recon.grad.clone()
    losses(recon, images, 5).backward()
    assert losses.means.keys() == {"perceptual", "adversarial"} and not torch.allclose(recon.grad, 2 * alone)
    assert all(weight.grad is None for weight in losses.discriminator.parameters())
