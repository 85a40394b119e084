"""Table 7: the size of the denoiser against generation."""
import pytest
import torch

from paper import table7_size, variants
from tests.scripts import read_table
from tests.test_variants import DENOISER


@pytest.mark.slow
def test_the_table(cache, digits, capsys, monkeypatch):
    """Fails if the two denoisers differ in more than their size, or stand in each other's row."""
    train = variants.fsdd
    small = {name: DENOISER[name] for name in ("layers", "batch_size", "steps")}
    monkeypatch.setattr(variants, "fsdd", lambda path, **options: train(path, **options | small))
    table7_size.main([f"--ckpt={digits}/tokenizer.pt", "--num=30", "--device=cpu"])
    rows = read_table(capsys.readouterr().out)
    found = [torch.load(next(cache.glob(f"fsdd-*-width{width}-*.pt")), weights_only=True) for width in (48, 96)]
    for row, width, checkpoint in zip(rows, (48, 96), found, strict=True):
        millions = sum(weight.numel() for weight in checkpoint["weights"].values()) / 1e6
        assert row[:5] == ["6", "64", "1", str(width), f"{millions:.2f} M"] and float(row[5]) > 0
    differ = {name for name, value in found[0]["config"].items() if value != found[1]["config"][name]}
    assert differ - variants.NOT_THE_MODEL == {"width", "heads"}
