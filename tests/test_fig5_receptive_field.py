"""Fig. 5: the pixels that a token depends on."""
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from paper import fig5_receptive_field
from paper.layouts import GridTokenizer
from tests.scripts import read_table
from tests.test_table2_noise import save_tokenizer
from tests.test_tokenizer import small_tokenizer


@pytest.mark.parametrize("settings", [{"channels": 3}, {"model_class": GridTokenizer, "num_tokens": 4},
                                      {"reshaped_latents": True}])
def test_sensitivity_is_that_of_finite_differences(settings):
    """Fails if the map is another token's or pixel's, mixes the images of a batch, or misses a channel or a
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


def test_spread_by_hand():
    """Fails if the measures are not those that the table's head says."""
    even, point, corner, two = torch.ones(8, 8), torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)
    point[5, 2], corner[:4, 4:], two[3, 3], two[4, 4] = 3, 0.25, 8.9, 1.1
    maps = torch.stack([even, point, corner, two]).double()
    outside, pixels = fig5_receptive_field.spread(maps, 4)
    assert outside.tolist() == pytest.approx([0.75, 0, 0, 0.11])
    assert pixels.tolist() == pytest.approx([58 / 64, 1 / 64, 15 / 64, 2 / 64])  # 57.6 of 64, 14.4 of 16


@pytest.mark.slow
def test_the_table_and_the_figure(small_digits, capsys):
    """Fails if a tokenizer is missing from the table or the picture, or if a smaller M is not taken."""
    save_tokenizer("set.pt", num_tokens=3)
    save_tokenizer("grid.pt", kind="grid tokenizer")
    fig5_receptive_field.main(["--ckpt", "set.pt", "grid.pt", "--out=f.png", "--num=30",
                               "--device=cpu"])
    rows = read_table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["set, M = 3", "grid, M = 16", "evenly spread"]
    assert rows[2][1:] == ["93.8%", "90.1%"] * 2
    assert all(0 < float(share.strip("%")) < 100 for row in rows for share in row[1:])
    with Image.open("f.png") as page:
        assert page.height == 18 + 2 * 120 and page.width > 3 * 120
