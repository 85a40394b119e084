"""Table 6: M and C against reconstruction and generation."""
from types import SimpleNamespace

import pytest

from paper import table6_sweep, variants
from tests.scripts import read_table
from tests.test_evaluate_fid import evaluate
from tests.test_variants import DENOISER, TOKENIZER


def test_pairs_are_the_papers():
    """Fails if the table does not vary one of M and C at a time, or shows the pair that both columns share twice."""
    pairs = table6_sweep.pairs(SimpleNamespace(num_tokens=(8, 32, 64), codebook_sizes=(32, 128, 512)))
    assert pairs == [(32, 32), (32, 128), (32, 512), (8, 128), (64, 128)]


@pytest.mark.slow
def test_the_table(cache, capsys, monkeypatch):
    """Fails if a row is of models of another M or C, or its two distances change columns."""
    monkeypatch.setattr(table6_sweep, "TOKENIZER", {name: TOKENIZER[name] for name in TOKENIZER.keys() - {"device"}})
    monkeypatch.setattr(table6_sweep, "DENOISER", {name: DENOISER[name] for name in DENOISER.keys() - {"device"}})
    table6_sweep.main(["--num_tokens=8", "--codebook_sizes=64", "--num=30", "--device=cpu"])
    rows = read_table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["32", "64"], ["8", "128"]]
    for M, C, reconstructions, samples in rows:
        tokenizer, = cache.glob(f"tokenizer-num_tokens{M}-codebook_size{C}-*.pt")
        found = evaluate("--ckpt", tokenizer, f"--classifier={variants.CLASSIFIER}", folder=cache)
        assert float(reconstructions) == pytest.approx(found["digits_fid"], abs=0.051) and reconstructions != samples
