"""Table 3: what a linear classifier reads off the sets."""
import os
import re
from types import SimpleNamespace

import pytest
import torch

import evaluate_fid
from dual_transform import tokens_to_counts
from paper import table3_linear_probe, variants
from tests.image_folder import make_image_folder
from tests.test_common import assert_one_sentence, run_here
from tests.conftest import few_digits

CPU = torch.device("cpu")
ARGS = SimpleNamespace(epochs=30, seed=0)


@pytest.fixture
def few(small_digits, monkeypatch):
    """The script sees 600 training and 400 test digits."""
    monkeypatch.setattr(table3_linear_probe, "open_dataset", evaluate_fid.open_dataset)


def probe(train, labels, test, test_labels, classes):
    return table3_linear_probe.probe(train, labels, test, test_labels, classes, ARGS, CPU)


def test_what_a_line_separates_is_read():
    """Broken: the probe would not be trained, not be scaled, or be measured on other images than the test's."""
    labels, test_labels = torch.randint(3, (1500,)), torch.randint(3, (700,))
    for scale, shift, dtype in ((1, 0, torch.float32), (1e-2, 50, torch.float32), (20, 100, torch.uint8),
                                (300, -5000, torch.int16)):
        at, noise = scale * torch.eye(3), scale / 10
        train, test = ((shift + at[y] + noise * torch.randn(len(y), 3).clamp(-2, 2)).to(dtype)
                       for y in (labels, test_labels))
        # one never changes
        train, test = (torch.cat([x, torch.full((len(x), 1), 7).to(dtype)], 1) for x in (train, test))
        assert probe(train, labels, test, test_labels, 3) == 1
        wrong = test_labels.clone()
        wrong[:70] = (wrong[:70] + 1) % 3
        assert probe(train, labels, test, wrong, 3) == pytest.approx(0.9)


def test_the_layer_is_linear():
    """Broken: the probe would read what no linear layer can: the exclusive or of two features."""
    x = torch.randint(2, (2000, 2))
    assert probe(x, x[:, 0] ^ x[:, 1], x, x[:, 0] ^ x[:, 1], 2) < 0.8
    assert probe(x, x[:, 0] | x[:, 1], x, x[:, 0] | x[:, 1], 2) == 1


def test_random_labels_are_read_by_chance():
    """Broken: the probe would see the labels it is tested on."""
    labels, test_labels = torch.randint(5, (2000,)), torch.randint(5, (1000,))
    assert abs(probe(torch.randn(2000, 8), labels, torch.randn(1000, 8), test_labels, 5) - 0.2) < 0.05


def test_what_is_read_of_an_image(digits):
    """Broken: the counts would not be those of encode(), the latents not those that it quantizes, or images change
    rows."""
    checkpoint = torch.load(digits / "tokenizer.pt", weights_only=True)
    tokenizer, _ = evaluate_fid.open_tokenizer("", checkpoint, "digits", CPU)
    dataset, chosen = few_digits("test", 300), torch.tensor([250, 3, *range(100, 230), 3])
    found = table3_linear_probe.read(tokenizer, dataset, chosen, CPU)
    images = dataset.images[chosen]
    assert torch.equal(found.labels, dataset.labels[chosen]) and torch.equal(found.pixels, images.flatten(1))
    assert torch.equal(found.counts.long(), tokens_to_counts(tokenizer.encode(images / 127.5 - 1), 64))
    x = tokenizer.encoder.features(images / 127.5 - 1)
    assert torch.allclose(found.latents, x.mean(1), atol=1e-5) and found.latents.shape == (133, 32) and x.std() > 0.1
    assert torch.equal(tokenizer.encoder.project(x), tokenizer.encoder(images / 127.5 - 1))


