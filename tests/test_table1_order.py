"""Table 1: the distance of the reconstructions in five orders of the tokens."""
import pytest
import torch
from PIL import Image

from paper import table1_order
from paper.inputs import open_tokenizer, read_options
from published.classifier import Classifier
from support.seeds import generator
from tests.test_evaluate_fid import evaluate

CPU = torch.device("cpu")


@pytest.fixture
def table(digits, small_digits, capsys):
    """A function: options -> the table's two rows of numbers, over 400 test digits."""

    def rows(*options):
        table1_order.main([f"--ckpt={digits}/tokenizer.pt", f"--classifier={digits}/digits_classifier.pt",
                           "--device=cpu", *options])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert lines[0].split(" | ")[1:] == ["as encoded", "reversed", "shuffled", "ascending", "descending |"]
        assert lines[2].startswith("| digits FID |") and lines[3].startswith("| largest change of a pixel, of 255 |")
        return [[float(number) for number in line.split("|")[2:-1]] for line in lines[2:4]]

    return rows


@pytest.mark.slow
def test_the_table(table, digits, tmp_path):
    """Broken: the orders would be compared with other images than the validation images, by another distance than
    rFID."""
    fids, changes = table()
    expected = evaluate("--ckpt", digits / "tokenizer.pt", folder=tmp_path)["digits_fid"]
    assert expected > 1 and fids == pytest.approx([expected] * 5, rel=0.01)
    assert changes[0] == 0 and max(changes) <= 1  # rounding
    assert table("--num=150")[0][0] != fids[0]
    with Image.open(tmp_path / "figure4.png") as page:
        assert page.size == (6 * 56, 18 + 10 * 56)


@pytest.mark.slow
def test_a_decoder_that_depends_on_the_order_shows(table, digits, monkeypatch):
    """Broken: the five columns would not be five orders, or the change not the largest of all pixels and batches."""
    def first_token_as_brightness(self, tokens):
        light = (tokens[:, 0] - 32) / 127.5  # that many steps of brightness away from the middle
        return light[:, None, None, None].expand(-1, 1, 28, 28)

    monkeypatch.setattr("tokenizer.SetTokenizer.decode", first_token_as_brightness)
    fids, changes = table("--seed=1")
    assert max(fids) > 1.01 * min(fids)
    tokenizer, dataset, _ = open_tokenizer(f"{digits}/tokenizer.pt", None, CPU)
    tokens = tokenizer.encode(dataset.images / 127.5 - 1)  # (400, 6)
    shuffle = torch.randperm(6, generator=generator("cpu", "order", 1))
    leading = [tokens[:, 0], tokens[:, -1], tokens[:, shuffle[0]], tokens.amin(1), tokens.amax(1)]
    assert shuffle[0] not in (0, 5)  # else the columns would be alike
    expected = [(other - tokens[:, 0]).abs().max().item() for other in leading]
    assert changes == pytest.approx(expected, abs=1) and min(expected[1:]) > 3  # 1: a brightness may be rounded


def test_every_image_is_measured_by_one_rank(digits, small_digits, tmp_path, monkeypatch):
    """Broken: under torchrun an image would count twice or not at all."""
    monkeypatch.setattr("evaluate_fid.NETWORK_BATCH", 20)
    arguments = [f"--ckpt={digits}/tokenizer.pt", f"--out={tmp_path}/f.png", "--num=70"]
    args = read_options(table1_order.OPTIONS, "", "", arguments)
    tokenizer, dataset, _ = open_tokenizer(args.ckpt, None, CPU)
    net = Classifier("digits", 1, 28, 10)
    net.load_state_dict(torch.load(digits / "digits_classifier.pt", weights_only=True)["weights"])

    def sums(rank, world_size):
        statistics, _ = table1_order.measure(tokenizer, dataset, net, args, CPU, rank, world_size)
        return torch.cat([tensor.flatten() for one in statistics for tensor in one.sums()])

    alone = sums(0, 1)
    assert alone[0] == 70 and torch.allclose(sum(sums(rank, 3) for rank in range(3)), alone, rtol=1e-5)
