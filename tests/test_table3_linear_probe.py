"""Table 3: what a linear classifier recognizes from the sets."""
import re
from types import SimpleNamespace

import pytest
import torch

import evaluate_fid
from dual_transform import tokens_to_counts
from paper import table3_linear_probe, variants
from tests.conftest import few_digits
from tests.scripts import read_table

CPU = torch.device("cpu")
ARGS = SimpleNamespace(epochs=30, seed=0)


def test_features_of_an_image(digits):
    """Fails if the counts are not those of encode(), the latents not those that it quantizes, or images change
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


@pytest.mark.slow
def test_the_table(digits, small_digits, capsys, monkeypatch):
    """Fails if a row is missing or that of another tokenizer, or if pixels and chance are those of other images."""
    asked = []
    monkeypatch.setattr(table3_linear_probe, "open_dataset", evaluate_fid.open_dataset)
    monkeypatch.setattr(variants, "tokenizer", lambda **options: asked.append(options) or f"{digits}/tokenizer.pt")
    table3_linear_probe.main(["--num_tokens=16", "--codebook_sizes=64", "--epochs=10", "--num_train=500",
                              "--device=cpu"])
    assert [(options["num_tokens"], options["codebook_size"]) for options in asked] == [(32, 64), (16, 128)]
    output = capsys.readouterr().out
    rows = read_table(output)
    assert len(rows) == 2 and rows[0] == rows[1] and rows[0][:2] == ["6", "64"]
    assert all(20 < float(cell.strip("%")) < 90 for cell in rows[0][2:])
    most = few_digits("train", 600).labels[evaluate_fid.evenly(600, 500)].mode().values
    chance = few_digits("test", 400).labels == most
    assert f"most frequent class: {chance.double().mean():.1%}" in output
    assert float(re.search(r"784 raw pixels: ([\d.]+)%", output)[1]) > 75
