"""Table 1: the distance of the reconstructions in five orders of the tokens."""
import pytest
import torch
from PIL import Image

import evaluate_fid
from data.digits_classifier import DigitsClassifier
from paper import table1_order, variants
from tests.test_common import assert_one_sentence, run_here
from tests.test_evaluate_fid import evaluate


@pytest.fixture
def table(digits, small_digits, tmp_path, capsys, monkeypatch):
    """A function: options -> the table's two rows of numbers, over 400 test digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "CLASSIFIER", f"{digits}/digits_classifier.pt")

    def rows(*options):
        table1_order.main([f"--ckpt={digits}/tokenizer.pt", "--device=cpu", *options])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert lines[0].split(" | ")[1:] == ["as encoded", "reversed", "shuffled", "ascending", "descending |"]
        assert lines[2].startswith("| digits FID |") and lines[3].startswith("| largest change of a pixel, of 255 |")
        return [[float(number) for number in line.split("|")[2:-1]] for line in lines[2:4]]

    return rows


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


def test_a_decoder_that_sees_the_order_shows(table, monkeypatch):
    """Broken: the five columns would not be five orders, or the change not the largest of all pixels and batches."""
    def first_token_shines(self, tokens):
        light = (tokens[:, 0] - 32) / 127.5  # that many steps of brightness away from the middle
        return light[:, None, None, None].expand(-1, 1, 28, 28)

    monkeypatch.setattr("tokenizer.SetTokenizer.decode", first_token_shines)
    fids, changes = table("--seed=1")
    assert max(fids) > 1.01 * min(fids)
    with torch.no_grad():
        checkpoint = torch.load(variants.CLASSIFIER.replace("digits_classifier", "tokenizer"), weights_only=True)
        tokenizer, dataset = evaluate_fid.open_tokenizer("", checkpoint, "digits", torch.device("cpu"))
        tokens = tokenizer.encode(dataset.images / 127.5 - 1)  # (400, 6)
    shuffle = torch.randperm(6, generator=table1_order.common.generator("cpu", "order", 1))
    leading = [tokens[:, 0], tokens[:, -1], tokens[:, shuffle[0]], tokens.amin(1), tokens.amax(1)]
    assert shuffle[0] not in (0, 5)  # else the columns would be alike
    expected = [(other - tokens[:, 0]).abs().max().item() for other in leading]
    assert changes == pytest.approx(expected, abs=1) and min(expected[1:]) > 3  # 1: a brightness may be rounded


def test_processes_see_every_image_once(digits, small_digits, tmp_path):
    """Broken: under torchrun an image would count twice or not at all."""
    args = table1_order.parse([f"--ckpt={digits}/tokenizer.pt", f"--out={tmp_path}/f.png", "--num=230"])
    checkpoint = torch.load(args.ckpt, weights_only=True)
    tokenizer, dataset = evaluate_fid.open_tokenizer(args.ckpt, checkpoint, "digits", torch.device("cpu"))
    net = DigitsClassifier()
    net.load_state_dict(torch.load(digits / "digits_classifier.pt", weights_only=True)["weights"])
    sums = []
    for processes in (1, 3):
        statistics = [evaluate_fid.Statistics(net.dims) for _ in range(6)]
        for rank in range(processes):
            table1_order.measure(tokenizer, dataset, net, statistics, args, torch.device("cpu"), rank, processes)
        sums.append(torch.cat([tensor.flatten() for one in statistics for tensor in one.sums()]))
    assert sums[0][0] == 230 and torch.allclose(*sums, rtol=1e-5)


@pytest.mark.parametrize("arguments, words", [
    (["--ckpt=none.pt"], ["no checkpoint none.pt", "train_tokenizer.py"]), (["--num=1"], ["--num", "at least 2"]),
    (["--data=nowhere"], ["no folder nowhere"]), (["--out=a.jpg"], ["--out", "a.jpg"]),
    (["--out=no/a.png"], ["no folder no"]),
    (["--inception=none.pth"], ["no file none.pth"]),
])
def test_mistakes_get_one_sentence(arguments, words, digits):
    """Broken: a mistake on the command line would end in a traceback."""
    assert_one_sentence(run_here(table1_order.main, *arguments, folder=digits), *words)
