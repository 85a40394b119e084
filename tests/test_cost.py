"""The cost of the paper's training: what is counted must be what a reader can work out by hand."""
import pytest
import torch
from torch import nn

from paper import cost


def test_flops_of_the_denoiser():
    """Broken: the table's FLOPs would leave attention out, count a backward pass twice, or be those of another
    model."""
    trained, state, forward, training, step, fixed, each = cost.denoiser_cost("S")
    width, layers, C, M = 384, 12, 4096, 128
    expected = layers * (2 * C * 12 * width ** 2 + 4 * C ** 2 * width + 2 * 6 * width ** 2) + 2 * C * width * (M + 1)
    assert forward == pytest.approx(expected, rel=0.01) and training == pytest.approx(3 * forward, rel=0.01)
    assert round(trained / 1e6, 1) == 36.0 and state == 24 * trained and step == pytest.approx(training, rel=0.01)
    # bytes an image: more than one row a block, fewer than 100
    assert layers * C * width * 2 < each < layers * C * width * 200


def test_flops_of_the_sparse_denoiser():
    """Broken: the table would not show that a training step costs what the set costs; generation needs all codes."""
    _, _, forward, training, step, _, _ = cost.denoiser_cost("S", 384)
    width, layers, C, M = 384, 12, 4096, 128
    by_rows = [layers * (2 * width ** 2 * (10 * L + 2 * M) + 4 * L * M * width + 12 * width ** 2) + 2 * L * width * 129
               for L in (C, 384)]
    assert forward == pytest.approx(by_rows[0], rel=0.01) and training == pytest.approx(3 * by_rows[1], rel=0.01)
    assert step == pytest.approx(training, rel=0.01)


def test_timed_steps(monkeypatch, capsys):
    """Broken: a time would be that of another step, so that the sparse one would seem as slow as the dense one."""
    seconds = {num_codes: cost.timed_step("digits", 512, 16, 4, num_codes)[0] for num_codes in (0, 48)}
    assert 0 < 2 * seconds[48] < seconds[0]
    product = cost.matrix_product(256)
    assert product > 1e8
    monkeypatch.setattr(cost, "TIMED", [("digits", 64, 8, 4)])
    monkeypatch.setattr(cost, "matrix_product", lambda: product)
    cost.print_timed_steps()
    table = capsys.readouterr().out.split("On this machine")[1].strip().splitlines()
    assert [line.split("|")[1].strip() for line in table[4:]] == [
        "digits, C = 64, dense", "digits, C = 64, sparse, all codes", "digits, C = 64, sparse, 24 codes"]


def test_kept_bytes():
    """Broken: the table's memory would count weights as activations, or the same tensor twice."""
    model = nn.Linear(10, 20)
    x = torch.randn(8, 10)
    assert cost.kept_bytes(model, lambda: model(x).exp().sum()) == 4 * (8 * 10 + 8 * 20)  # the input, and what exp made
