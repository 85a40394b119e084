"""Quality against the number of sampling steps."""
import pytest

from paper import table5_steps, variants
from tests.scripts import read_table
from tests.test_evaluate_fid import evaluate


@pytest.mark.slow
def test_the_table(digits, cache, capsys, monkeypatch):
    """Fails if a row is of another sampler, number of steps or setting than it says."""
    monkeypatch.setattr(table5_steps, "STEPS", (1, 2))
    table5_steps.main([f"--ckpt={digits}/fsdd.pt", "--num=40", "--device=cpu"])
    rows = read_table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["paper", "1"], ["paper", "2"], ["exchange", "1"], ["exchange", "2"]]
    found = evaluate(f"--ckpt={digits}/fsdd.pt", "--num=40", "--sampler=exchange", "--steps=2",
                     f"--classifier={variants.CLASSIFIER}", folder=cache.parent)
    assert rows[3][2:] == [f"{found['digits_fid']:.1f}", f"{found['digits_precision']:.2f}",
                           f"{found['digits_recall']:.3f}", f"{found['classified_as_label']:.1%}"]
