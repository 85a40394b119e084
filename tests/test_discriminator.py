"""The discriminator's downsampling."""
import torch

from published.discriminator import halve


def test_blur():
    """Broken: the discriminator's downsampling would alias, shift or change the brightness."""
    ones = torch.ones(1, 2, 8, 8)
    assert torch.allclose(halve(ones)[:, :, 1:-1, 1:-1], torch.ones(1, 2, 2, 2))
    point = torch.zeros(1, 1, 8, 8)
    point[0, 0, 3, 4] = 64
    weight = torch.tensor([1.0, 3.0, 3.0, 1.0])
    for row in range(4):
        for column in range(4):  # position i reads pixels 2 i - 1 .. 2 i + 2
            expected = sum(weight[i] * weight[j] * (2 * row - 1 + i == 3) * (2 * column - 1 + j == 4)
                           for i in range(4) for j in range(4))
            assert halve(point)[0, 0, row, column] == expected
