"""Images out of an .npz or a folder, as evaluate_fid.py compares them."""
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import common
from data import open_dataset
from data.sides import check_statistics, open_images, open_npz
from tests.conftest import pictures


def test_a_batch_is_read_in_pieces(tmp_path):
    """Broken: 50,000 images would be in memory at once, or pieces would come from the wrong place."""
    images = np.random.default_rng(0).integers(256, size=(2000, 64, 64, 3), dtype=np.uint8)  # 24.6 MB
    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", arr_0=images)
        tracemalloc.start()
        batch = open_npz(str(tmp_path / f"{name}.npz"))
        for part in common.chunks(slice(0, 2000), 64)[1::2]:
            assert (batch.read(part).permute(0, 2, 3, 1).numpy() == images[part]).all()
        assert (batch.read(slice(0, 3)).permute(0, 2, 3, 1).numpy() == images[:3]).all() and batch.num == 2000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6, name


def test_folders_are_cropped_as_adm_does(tmp_path):
    """Broken: statistics of a folder of photographs would not be those of the images that the model was trained on."""
    (tmp_path / "val" / "x").mkdir(parents=True)
    for i, size in enumerate([(50, 80), (130, 64), (40, 40)]):
        Image.fromarray(pictures(1, 130)[0, 0].numpy()).resize(size).save(tmp_path / "val" / "x" / f"{i}.png")
    found = open_images(str(tmp_path / "val"), 32)
    expected = open_dataset(str(tmp_path), "test", 32)
    assert torch.equal(found.read(slice(0, 3)), expected.__getitems__([(0, 0), (1, 0), (2, 0)])[0])


def test_what_is_no_covariance_is_refused():
    """Broken: an FID would come out of a matrix that is no covariance, or rounding be taken for one that is not."""
    factor = torch.randn(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma, mu = factor.T @ factor, torch.zeros(64, dtype=torch.float64)  # of rank 40
    for good in (sigma, sigma.float(), 1e-12 * sigma, torch.zeros_like(sigma), (sigma * 0.01).half(), torch.eye(64)):
        check_statistics(mu, good, "them")
    negative = torch.linalg.eigh(sigma)
    negative = negative.eigenvectors * torch.where(torch.arange(64) == 63, -1.0, negative.eigenvalues)
    for bad in (-torch.eye(64), sigma.tril(), factor.T @ factor.roll(1, 0), torch.ones(64, 64).fill_diagonal_(0),
                negative @ torch.linalg.eigh(sigma).eigenvectors.T):
        with pytest.raises(ValueError, match="them are no mean and covariance"):
            check_statistics(mu, bad, "them")
