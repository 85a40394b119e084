"""What several test files need."""
import copy
import functools

import numpy as np
import pytest
import torch

import data.loader
import evaluate_fid
import sample
from data import open_dataset
from fsdd import Denoiser
from published import classifier
from published.inception import InceptionV3
from support.files import save_checkpoint
from tokenizer import SetTokenizer


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, which take many minutes")


def pytest_configure(config):
    torch.set_num_threads(1)  # with tensors as small as the tests', a second thread only costs time
    config.addinivalue_line("markers", "slow: takes many seconds or minutes; runs only with --slow")
    if not config.getoption("--slow"):
        config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(autouse=True)
def fresh_start(tmp_path, monkeypatch):
    """Every test draws the same random numbers in every run, and starts in an empty folder of its own."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with tiny checkpoints of the digits, the classifier (trained on few digits), and images as .npz."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    tokenizer_config = dict(image_size=28, channels=1, patch_size=7, num_tokens=6, codebook_size=64, code_dim=5,
                            width=32, heads=2, encoder_layers=1, decoder_layers=1)
    model_config = dict(codebook_size=64, num_tokens=6, num_classes=10, width=16, layers=1, heads=2)
    tokenizer, denoiser = SetTokenizer(**tokenizer_config), Denoiser(**model_config)
    for parameter in [*tokenizer.parameters(), *denoiser.parameters()]:
        # large random matrices, so that different digits get different tokens and these give different pixels
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    stage1 = {"kind": "tokenizer", "model_config": tokenizer_config, "weights": tokenizer.state_dict(),
              "class_names": list("0123456789"), "config": {"data": "digits"}}
    generation = {"prior": "multinomial", "sampler": "paper", "steps": 3, "times": "middle", "guidance": "1",
                  "top_p": 1.0, "top_k": 2}
    save_checkpoint(stage1, folder / "tokenizer.pt")
    save_checkpoint(stage1 | {"kind": "fsdd", "denoiser": "dense", "model_config": model_config,
                              "weights": denoiser.state_dict(), "tokenizer": stage1, "generation": generation},
                    folder / "fsdd.pt")
    net = classifier.train_classifier(few_digits("train", 1000), "digits", steps=20)
    save_checkpoint({"kind": "digits classifier", "weights": net.state_dict()}, folder / "digits_classifier.pt")
    sample.main(["--ckpt", str(folder / "fsdd.pt"), "--num=150", "--seed=9", f"--out={folder}/generated.npz",
                 "--device=cpu"])
    np.savez(folder / "test.npz", arr_0=few_digits("test", 300).images.permute(0, 2, 3, 1).numpy())
    return folder


def few_digits(split, number):
    """The first digits of a split."""
    dataset = copy.copy(all_digits("digits", split, 28))
    dataset.images, dataset.labels = dataset.images[:number], dataset.labels[:number]
    return dataset


all_digits = functools.lru_cache(open_dataset)


@pytest.fixture
def small_digits(monkeypatch):
    """evaluate_fid.py has 600 training and 400 test digits."""
    number = {"train": 600, "test": 400}
    for module in (evaluate_fid, classifier):
        monkeypatch.setattr(module, "open_dataset", lambda data, split, size: few_digits(split, number[split]))


@pytest.fixture
def few_to_train_on(monkeypatch):
    """Both trainings have 300 training and 300 test digits."""
    monkeypatch.setattr(data.loader, "open_dataset", lambda data, split, size, **training: few_digits(split, 300))


@pytest.fixture
def cache(digits, small_digits, few_to_train_on, tmp_path, monkeypatch):
    """A folder for the variants of a table, not yet made, in the working directory. Variants are trained on 300 digits
    and measured on 400."""
    from paper import variants
    monkeypatch.setattr(variants, "FOLDER", "cache")
    monkeypatch.setattr(variants, "CLASSIFIER", f"{digits}/digits_classifier.pt")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def weights():
    """Random weights of Inception under the published names, such that activations keep their size in the network."""
    torch.manual_seed(0)
    net = InceptionV3()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    # class weights at right angles to what the features of all images have in common, so that classes differ
    with torch.no_grad():
        mean = torch.nn.functional.normalize(net(pictures(8, 64, seed=9))[0].mean(0), dim=0)
        weight = torch.nn.init.normal_(net.fc.weight, std=0.2)
        weight -= (weight @ mean)[:, None] * mean
    return net.state_dict()


@pytest.fixture(scope="session")
def weight_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, path)
    return path


def pictures(number, size, channels=3, seed=0):
    """Images (number, channels, size, size) uint8 of smooth colours and some noise, all different."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, channels, 4, 4, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return (smooth + 20 * torch.randn(smooth.shape, generator=random)).clamp(0, 255).to(torch.uint8)
