"""Fig. 5: the pixels that a token depends on."""
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from paper import fig5_receptive_field
from paper.inputs import open_tokenizer, read_options
from paper.layouts import GridTokenizer
from tests.conftest import few_digits
from tests.scripts import assert_one_sentence, run_here
from tests.test_table2_noise import CPU, save_tokenizer, table
from tests.test_tokenizer import small_tokenizer


@pytest.mark.parametrize("settings", [{"channels": 3}, {"model_class": GridTokenizer, "num_tokens": 4},
                                      {"reshaped_latents": True}])
def test_sensitivity_is_that_of_finite_differences(settings):
    """Broken: the map would be another token's or pixel's, mix the images of a batch, or miss a channel or a
    dimension."""
    model = small_tokenizer(**settings).double().requires_grad_(False)
    images = torch.rand(3, settings.get("channels", 1), 8, 8, dtype=torch.float64) * 2 - 1
    maps = fig5_receptive_field.sensitivity(model, images, 3)
    assert maps.shape == (3, 3, 8, 8) and not images.requires_grad

    def latents(images):
        return F.normalize(model.encoder(images), dim=-1)[:, :3]

    step = 1e-5
    for row, column in ((0, 0), (3, 6), (7, 2)):
        squared = 0
        for channel in range(images.shape[1]):
            change = torch.zeros_like(images)
            change[:, channel, row, column] = step
            squared += ((latents(images + change) - latents(images - change)) / (2 * step)).square().sum(2)
        assert torch.allclose(maps[:, :, row, column], squared.sqrt(), rtol=1e-4, atol=1e-6)


def test_a_token_that_depends_on_one_patch():
    """Broken: the map of a token with a position would not lie there, or the measure would call it global."""
    model = small_tokenizer(model_class=GridTokenizer, num_tokens=4)
    for block in model.encoder.blocks:  # without attention a position depends on its own patch only
        torch.nn.init.zeros_(block.attention.proj.weight)
    maps = fig5_receptive_field.sensitivity(model, torch.rand(5, 1, 8, 8), 4)
    for token, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        own = maps[:, token, row:row + 4, column:column + 4]
        assert (own > 0).all() and torch.allclose(own.sum((1, 2)), maps[:, token].sum((1, 2)))
    outside, pixels = fig5_receptive_field.spread(maps.double(), 4)
    assert outside.abs().max() < 1e-6 and pixels.max() <= 0.25


def test_spread_by_hand():
    """Broken: the measures would not be those that the table's head says, or would depend on the map's scale."""
    even, point, corner, two = torch.ones(8, 8), torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)
    point[5, 2], corner[:4, 4:], two[3, 3], two[4, 4] = 3, 0.25, 8.9, 1.1
    maps = torch.stack([even, point, corner, two]).double()
    outside, pixels = fig5_receptive_field.spread(maps, 4)
    assert outside.tolist() == pytest.approx([0.75, 0, 0, 0.11])
    assert pixels.tolist() == pytest.approx([58 / 64, 1 / 64, 15 / 64, 2 / 64])  # 57.6 of 64, 14.4 of 16
    again = fig5_receptive_field.spread(torch.stack([maps, 1e-6 * maps]), 4)  # any shape in front
    for found, expected in zip(again, (outside, pixels)):
        assert found.shape == (2, 4) and torch.allclose(found[0], expected) and torch.allclose(found[1], expected)


def test_single_images_are_measured_one_by_one(tmp_path, monkeypatch):
    """Broken: a token that depends on another patch in every image would be called global, or the mean would not be
    that over images."""
    monkeypatch.setattr("evaluate_fid.open_dataset", lambda where, split, size: few_digits(split, 96))
    save_tokenizer(tmp_path / "set.pt")
    tokenizer, dataset, _ = open_tokenizer(f"{tmp_path}/set.pt", None, CPU)

    def other_patches(tokenizer, images, number):  # image i depends on the patch i % 16
        maps = torch.zeros(len(images), number, 16, 49)
        for i, image in enumerate(images):
            position = next(j for j in range(96) if torch.equal(image, dataset.images[j] / 127.5 - 1)) % 16
            maps[i, :, position] = 1
        return F.fold(maps.flatten(0, 1).transpose(1, 2), (28, 28), 7, stride=7).view(len(images), number, 28, 28)

    monkeypatch.setattr(fig5_receptive_field, "sensitivity", other_patches)
    args = read_options(fig5_receptive_field.OPTIONS, "", "", ["--num=96"])
    maps, shares = fig5_receptive_field.measure(tokenizer, dataset, 7, 2, args, CPU, 0, 1)
    assert maps.shape == (2, 28, 28) and torch.allclose(maps, torch.full((), 1 / 16, dtype=torch.float64))
    assert shares == pytest.approx([15 / 16, 706 / 784, 0, 45 / 784])  # 90 % of 784 and of 49 pixels


@pytest.mark.slow
def test_the_table_and_the_figure(tmp_path, capsys, monkeypatch):
    """Broken: a tokenizer would be missing from the table or the picture, or a smaller M would break it."""
    monkeypatch.setattr("evaluate_fid.open_dataset", lambda where, split, size: few_digits(split, 30))
    save_tokenizer(tmp_path / "set.pt", num_tokens=3)
    save_tokenizer(tmp_path / "grid.pt", kind="grid tokenizer")
    fig5_receptive_field.main(["--ckpt", f"{tmp_path}/set.pt", f"{tmp_path}/grid.pt", f"--out={tmp_path}/f.png",
                               "--device=cpu"])
    output = capsys.readouterr().out
    rows = table(output)
    assert [row[0] for row in rows] == ["set, M = 3", "grid, M = 16", "evenly spread"] and "3 tokens of each" in output
    assert rows[2][1:] == ["93.8%", "90.1%"] * 2
    assert all(0 < float(share.strip("%")) < 100 for row in rows for share in row[1:])
    with Image.open(tmp_path / "f.png") as page:
        assert page.height == 18 + 2 * 120 and page.width > 3 * 120
    save_tokenizer(tmp_path / "other.pt", patch_size=14)
    assert_one_sentence(run_here(fig5_receptive_field.main, "--ckpt", "set.pt", "other.pt", folder=tmp_path),
                        "(28, 7) and (28, 14)")
