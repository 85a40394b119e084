"""Quality against the number of sampling steps."""
import pytest
from PIL import Image

from paper import table5_steps, variants
from tests.test_evaluate_fid import evaluate


@pytest.mark.slow
def test_the_table(digits, cache, capsys, monkeypatch):
    """Broken: a row would be of another sampler, number of steps or setting than it says."""
    monkeypatch.setattr(table5_steps, "STEPS", (1, 2))
    table5_steps.main([f"--ckpt={digits}/fsdd.pt", "--num=40", "--device=cpu"])
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                   for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows] == [["exchange", "1"], ["exchange", "2"], ["paper", "1"], ["paper", "2"]]
    found = evaluate(f"--ckpt={digits}/fsdd.pt", "--num=40", "--sampler=paper", "--steps=2", "--guidance=4,30,30",
                     "--top_k=2", "--top_p=1", f"--classifier={variants.CLASSIFIER}", folder=cache.parent)
    assert head[2] == "digits FID" and rows[3][2] == f"{found['digits_fid']:.1f}"
    assert rows[3][5] == f"{found['classified_as_label']:.1%}"
    with Image.open("steps.png") as page:
        assert page.size == (table5_steps.WIDTH, table5_steps.HEIGHT)
