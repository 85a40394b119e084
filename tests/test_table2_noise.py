"""Table 2: the tokens that noise leaves as they were."""
from collections import Counter

import pytest
import torch

from paper import table2_noise
from paper.layouts import KINDS
from tests.conftest import few_digits
from tests.scripts import read_table
from tests.test_tokenizer import small_tokenizer

SMALL = dict(image_size=28, channels=1, patch_size=7, num_tokens=16, codebook_size=20, code_dim=4, width=16, heads=2,
             encoder_layers=2, decoder_layers=1)


def save_tokenizer(path, kind="tokenizer", **settings):
    """A checkpoint of a tokenizer of digits with large random matrices; returns the tokenizer."""
    model = small_tokenizer(model_class=KINDS[kind], **SMALL | settings)
    torch.save({"kind": kind, "model_config": SMALL | settings, "weights": model.state_dict(),
                "config": {"data": "digits"}}, path)
    return model


@pytest.mark.parametrize("C", [1, 3, 40])
def test_overlap_is_that_of_counters(C):
    """Fails if the shares differ from a count by hand, or mix up the images of a batch."""
    tokens, others = torch.randint(C, (2, 50, 9))
    others[::2, :5] = tokens[::2, :5]
    as_set, as_sequence = table2_noise.overlap(tokens, others, C)
    for a, b, in_set, in_sequence in zip(tokens.tolist(), others.tolist(), as_set.tolist(), as_sequence.tolist()):
        assert in_set == pytest.approx((Counter(a) & Counter(b)).total() / 9)
        assert in_sequence == pytest.approx(sum(x == y for x, y in zip(a, b)) / 9) and in_sequence <= in_set + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_has_the_power_asked_for(channels):
    """Fails if the ratio is that of other units, of amplitudes, or of the batch instead of each image."""
    brightness = torch.tensor([1, 0.5, 0.1, 0.01, 1, 0]).view(6, 1, 1, 1)
    pixels = torch.rand(6, channels, 64, 64, dtype=torch.float64) * brightness
    for snr in table2_noise.SNRS:
        noisy = table2_noise.add_noise(2 * pixels - 1, torch.randn(pixels.shape, dtype=torch.float64), snr)
        noise = (noisy + 1) / 2 - pixels
        ratio = 10 * torch.log10(pixels.square().mean((1, 2, 3)) / noise.square().mean((1, 2, 3)))
        assert (ratio[:5] - snr).abs().max() < 0.3
        assert noise[5].abs().max() < 1e-12  # black has no signal, so no noise either
    assert noisy.min() < -1 and noisy.max() > 1  # at 1 dB: not clipped


@pytest.mark.slow
def test_the_table(small_digits, capsys):
    """Fails if a row is not that tokenizer's, or if the two ways to count are exchanged."""
    model = save_tokenizer("set.pt")
    save_tokenizer("sequence.pt", kind="sequence tokenizer", num_tokens=7)
    save_tokenizer("grid.pt", kind="grid tokenizer")
    table2_noise.main(["--ckpt", "grid.pt", "sequence.pt", "set.pt", "--device=cpu"])
    rows = read_table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["grid", "16"], ["sequence", "7"], ["set, as a sequence", "16"], ["set", "16"]]
    shares = [[float(share) for share in row[2:-1]] for row in rows]
    assert all(len(row) == 5 and 100 >= row[0] > row[2] > row[4] >= 0 for row in shares)
    assert all(a <= b for a, b in zip(*shares[2:])) and shares[2] != shares[3]
    images = few_digits("test", 400).images / 127.5 - 1
    squared_error = (model.decode(model.encode(images)) - images).square().mean().item()
    assert float(rows[3][-1]) == pytest.approx(squared_error, abs=1e-4)
