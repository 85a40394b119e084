"""Fig. 3: the counts of an image on their way to noise."""
from PIL import Image

from paper import fig3_process


def test_the_figure(digits, tmp_path, capsys):
    """Fails if the picture lacks a time, or the table the sums."""
    fig3_process.main([f"--ckpt={digits}/fsdd.pt", f"--out={tmp_path}/f.png"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(fig3_process.TIMES)
    for line in lines[1:]:
        _, t, before, after, added, removed, differ, _ = line.split("|")
        assert int(after) == 6 and int(before) + int(added) - int(removed) == 6
    assert lines[1].endswith("| 0 |")  # at t = 0 nothing differs from X_0
    with Image.open(tmp_path / "f.png") as page:
        assert page.height == len(fig3_process.TIMES) * fig3_process.HEIGHT and len(page.getcolors(2 ** 16)) > 3
