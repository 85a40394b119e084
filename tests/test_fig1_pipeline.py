"""Fig. 1: one image, its set, its counts, and the image again."""
import pytest
import torch
from PIL import Image

from paper import fig1_pipeline

BLUE = (0x3a, 0x6e, 0xa5)


def colours(page):
    return {colour for _, colour in page.getcolors(2 ** 16)}


def test_the_figure(digits, tmp_path, capsys):
    """Broken: the picture would lack the image, the bars or the decoded image."""
    fig1_pipeline.main([f"--ckpt={digits}/fsdd.pt", f"--out={tmp_path}/f.png"])
    assert "6 tokens" in capsys.readouterr().out
    with Image.open(tmp_path / "f.png") as page:
        assert page.height > fig1_pipeline.SIDE and page.width > 2 * fig1_pipeline.SIDE + fig1_pipeline.BARS
        for left in (8, page.width - 8 - fig1_pipeline.SIDE):
            side = fig1_pipeline.SIDE
            picture = page.crop((left, fig1_pipeline.TOP, left + side, fig1_pipeline.TOP + side))
            assert len(colours(picture)) > 10
        assert BLUE in colours(page)


@pytest.mark.parametrize("counts", [[0, 0, 2, 0, 0, 1, 0, 1], [1] * 300, [128] + [0] * 4095])
def test_bars(counts):
    """Broken: a code that occurs would have no bar, as its width is less than a pixel."""
    tokens = [code for code, count in enumerate(counts) for _ in range(count)]
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert BLUE in colours(fig1_pipeline.draw(image, tokens, counts, image))


def test_tokens_as_text():
    """Broken: the set would be shown with another element, or be higher than the picture."""
    assert fig1_pipeline.set_as_text([7, 2, 2, 5]) == "{7, 2, 2, 5}"
    assert fig1_pipeline.set_as_text(list(range(128))).count("\n") < 10
