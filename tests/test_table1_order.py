"""Table 1: the distance of the reconstructions in five orders of the tokens."""
import re

import torch

from evaluate_fid import side
from paper import table1_order
from tests.test_evaluate_fid import digits, small_digits  # noqa: F401 (fixtures)


def test_the_table(digits, small_digits, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Broken: the orders would not be compared with the images, or a decoder that sees the order would not show."""
    monkeypatch.chdir(tmp_path)
    arguments = [f"--ckpt={digits}/tokenizer.pt", "--num=300", "--device=cpu"]
    table1_order.main(arguments)
    said = capsys.readouterr().out
    fids = [float(number) for number in re.search(r"\| digits FID \|(.*)\|", said)[1].split("|")]
    assert len(fids) == 5 and max(fids) - min(fids) < 0.01 * fids[0] and fids[0] > 1
    assert "| largest change of a pixel, of 255 | 0 |" in said and (tmp_path / "figure4.png").exists()

    def sees_the_order(self, tokens):
        return torch.linspace(-1, 1, 28 * 28).view(1, 1, 28, 28) * (tokens[:, :1, None, None] / 64)

    monkeypatch.setattr("tokenizer.SetTokenizer.decode", sees_the_order)
    table1_order.main(arguments)
    said = capsys.readouterr().out
    fids = [float(number) for number in re.search(r"\| digits FID \|(.*)\|", said)[1].split("|")]
    assert max(fids) > 1.01 * min(fids)


def test_largest_change():
    """Broken: the table would not show the largest difference, or lose it between batches."""
    images = torch.randint(256, (7, 1, 4, 4), dtype=torch.uint8)
    others = images.clone()
    others[4, 0, 2, 1] = 255 - images[4, 0, 2, 1]
    expected = abs(255 - 2 * int(images[4, 0, 2, 1]))
    sides = [side("", 7, lambda part, x=x: x[part]) for x in (images, others)]
    assert table1_order.largest_change(*sides, 3) == table1_order.largest_change(*sides[::-1], 3) == expected
