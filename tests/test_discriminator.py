"""The discriminator's downsampling; its losses are tested in test_train_tokenizer.py."""
import torch
import torch.nn.functional as F

from published.discriminator import halve


def test_blur():
    """Fails if the discriminator's downsampling aliases, shifts or changes the brightness."""
    image = torch.randn(2, 3, 8, 10)
    padded, kernel = F.pad(image, (1, 1, 1, 1)), (1, 3, 3, 1)
    expected = sum(kernel[i] * kernel[j] * padded[:, :, i:i + 7:2, j:j + 9:2] for i in range(4) for j in range(4)) / 64
    assert torch.allclose(halve(image), expected, atol=1e-6)
