"""Fig. 1: one image, its set, its counts, and the image again."""
from PIL import Image

from paper import fig1_pipeline


def test_the_figure(digits, tmp_path, capsys):
    """Fails if the picture lacks the image, the bars or the decoded image."""
    fig1_pipeline.main([f"--ckpt={digits}/fsdd.pt", f"--out={tmp_path}/f.png"])
    assert "6 tokens" in capsys.readouterr().out
    with Image.open(tmp_path / "f.png") as page:
        assert page.height > fig1_pipeline.SIDE and page.width > 2 * fig1_pipeline.SIDE + fig1_pipeline.BARS
        side = fig1_pipeline.SIDE
        for left in (8, page.width - 8 - side):
            picture = page.crop((left, fig1_pipeline.TOP, left + side, fig1_pipeline.TOP + side))
            assert len(picture.getcolors(2 ** 16)) > 10
        assert (0x3a, 0x6e, 0xa5) in {colour for _, colour in page.getcolors(2 ** 16)}  # the blue bars
