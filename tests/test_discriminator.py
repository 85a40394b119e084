"""The discriminator's downsampling; its losses are tested in test_train_tokenizer.py."""
import torch
import torch.nn.functional as F

from published.discriminator import Discriminator, halve


def test_blur():
    """Broken: the discriminator's downsampling would alias, shift or change the brightness."""
    image = torch.randn(2, 3, 8, 10)
    padded, kernel = F.pad(image, (1, 1, 1, 1)), (1, 3, 3, 1)
    expected = sum(kernel[i] * kernel[j] * padded[:, :, i:i + 7:2, j:j + 9:2] for i in range(4) for j in range(4)) / 64
    assert torch.allclose(halve(image), expected, atol=1e-6)


def test_patches_of_any_image():
    """Broken: the discriminator would not take grey images, or not give 16 x 16 logits."""
    grey = torch.rand(2, 1, 40, 28) * 2 - 1
    logits = Discriminator(32)
    assert logits(grey).shape == (2, 1, 16, 16) and torch.equal(logits(grey), logits(grey.repeat(1, 3, 1, 1)))
