"""Fig. 6: images that share a code."""
import torch
from PIL import Image

from paper import fig6_clusters
from tests.conftest import few_digits
from tests.scripts import assert_one_sentence, run_here


def test_purity_by_hand():
    """Fails if the share of the most frequent class is another's, or counted over all images."""
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    contains = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    shares, classes = fig6_clusters.purity(contains, labels)
    assert torch.allclose(shares, torch.tensor([2 / 3, 2 / 4, 1.0], dtype=torch.float64))
    assert classes.tolist() == [0, 1, 2]


def test_the_table_and_the_figure(digits, tmp_path, capsys, monkeypatch):
    """Fails if the clusters are not those of the tokens, or chance is not that of clusters of the same sizes, or the
    script ends in a traceback where there is no cluster."""
    monkeypatch.setattr("evaluate_fid.open_dataset", lambda where, split, size: few_digits(split, 500))
    arguments = [f"--ckpt={digits}/tokenizer.pt", f"--out={tmp_path}/f.png"]
    fig6_clusters.main([*arguments, "--k=1", "--least=5", "--shown=4"])
    output = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4 and "mean purity of the" in output
    shares = [float(row[3].strip(" %")) for row in rows]
    assert shares == sorted(shares, reverse=True) and all(int(row[1]) >= 5 for row in rows)
    with Image.open(tmp_path / "f.png") as page:
        assert page.height == 4 * 56
    assert_one_sentence(run_here(fig6_clusters.main, *arguments, "--k=7", folder=tmp_path), "no code", "--k")
