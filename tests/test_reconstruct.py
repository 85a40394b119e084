"""Images and their reconstructions from five orders of the tokens (Fig. 4, Tab. 1)."""
import numpy as np
import torch
from PIL import Image

from paper import reconstruct
from paper.inputs import open_tokenizer
from support.pictures import to_uint8


def test_the_page(digits, tmp_path, capsys):
    """Fails if an image stands next to what is not decoded from its tokens."""
    reconstruct.main(["digits", f"--ckpt={digits}/tokenizer.pt", f"--out={tmp_path}/page.png", "--num=3",
                      "--device=cpu"])
    output = capsys.readouterr().out
    assert "page.png: 3 images" in output and 0 < float(output.split()[-1]) < 1e-4  # rounding
    with Image.open(tmp_path / "page.png") as page:  # pictures of 2 x 28 pixels, below the headings
        pixels = np.asarray(page.convert("L"))[18::2, ::2].reshape(3, 28, 6, 28).transpose(0, 2, 1, 3).astype(float)
    tokenizer, dataset, _ = open_tokenizer(f"{digits}/tokenizer.pt", None, torch.device("cpu"))
    images = dataset.images[:3]
    decoded = to_uint8(tokenizer.decode(tokenizer.encode(images / 127.5 - 1))).numpy()  # (3, 1, 28, 28)
    assert (pixels[:, 0] == images[:, 0].numpy()).all() and abs(pixels[:, 1:] - decoded).max() <= 1
    for i, j in ((0, 1), (0, 2), (1, 2)):  # and each row has its own
        assert abs(pixels[i, 1] - pixels[j, 1]).max() > 10