def test_large_images_are_shrunk():
    """Broken: the raw pixels of ImageNet would take 250 GB."""
    tokenizer = evaluate_fid.SetTokenizer(64, 3, 16, 4, 16, 4, 16, 2, 1, 1)
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    dataset = torch.utils.data.Dataset()
    dataset.__getitems__ = lambda items: (images[[i for i, _ in items]], torch.arange(3)[[i for i, _ in items]])
    pixels = table3_linear_probe.read(tokenizer, dataset, torch.arange(3), CPU).pixels.view(3, 3, 32, 32)
    squares = images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert pixels.dtype == torch.uint8 and (pixels - squares).abs().max() <= 0.5


def test_the_table(digits, few, tmp_path, capsys, monkeypatch):
    """Broken: a row would lack, be another tokenizer's, or not stand beside the pixels and chance."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(variants, "tokenizer", lambda **options: asked.append(options) or f"{digits}/tokenizer.pt")
    table3_linear_probe.main(["--num_tokens=16", "--codebook_sizes=64", "--epochs=10", "--num_train=500",
                              "--device=cpu"])
    assert asked == [{"num_tokens": M, "codebook_size": C, "device": "cpu"} | table3_linear_probe.table6_sweep.TOKENIZER
                     for M, C in ((32, 64), (16, 128))]
    said = capsys.readouterr().out
    rows = re.findall(r"\| 6 \| 64 \| ([\d.]+)% \| ([\d.]+)% \|", said)
    assert len(rows) == 2 and rows[0] == rows[1]
    pixels = float(re.search(r"784 raw pixels: ([\d.]+)%", said)[1])
    most = few_digits("train", 600).labels[evaluate_fid.evenly(600, 500)].mode().values
    chance = few_digits("test", 400).labels == most
    assert f"most frequent class: {chance.double().mean():.1%}" in said and "of 500 training images" in said
    assert pixels > 75 and all(20 < float(number) < 90 for number in rows[0])
    table3_linear_probe.main([f"--ckpt={digits}/tokenizer.pt", "--epochs=1", "--device=cpu"])
    assert "of 600 training images" in capsys.readouterr().out


def test_images_of_a_folder(tmp_path, capsys):
    """Broken: the script would work on the digits only."""
    os.remove(make_image_folder(tmp_path, 120, classes=3))
    config = dict(image_size=48, channels=3, patch_size=16, num_tokens=4, codebook_size=16, code_dim=4, width=16,
                  heads=2,
                  encoder_layers=1, decoder_layers=1)
    tokenizer = evaluate_fid.SetTokenizer(**config)
    torch.save({"kind": "tokenizer", "model_config": config, "weights": tokenizer.state_dict()}, tmp_path / "t.pt")
    arguments = [f"--ckpt={tmp_path}/t.pt", "--epochs=2", "--device=cpu"]
    assert_one_sentence(run_here(table3_linear_probe.main, *arguments, folder=tmp_path),
                        "does not say what it was trained on")
    table3_linear_probe.main([*arguments, f"--data={tmp_path}", "--workers=1"])
    said = capsys.readouterr().out
    assert "| 4 | 16 |" in said
    assert "of 30 validation images, after 2 epochs of 120 training images; 3072 raw pixels" in said
    assert "most frequent class: 33.3%" in said


@pytest.mark.parametrize("arguments, words", [
    (["--ckpt=none.pt"], ["no checkpoint none.pt", "train_tokenizer.py"]), (["--epochs=0"], ["--epochs", "at least 1"]),
    (["--ckpt", "tokenizer.pt", "--data=nowhere"], ["no folder nowhere"]),
    (["--num_train=0"], ["--num_train", "at least 1"]),
    (["--ckpt", "fsdd.pt"], ["fsdd.pt is not a tokenizer checkpoint"]),
])
def test_mistakes_get_one_sentence(arguments, words, digits):
    """Broken: a mistake on the command line would end in a traceback."""
    assert_one_sentence(run_here(table3_linear_probe.main, *arguments, folder=digits), *words)
