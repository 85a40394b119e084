"""The recipe imagenet256 at its full size takes training steps: pytest --slow -s tests/test_full_size.py

Two images, random weights in the formats of the published files, and few steps; all other settings are the recipe's.
"""
import time

import numpy as np
import pytest
import torch
from PIL import Image

from published.convnext import ConvNeXt
from published.maskgit_vqgan import VQGAN
from tests.scripts import read_log, run, successful
from tests.test_imagenet256 import save_networks

SHORT = ["--recipe=imagenet256", "--data=images", "--batch_size=2", "--device_batch=1", "--flip=false",
         "--compile=false", "--workers=0", "--log_every=1", "--save_every=1000", "--picture_every=0"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two smooth random images to train on, which a crop leaves as they are, one to test with, and the published
    networks."""
    folder, random = tmp_path_factory.mktemp("full_size"), np.random.default_rng(0)
    for name in ("train/n01/a.png", "train/n01/b.png", "val/n01/c.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((256, 256), Image.BICUBIC)
        image.save(folder / "images" / name)
    torch.manual_seed(0)
    save_networks(VQGAN(), ConvNeXt(), folder / "maskgit-vqgan-imagenet-f16-256.bin",
                  folder / "convnext_small-0c510722.pth")
    return folder


def train(folder, *arguments):
    began = time.time()
    finished = successful(run(*arguments, folder=folder))
    print("\n", *arguments, f"\n{time.time() - began:.0f} s\n", finished.stdout)


def test_stage_1(folder):
    """Fails if the full-size tokenizer, VQGAN, ConvNeXt-S and discriminator do not train together, or do not learn."""
    train(folder, "train_tokenizer.py", *SHORT, "--steps=20", "--proxy_steps=10", "--warmup=1", "--proxy_warmup=1",
          "--adversarial_from=5")
    log = read_log(folder / "tokenizer.csv")
    print(*log, sep="\n")
    assert log[9]["proxy"] < log[0]["proxy"]
    assert log[19]["mse"] < log[10]["mse"] and log[19]["perceptual"] < log[10]["perceptual"]
    assert log[19]["discriminator"] < log[15]["discriminator"]


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12)])  # S and B
def test_stage_2(width, heads, folder):
    """Fails if the full-size denoiser does not train on 4096 codes, or does not learn."""
    train(folder, "train_fsdd.py", *SHORT, f"--width={width}", f"--heads={heads}", "--batch_size=1",
          "--steps=10")
    log = read_log(folder / "fsdd.csv")
    print(*log, sep="\n")
    assert log[-1]["loss"] < log[0]["loss"]
