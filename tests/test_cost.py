"""The cost of the paper's training: what is counted must be what a reader can work out by hand."""
import pytest
import torch
from torch import nn

from paper import cost


@pytest.mark.slow
@pytest.mark.parametrize("num_codes", [0, 384])
def test_flops_of_the_denoiser(num_codes):
    """Broken: the table's FLOPs would leave out attention, count a backward pass twice, or not be those of the set's
    codes; generation needs all codes."""
    found = cost.denoiser_cost("S", num_codes)
    width, layers, C, M = 384, 12, 4096, 128

    def forward(L):  # logits of L codes, which attend to all codes or to the tokens
        keys = M if num_codes else L
        block = 2 * width ** 2 * (10 * L + 2 * keys) + 4 * L * keys * width + 12 * width ** 2
        return layers * block + 2 * L * width * (M + 1)

    assert found.forward == pytest.approx(forward(C), rel=0.01)
    assert found.training == pytest.approx(3 * forward(num_codes or C), rel=0.01)
    assert found.step == pytest.approx(found.training, rel=0.01)
    assert round(found.trained / 1e6, 1) == 36.0 and found.state_bytes == 24 * found.trained
    # bytes for an image: more than one row for each block and code, fewer than 100
    rows = layers * (num_codes or C) * width * 2
    assert rows < found.image_bytes < 100 * rows


def test_kept_bytes():
    """Broken: the table's memory would count weights as activations, or the same tensor twice."""
    model = nn.Linear(10, 20)
    x = torch.randn(8, 10)
    assert cost.kept_bytes(model, lambda: model(x).exp().sum()) == 4 * (8 * 10 + 8 * 20)  # the input, and what exp made
