"""Images and statistics in folders and .npz files, as evaluate_fid.py compares them."""
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data.evaluation_inputs import open_images
from data.image_folder import center_crop
from support.distributed import chunks
from tests.conftest import pictures


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_batch_is_read_in_parts(save, tmp_path):
    """Fails if 50,000 images are in memory at the same time, or if a part has other images than it should."""
    images = np.random.default_rng(0).integers(256, size=(2000, 64, 64, 3), dtype=np.uint8)  # 24.6 MB
    save(tmp_path / "images.npz", arr_0=images)
    tracemalloc.start()
    batch = open_images(str(tmp_path / "images.npz"), None)
    for part in [*chunks(slice(0, 2000), 64)[1::2], slice(0, 3)]:
        assert (batch.read(part).permute(0, 2, 3, 1).numpy() == images[part]).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.num == 2000 and peak < 8e6


def test_statistics_of_other_programs(tmp_path):
    """Fails if ADM's references can't be read, which contain float32 statistics and some images, or big-endian ones."""
    mu, sigma = np.arange(3.0), np.eye(3)
    for more in ({}, {"features": "Inception"}, {"arr_0": np.zeros((2, 4, 5, 3), np.uint8)}):
        for dtype in (np.float32, np.longdouble, ">f8"):
            np.savez(tmp_path / "a.npz", mu=mu.astype(dtype), sigma=sigma.astype(dtype), **more)
            found = open_images(str(tmp_path / "a.npz"), None)
            assert np.array_equal(found.statistics[0], mu) and np.array_equal(found.statistics[1], sigma)
            assert found.statistics[0].dtype == found.statistics[1].dtype == np.float64
            assert found.features == more.get("features") and (found.num == 2) == bool(found.read) == ("arr_0" in more)


GOOD = np.zeros((9, 28, 28, 3), np.uint8)


@pytest.mark.parametrize("arrays, words", [
    ({"arr_0": GOOD / 255}, "arr_0 in bad.npz must be images (N, H, W, 3), uint8 in 0..255, got float64"),
    ({"arr_0": GOOD[..., [0, 0, 0, 0]]}, "got uint8 (9, 28, 28, 4)"),
    ({"arr_0": np.asfortranarray(GOOD)}, "column-major"), ({"images": GOOD}, "expected are arr_0, or mu and sigma"),
    ({"mu": np.full(8, np.nan), "sigma": np.eye(8)}, "mu and sigma in bad.npz must be finite"),
    ({"mu": np.zeros(8), "sigma": np.eye(7)}, "(8,) and torch.float64 (7, 7)")])
def test_arrays_of_another_kind(arrays, words):
    """Fails if an array that is neither images nor statistics gives a number, or ends in a traceback."""
    np.savez("bad.npz", **arrays)
    with pytest.raises(ValueError) as refused:
        open_images("bad.npz", None)
    assert words in str(refused.value)


@pytest.mark.parametrize("damage, words", [
    (lambda content: content[:len(content) // 2], "can't be read as an .npz file"),
    (lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:], "arr_0 in bad.npz can't be read")])
def test_damaged_files(damage, words, tmp_path):
    """Fails if an incomplete or changed .npz file ends in a traceback or is measured in part."""
    np.savez_compressed("bad.npz", arr_0=pictures(9, 28).permute(0, 2, 3, 1).numpy())
    (tmp_path / "bad.npz").write_bytes(damage((tmp_path / "bad.npz").read_bytes()))
    with pytest.raises(ValueError, match=words):
        open_images("bad.npz", None).read(slice(0, 9))


def test_folders(tmp_path):
    """Fails if images of different sizes or an empty folder end in a traceback, or if photographs are cropped otherwise
    than the training images."""
    for name, sizes in (("empty", ()), ("mixed", (20, 20, 21))):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(pictures(1, 25, seed=i)[0, 0].numpy()).resize((size, 20)).save(tmp_path / name / f"{i}.png")
    for name, words in (("empty", "no images in empty"),
                        ("mixed", "mixed/0.png is 20 x 20 pixels and mixed/2.png 21 x 20; --image_size")):
        with pytest.raises(ValueError, match=words):
            open_images(name, None).read(slice(0, 3))
    cropped = open_images("mixed", 16).read(slice(0, 3))
    assert all((image.permute(1, 2, 0).numpy() == np.asarray(center_crop(Image.open(f"mixed/{i}.png"), 16))).all()
               for i, image in enumerate(cropped))
