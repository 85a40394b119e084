"""Table 1: the distance of the reconstructions in five orders of the tokens."""
import pytest
import torch

from paper import table1_order
from paper.inputs import open_tokenizer
from support.seeds import generator
from tests.scripts import read_table
from tests.test_evaluate_fid import evaluate


@pytest.fixture
def table(digits, small_digits, capsys):
    """A function: options -> the table's two rows of numbers, over 400 test digits."""

    def rows(*options):
        table1_order.main([f"--ckpt={digits}/tokenizer.pt", f"--classifier={digits}/digits_classifier.pt",
                           "--device=cpu", *options])
        return [[float(number) for number in row[1:]] for row in read_table(capsys.readouterr().out)]

    return rows


@pytest.mark.slow
def test_the_table(table, digits, tmp_path):
    """Fails if the orders are compared with other images than the validation images, or by another distance than
    rFID."""
    fids, changes = table()
    expected = evaluate("--ckpt", digits / "tokenizer.pt", folder=tmp_path)["digits_fid"]
    assert expected > 1 and fids == pytest.approx([expected] * 5, rel=0.01)
    assert changes[0] == 0 and max(changes) <= 1  # rounding
    assert table("--num=150")[0][0] != fids[0]


def test_a_decoder_that_depends_on_the_order_shows(table, digits, monkeypatch):
    """Fails if the five columns are not five orders, or the change is not the largest of all pixels and batches."""
    def first_token_as_brightness(self, tokens):
        light = (tokens[:, 0] - 32) / 127.5  # that many steps of brightness away from the middle
        return light[:, None, None, None].expand(-1, 1, 28, 28)

    monkeypatch.setattr("tokenizer.SetTokenizer.decode", first_token_as_brightness)
    fids, changes = table("--seed=1")
    assert max(fids) > 1.01 * min(fids)
    tokenizer, dataset, _ = open_tokenizer(f"{digits}/tokenizer.pt", None, torch.device("cpu"))
    tokens = tokenizer.encode(dataset.images / 127.5 - 1)  # (400, 6)
    shuffle = torch.randperm(6, generator=generator("cpu", "order", 1))
    leading = [tokens[:, 0], tokens[:, -1], tokens[:, shuffle[0]], tokens.amin(1), tokens.amax(1)]
    assert shuffle[0] not in (0, 5)  # else the columns would be alike
    expected = [(other - tokens[:, 0]).abs().max().item() for other in leading]
    assert changes == pytest.approx(expected, abs=1) and min(expected[1:]) > 3  # 1: a brightness may be rounded
