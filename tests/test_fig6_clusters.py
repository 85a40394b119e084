"""Fig. 6: images that share a code."""
import torch
from PIL import Image

from paper import fig6_clusters
from tests.scripts import assert_one_sentence, read_table, run_here


def test_purity_by_hand():
    """Fails if the share of the most frequent class is another's, or counted over all images."""
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    contains = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    shares, classes = fig6_clusters.purity(contains, labels)
    assert torch.allclose(shares, torch.tensor([2 / 3, 2 / 4, 1.0], dtype=torch.float64))
    assert classes.tolist() == [0, 1, 2]


def test_the_table_and_the_figure(digits, small_digits, capsys):
    """Fails if the clusters are not listed by their purity, if one is smaller than asked for, or if the script ends in
    a traceback where there is no cluster."""
    arguments = [f"--ckpt={digits}/tokenizer.pt", "--out=f.png"]
    fig6_clusters.main([*arguments, "--k=1", "--least=5", "--shown=4"])
    rows = read_table(capsys.readouterr().out)
    shares = [float(row[3].strip(" %")) for row in rows]
    assert len(rows) == 4 and shares == sorted(shares, reverse=True) and all(int(row[1]) >= 5 for row in rows)
    with Image.open("f.png") as page:
        assert page.height == 4 * 56
    assert_one_sentence(run_here(fig6_clusters.main, *arguments, "--k=7", folder="."), "no code", "--k")
