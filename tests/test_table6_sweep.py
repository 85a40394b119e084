"""Table 6: M and C against reconstruction and generation."""
import re

import pytest

from paper import table6_sweep
from tests.test_common import assert_one_sentence, run_here
from tests.test_evaluate_fid import evaluate
from tests.test_variants import DENOISER, TOKENIZER


def test_pairs_are_the_papers():
    """Broken: the table would not vary one of M and C at a time, or show the pair that both columns share twice."""
    pairs = table6_sweep.pairs((8, 32, 64), (32, 128, 512))
    assert pairs == [(32, 32), (32, 128), (32, 512), (8, 128), (64, 128)]
    assert table6_sweep.pairs((), (64,)) == [(32, 64)] and table6_sweep.pairs((16,), ()) == [(16, 128)]


def test_the_table_of_models_trained_here(cache, capsys, monkeypatch):
    """Broken: a row would be of models of another M or C, or its two distances change columns."""
    monkeypatch.setattr(table6_sweep, "TOKENIZER", {name: TOKENIZER[name] for name in TOKENIZER.keys() - {"device"}})
    monkeypatch.setattr(table6_sweep, "DENOISER", {name: DENOISER[name] for name in DENOISER.keys() - {"device"}})
    asked = ["--num_tokens=8", "--codebook_sizes=16", "--num=30", "--steps=1", "--device=cpu"]
    table6_sweep.main(asked)
    rows = re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out)
    assert [row[:2] for row in rows] == [("32", "16"), ("8", "128")]
    for M, C, rfid, gfid in rows:
        tokenizer, = cache.glob(f"tokenizer-num_tokens{M}-codebook_size{C}-*.pt")
        found = evaluate("--ckpt", tokenizer, f"--classifier={table6_sweep.variants.CLASSIFIER}", folder=cache)
        assert float(rfid) == pytest.approx(found["digits_fid"], abs=0.051) and rfid != gfid
    monkeypatch.setattr("train_tokenizer.main", None)  # a second run trains nothing
    monkeypatch.setattr("train_fsdd.main", None)
    capsys.readouterr()
    table6_sweep.main(asked)
    assert re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out) == rows


def test_the_table_of_checkpoints(cache, digits, capsys):
    """Broken: a tokenizer and a denoiser of its M and C would not share a row, or one alone be left out."""
    both = [f"{digits}/fsdd.pt", f"{digits}/tokenizer.pt"]
    table6_sweep.main(["--ckpt", *both, "--num=30", "--device=cpu"])
    rfid, gfid = re.search(r"\| 6 \| 64 \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out).groups()
    assert rfid != gfid
    table6_sweep.main(["--ckpt", both[1], "--device=cpu"])
    assert f"| 6 | 64 | {rfid} | - |" in capsys.readouterr().out


def test_mistakes_get_one_sentence(cache, digits, tmp_path):
    """Broken: a mistake on the command line would end in a traceback."""
    assert_one_sentence(run_here(table6_sweep.main, "--ckpt=none.pt", folder=tmp_path), "no checkpoint none.pt",
                        "train_fsdd.py")
    assert_one_sentence(run_here(table6_sweep.main, "--codebook_sizes=many", folder=tmp_path), "--codebook_sizes",
                        "many")
    assert_one_sentence(run_here(table6_sweep.main, "--ckpt", digits / "fsdd.pt", "--ref=none.npz", folder=tmp_path),
                        "none.npz")
