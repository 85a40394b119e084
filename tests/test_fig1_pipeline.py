"""Fig. 1: one image, its set, its counts, and the image again."""
import pytest
import torch
from PIL import Image

from paper import fig1_pipeline
from tests.test_common import assert_one_sentence, run_here


def test_the_figure(digits, tmp_path, capsys):
    """Broken: the picture would lack the image, the bars or the decoded image."""
    fig1_pipeline.main([f"--ckpt={digits}/fsdd.pt", f"--out={tmp_path}/f.png"])
    assert "6 tokens" in capsys.readouterr().out
    with Image.open(tmp_path / "f.png") as page:
        assert page.height > fig1_pipeline.SIDE and page.width > 2 * fig1_pipeline.SIDE + fig1_pipeline.BARS
        colours = {colour for _, colour in page.getcolors(2 ** 16)}
        assert (0x3a, 0x6e, 0xa5) in colours  # a bar


@pytest.mark.parametrize("counts", [[0, 0, 2, 0, 0, 1, 0, 1], [1] * 300, [128] + [0] * 4095])
def test_bars(counts):
    """Broken: a code that occurs would have no bar, as its width is less than a pixel."""
    tokens = [code for code, count in enumerate(counts) for _ in range(count)]
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    page = fig1_pipeline.draw(image, tokens, counts, image)
    assert (0x3a, 0x6e, 0xa5) in {colour for _, colour in page.getcolors(2 ** 16)}


def test_tokens_as_text():
    """Broken: the set would be shown with another element, or run out of the picture."""
    assert fig1_pipeline.wrapped([7, 2, 2, 5]) == "{7, 2, 2, 5}"
    assert fig1_pipeline.wrapped(list(range(128))).count("\n") < 10


def test_no_checkpoint(tmp_path):
    """Broken: a script that needs a checkpoint would not say which command makes it."""
    assert_one_sentence(run_here(fig1_pipeline.main, folder=tmp_path), "no checkpoint fsdd.pt", "train_fsdd.py")
