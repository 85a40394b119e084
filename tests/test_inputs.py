"""What the scripts of paper/ read: their options, evenly spread test images, images in files and folders."""
import numpy as np
import pytest
import torch
from PIL import Image

from paper import fig1_pipeline, fig3_process, fig5_receptive_field, fig6_clusters, inputs, reconstruct
from paper import table1_order, table2_noise, table3_linear_probe, table5_priors, table7_size
from tests.conftest import few_digits
from tests.scripts import assert_one_sentence, run_here
from tests.test_tokenizer import small_tokenizer

OPTIONS = [("images", (), "", "images"), ("--num", 5, "[2, inf)", "images"), ("--out", "b.png", "", "the picture"),
           inputs.DATA, inputs.SEED]


@pytest.mark.parametrize("argument, words", [("--num=1", "[2, 2^63)"), ("--num=x", "invalid int"),
                                             ("--out=a.jpg", ".png"), ("--out=no/a.png", "no folder no"),
                                             ("--out=a.png", "a.png is read by this command"),
                                             ("--sed=1", "--sed")])
def test_wrong_options_get_one_sentence(argument, words, tmp_path):
    """Fails if a mistake ends in a traceback, or only after the work."""
    finished = run_here(lambda argv: inputs.read_options(OPTIONS, "test", "", argv), "a.png", argument, folder=tmp_path)
    assert_one_sentence(finished, words)


def test_one_process(monkeypatch, tmp_path):
    """Fails if every process of torchrun does the same work and writes the same files."""
    monkeypatch.setenv("RANK", "0")
    finished = run_here(lambda argv: inputs.read_options(OPTIONS, "test", "", argv), "a", folder=tmp_path)
    assert_one_sentence(finished, "leave out torchrun")


@pytest.mark.parametrize("script", [fig1_pipeline, fig3_process, fig5_receptive_field, fig6_clusters, reconstruct,
                                    table1_order, table2_noise, table3_linear_probe, table5_priors, table7_size])
def test_a_missing_checkpoint_gets_one_sentence(script, tmp_path):
    """Fails if a script that needs a checkpoint does not say which command makes it."""
    arguments = ["digits"] if script is reconstruct else []
    finished = run_here(script.main, *arguments, "--ckpt=none.pt", folder=tmp_path)
    assert_one_sentence(finished, "no checkpoint none.pt", "python train_")


def test_images_are_spread_evenly():
    """Fails if only the first classes of validation images in the order of their classes are measured, or an image
    twice."""
    dataset = few_digits("test", 700)
    batches = list(inputs.read_batches(dataset, 300, 28, torch.device("cpu"), 0))
    indices = [i for batch, _ in batches for i in batch]
    assert indices == [i * 700 // 300 for i in range(300)]
    assert torch.equal(torch.cat([images for _, images in batches]), dataset.images[indices])


def test_images_in_files_and_folders(tmp_path):
    """Fails if an image is missing, stretched, or not the center crop."""
    random, arrays = np.random.default_rng(0), []
    for name, size in (("folder/b.png", (24, 16)), ("folder/more/c.PNG", (16, 21)), ("a.bmp", (16, 16))):
        arrays.append(random.integers(256, size=(*size[::-1], 3)).astype(np.uint8))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[-1]).save(name)
    crops = np.stack([arrays[0][:, 4:20], arrays[1][2:18], arrays[2]])  # the shorter side is 16: nothing is resized
    colour = small_tokenizer(3, image_size=16)
    images = inputs.read_images(["folder", "a.bmp"], 10, colour)
    assert torch.equal(images, torch.from_numpy(crops).permute(0, 3, 1, 2))
    assert torch.equal(inputs.read_images(["folder", "a.bmp"], 2, colour), images[:2])
    digits = inputs.read_images(["digits"], 3, small_tokenizer(image_size=28))
    assert torch.equal(digits, few_digits("test", 3).images)


def test_mistakes_get_one_sentence(tmp_path):
    """Fails if images that are missing, or that do not fit the tokenizer, end in a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    tokenizer = small_tokenizer(3, image_size=16)
    for path, words in (("none", "no image none"), ("empty", ".png"), ("text.png", "text.png can't be read"),
                        ("digits", "16 with 3")):
        mistake = run_here(lambda _: inputs.read_images([path], 1, tokenizer), folder=tmp_path)
        assert_one_sentence(mistake, words)
