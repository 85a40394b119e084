"""Images beside their reconstructions from five orders of the tokens (Fig. 4, Tab. 1)."""
import numpy as np
import pytest
import torch
from PIL import Image

from paper import reconstruct
from tests.test_common import assert_one_sentence
from tests.test_import_released_weights import run_module
from tests.test_tokenizer import small_tokenizer
from tokenizer import SetTokenizer


def save_tokenizer(path, **settings):
    """A checkpoint in the format of train_tokenizer.py with random weights; returns the model."""
    config = dict(image_size=16, channels=3, patch_size=4, num_tokens=12, codebook_size=500, code_dim=5, width=32,
                  heads=2,
                  encoder_layers=2, decoder_layers=2) | settings
    model = small_tokenizer(**config)
    with torch.no_grad():  # else the tokens hardly depend on the image, and most pixels are black or white
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
                module.bias.zero_()
        model.encoder.to_code.bias.zero_()
        model.encoder.latents.mul_(5)
        for block in model.encoder.blocks:
            block.attention.proj.weight.mul_(3)
        model.decoder.from_code.weight.mul_(5)
        model.pixel_head.to_pixels.weight.mul_(0.3)
    torch.save({"kind": "tokenizer", "model_config": config, "weights": model.state_dict()}, path)
    return model


def save_images(folder, names, sizes):
    """Random images, each with a colour of its own; returns them as arrays (H, W, 3) uint8."""
    random, arrays = np.random.default_rng(0), []
    for name, (width, height) in zip(names, sizes):
        arrays.append((random.integers(56, size=(height, width, 3)) + random.integers(200, size=3)).astype(np.uint8))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[-1]).save(folder / name)
    return arrays


def cells(path, size, scale=3):
    """The page's pictures, (rows, 6, size, size, 3) uint8: without the headings, one pixel for scale x scale."""
    with Image.open(path) as page:
        pixels = np.asarray(page.convert("RGB"))[18::scale, ::scale]
    rows = len(pixels) // size
    return pixels.reshape(rows, size, 6, size, 3).transpose(0, 2, 1, 3, 4)


def test_five_orders():
    """Broken: an order of Table 1 would not be the one it is named for, or lose or double a token."""
    tokens = torch.randint(9, (4, 30))
    shuffle = torch.randperm(30)
    encoded, backwards, shuffled, up, down = reconstruct.five_orders(tokens, shuffle)
    assert encoded is tokens and torch.equal(backwards, tokens[:, range(29, -1, -1)])
    assert (up.diff() >= 0).all() and (down.diff() <= 0).all()
    assert not torch.equal(shuffled, tokens) and torch.equal(shuffled[:, shuffle.argsort()], tokens)
    for order in (backwards, shuffled, up, down):
        assert torch.equal(order.sort(1).values, tokens.sort(1).values)


def test_the_page(tmp_path):
    """Broken: the image would not be the centre crop, or stand beside what is not decoded from its tokens."""
    model = save_tokenizer(tmp_path / "tokenizer.pt")
    arrays = save_images(tmp_path, ["images/b.png", "images/more/c.PNG", "a.bmp"], [(24, 16), (16, 21), (16, 16)])
    (tmp_path / "images" / "notes.txt").write_text("no image")
    finished = run_module("paper.reconstruct", "images", "a.bmp", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "reconstructions.png: 3 images" in finished.stdout
    page = cells(tmp_path / "reconstructions.png", 16)
    assert page.shape == (3, 6, 16, 16, 3)
    # shorter side 16 already: nothing is resized
    for row, crop in zip(page, (arrays[0][:, 4:20], arrays[1][2:18], arrays[2])):
        assert (row[0] == crop).all()
        image = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        decoded = ((model.decode(model.encode(image))[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
        for reconstruction in row[1:]:  # of five orders, which differ by rounding at most
            assert abs(reconstruction.astype(float) - decoded).max() <= 1
    for i, j in ((0, 1), (0, 2), (1, 2)):  # and each row has its own
        assert abs(page[i, 1].astype(float) - page[j, 1]).max() > 10


def test_large_images_are_shrunk(tmp_path, monkeypatch):
    """Broken: an image of another size would be cut without being resized, or stretched."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer("tokenizer.pt")
    Image.new("RGB", (300, 200), (10, 200, 90)).save("plain.jpg", quality=95)
    reconstruct.main(["plain.jpg", "--device=cpu"])
    assert abs(cells("reconstructions.png", 16)[0, 0].astype(int) - (10, 200, 90)).max() <= 3
    assert reconstruct.read_image("plain.jpg", 16, 3).shape == (16, 16, 3)


def test_grey_tokenizers(tmp_path, monkeypatch, capsys):
    """Broken: the digits' tokenizer could not be looked at, or --num be forgotten."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer("tokenizer.pt", channels=1, image_size=28, patch_size=7)
    reconstruct.main(["digits", "--num=3", "--out=digits.png", "--device=cpu"])
    page = cells("digits.png", 28, scale=2)
    assert page.shape[:2] == (3, 6)
    assert (page[:, 0] == reconstruct.Digits("test").images[:3, 0, ..., None].numpy()).all()
    save_images(tmp_path, ["a.png"], [(40, 30)])
    reconstruct.main(["a.png", "--device=cpu"])
    assert cells("reconstructions.png", 28, scale=2).shape[:2] == (1, 6)
    apart = float(capsys.readouterr().out.split()[-1])
    assert 0 < apart < 1e-4  # the orders differ by rounding


def test_what_is_printed(tmp_path, monkeypatch, capsys):
    """Broken: a decoder that does see the order would not be found out."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer("tokenizer.pt")
    save_images(tmp_path, ["a.png"], [(16, 16)])
    decode = SetTokenizer.decode
    monkeypatch.setattr(SetTokenizer, "decode",
                        lambda self, tokens: decode(self, tokens) + tokens[:, 0].view(-1, 1, 1, 1) / 10)
    reconstruct.main(["a.png", "--device=cpu"])
    assert float(capsys.readouterr().out.split()[-1]) >= 0.09


@pytest.mark.parametrize("arguments, words", [
    (["none"], ["no image none"]), (["empty"], ["empty", ".png"]), (["broken.png"], ["broken.png", "can't be read"]),
    (["digits"], ["digits", "16 with 3 channels"]), (["a.png", "--ckpt=none.pt"], ["no checkpoint none.pt"]),
    (["a.png", "--ckpt=a.png"], ["a.png", "can't be read as a checkpoint"]), ([], ["images"]),
    (["a.png", "--out=a.gif"], ["--out", "a.gif"]), (["a.png", "--out=nowhere/a.png"], ["nowhere"]),
    (["a.png", "--num=0"], ["--num", "at least 1"]),
])
def test_mistakes_get_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    """Broken: a mistake on the command line would end in a traceback."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer("tokenizer.pt")
    save_images(tmp_path, ["a.png"], [(16, 16)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    with pytest.raises(SystemExit) as stopped:
        reconstruct.main(["--device=cpu", *arguments])
    said = str(stopped.value) + capsys.readouterr().err
    assert stopped.value.code != 0 and all(word in said for word in words), said
    assert not (tmp_path / "reconstructions.png").exists()


def test_no_traceback(tmp_path):
    """Broken: run as a user does, a mistake would end in a traceback."""
    finished = run_module("paper.reconstruct", "none", folder=tmp_path)
    assert_one_sentence(finished, "no checkpoint tokenizer.pt", "train_tokenizer.py")
