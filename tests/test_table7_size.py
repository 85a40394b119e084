"""Table 7: the size of the denoiser against generation."""

import pytest
import torch

import common
import train_fsdd
from paper import table7_size, variants
from tests.test_common import assert_one_sentence, run_here
from tests.test_sample import save_random_checkpoint
from tests.test_variants import DENOISER, SET, TOKENIZER


def table(capsys, *options):
    table7_size.main([*options, "--device=cpu"])
    return [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]


def test_the_papers_sizes(tmp_path):
    """Broken: the parameters would not be counted as in the paper: 36 million (S) and 137 million (B)."""
    for name, expected in (("S", 36.0), ("B", 136.7)):
        config = dict(codebook_size=4096, num_tokens=128, num_classes=1000, unused_rows=True)
        config |= zip(("width", "layers", "heads"), train_fsdd.MODELS[name])
        common.save_checkpoint({"kind": "fsdd", "model_config": config}, f"{tmp_path}/fsdd.pt")
        assert table7_size.size(f"{tmp_path}/fsdd.pt")[1] / 1e6 == pytest.approx(expected, abs=0.05)


def test_the_digits_two_sizes(cache, capsys, monkeypatch):
    """Broken: the smaller denoiser would differ in more than its size, be of another tokenizer, or stand in the other's
    row."""
    common.save_checkpoint(torch.load(variants.tokenizer(**SET, **TOKENIZER), weights_only=True), "tokenizer.pt")
    own = torch.load(variants.fsdd("tokenizer.pt", **DENOISER, lr=1e-3), weights_only=True)
    common.save_checkpoint(own, "fsdd.pt")
    monkeypatch.setattr(variants, "fid", lambda path, *args, **options: options["num"] + (path == "fsdd.pt"))
    rows = [[cell.strip() for cell in row] for row in table(capsys, "--num=30")]
    smaller = torch.load(next(cache.glob("fsdd-*-width8-*.pt")), weights_only=True)
    millions = [sum(weight.numel() for weight in checkpoint["weights"].values()) / 1e6 for checkpoint in (smaller, own)]
    assert rows == [["4", "16", "1", "8", f"{millions[0]:.2f} M", "30.0"],
                    ["4", "16", "1", "16", f"{millions[1]:.2f} M", "31.0"]]
    differ = {name for name in own["config"] if own["config"][name] != smaller["config"][name]}
    assert differ - variants.NO_MATTER == {"width", "heads"} and smaller["config"]["heads"] == 1
    weights = own["tokenizer"]["weights"]
    assert all(torch.equal(weights[name], smaller["tokenizer"]["weights"][name]) for name in weights)


def test_checkpoints_that_are_given(cache, digits, capsys):
    """Broken: with --ckpt something would be trained, or a row be missing."""
    rows = table(capsys, "--ckpt", f"{digits}/fsdd.pt", f"{digits}/fsdd.pt", "--num=30")
    assert len(rows) == 2 and rows[0] == rows[1] and not cache.exists()


def test_mistakes_get_one_sentence(cache, digits, tmp_path):
    """Broken: a mistake would end in a traceback, or denoisers of two tokenizers be compared."""
    main = table7_size.main
    assert_one_sentence(run_here(main, folder=tmp_path), "no checkpoint fsdd.pt", "python train_fsdd.py")
    save_random_checkpoint("fsdd.pt")
    assert_one_sentence(run_here(main, folder=tmp_path), "no checkpoint tokenizer.pt", "python train_tokenizer.py")
    checkpoint = torch.load(digits / "tokenizer.pt", weights_only=True)
    common.save_checkpoint(checkpoint, "tokenizer.pt")
    assert_one_sentence(run_here(main, folder=tmp_path), "fsdd.pt was not trained on the digits", "--ckpt")
    fsdd = torch.load(digits / "fsdd.pt", weights_only=True)
    fsdd["tokenizer"]["weights"]["quantizer.codebook"] += 1
    common.save_checkpoint(fsdd, "fsdd.pt")
    assert_one_sentence(run_here(main, folder=tmp_path), "another tokenizer than tokenizer.pt", "train_fsdd.py")
    assert_one_sentence(run_here(main, "--ckpt", digits / "tokenizer.pt", folder=tmp_path), "is not a fsdd checkpoint")
