"""Fig. 3: the counts of an image on their way to noise."""
from PIL import Image

from paper import fig3_process
from tests.scripts import read_table


def test_the_figure(digits, capsys):
    """Fails if the picture or the table lacks a time, or if a sum is not M."""
    fig3_process.main([f"--ckpt={digits}/fsdd.pt", "--out=f.png"])
    rows = read_table(capsys.readouterr().out)
    assert len(rows) == len(fig3_process.TIMES) and rows[0][-1] == "0"  # at t = 0 nothing differs from X_0
    for t, before, after, added, removed, differ in rows:
        assert int(after) == 6 and int(before) + int(added) - int(removed) == 6
    with Image.open("f.png") as page:
        assert page.height == len(fig3_process.TIMES) * fig3_process.HEIGHT and len(page.getcolors(2 ** 16)) > 3
