"""Fig. 1: one image, its set, its counts, and the image again."""
from PIL import Image

from paper import fig1_pipeline


def test_the_figure(digits):
    """Fails if the picture lacks the image, the bars or the decoded image."""
    fig1_pipeline.main([f"--ckpt={digits}/fsdd.pt", "--out=f.png"])
    with Image.open("f.png") as page:
        side, top = fig1_pipeline.SIDE, fig1_pipeline.TOP
        for left in (8, page.width - 8 - side):
            assert len(page.crop((left, top, left + side, top + side)).getcolors(2 ** 16)) > 10
        assert (0x3a, 0x6e, 0xa5) in {colour for _, colour in page.getcolors(2 ** 16)}  # the blue bars
