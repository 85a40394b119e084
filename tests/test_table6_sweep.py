"""Table 6: M and C against reconstruction and generation."""
import pytest

from paper import table6_sweep, variants
from tests.scripts import assert_one_sentence, read_table, run_here
from tests.test_evaluate_fid import evaluate
from tests.test_variants import DENOISER, TOKENIZER


def test_pairs_are_the_papers():
    """Fails if the table does not vary one of M and C at a time, or shows the pair that both columns share twice."""
    pairs = table6_sweep.pairs((8, 32, 64), (32, 128, 512))
    assert pairs == [(32, 32), (32, 128), (32, 512), (8, 128), (64, 128)]


@pytest.mark.slow
def test_the_table_of_models_trained_here(cache, capsys, monkeypatch):
    """Fails if a row is of models of another M or C, or if its two distances change columns."""
    monkeypatch.setattr(table6_sweep, "TOKENIZER", {name: TOKENIZER[name] for name in TOKENIZER.keys() - {"device"}})
    monkeypatch.setattr(table6_sweep, "DENOISER", {name: DENOISER[name] for name in DENOISER.keys() - {"device"}})
    table6_sweep.main(["--num_tokens=8", "--codebook_sizes=64", "--num=30", "--steps=1", "--device=cpu"])
    rows = read_table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["32", "64"], ["8", "128"]]
    for M, C, rfid, gfid in rows:
        tokenizer, = cache.glob(f"tokenizer-num_tokens{M}-codebook_size{C}-*.pt")
        found = evaluate("--ckpt", tokenizer, f"--classifier={variants.CLASSIFIER}", folder=cache)
        assert float(rfid) == pytest.approx(found["digits_fid"], abs=0.051) and rfid != gfid


@pytest.mark.slow
def test_the_table_of_checkpoints(cache, digits, capsys):
    """Fails if a tokenizer and a denoiser of the same M and C do not share a row, or if one alone is left out."""
    fsdd, tokenizer = f"{digits}/fsdd.pt", f"{digits}/tokenizer.pt"
    table6_sweep.main(["--ckpt", fsdd, tokenizer, "--num=30", "--device=cpu"])
    (M, C, rfid, gfid), = read_table(capsys.readouterr().out)
    assert (M, C) == ("6", "64") and rfid != gfid
    table6_sweep.main(["--ckpt", tokenizer, "--device=cpu"])
    assert read_table(capsys.readouterr().out) == [["6", "64", rfid, "-"]]
    for wrong, words in (("--ref=none.npz", "none.npz"), (fsdd, "the second fsdd checkpoint")):
        finished = run_here(table6_sweep.main, "--num=30", "--ckpt", fsdd, wrong, folder=cache.parent)
        assert_one_sentence(finished, words)
