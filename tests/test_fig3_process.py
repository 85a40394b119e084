"""Fig. 3: the counts of an image on their way to noise."""
import pytest
import torch
from PIL import Image

from fsdd import forward_process, sample_noise
from paper import fig3_process


@pytest.mark.parametrize("prior", ["multinomial", "distinct"])
def test_states_are_those_of_the_forward_process(prior):
    """Broken: the figure would show another process than the one that is trained."""
    x0, x1 = (sample_noise(1, 20, 9, p) for p in ("multinomial", prior))
    uniform = torch.rand(x0.shape)
    for t in fig3_process.TIMES:
        before, after = fig3_process.before_and_after(x0, x1, t, uniform, 9)
        assert torch.equal(after, forward_process(x0, x1, torch.tensor([t]), uniform)) and after.sum() == 9
        assert (before - after).abs().sum() >= abs(int(before.sum()) - 9)


def test_the_figure(digits, tmp_path, capsys):
    """Broken: the picture would lack a time, or the table the sums."""
    fig3_process.main([f"--ckpt={digits}/fsdd.pt", f"--out={tmp_path}/f.png"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(fig3_process.TIMES)
    for line in lines[1:]:
        _, t, before, after, added, removed, differ, _ = line.split("|")
        assert int(after) == 6 and int(before) + int(added) - int(removed) == 6
    assert lines[1].endswith("| 0 |")  # at t = 0 nothing differs from X_0
    with Image.open(tmp_path / "f.png") as page:
        assert page.height == len(fig3_process.TIMES) * fig3_process.HEIGHT and len(page.getcolors(2 ** 16)) > 3
