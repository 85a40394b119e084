"""What the scripts of paper/ read: their options, evenly spread test images, images in files and folders."""
import numpy as np
import pytest
import torch
from PIL import Image

from paper import fig1_pipeline, fig3_process, fig5_receptive_field, fig6_clusters, inputs, reconstruct
from paper import table1_order, table2_noise, table3_linear_probe, table5_steps, table6_sweep, table7_size
from tests.conftest import few_digits
from tests.scripts import assert_one_sentence, run_here
from tests.test_tokenizer import small_tokenizer

OPTIONS = [("images", (), "", "images"), (inputs.NUM, 5, "[2, inf)", "images"), ("--out", "a.png", "", "the picture"),
           inputs.DATA, inputs.SEED, ("--toy", False, "", "tiny sizes")]


def test_options():
    """Broken: an option would have another type or value than its row says."""
    args = inputs.read_options(OPTIONS, "test", "", ["a", "b", "--num_images=7", "--seed=3", "--toy"])
    assert vars(args) == {"images": ["a", "b"], "num": 7, "out": "a.png", "data": None, "seed": 3, "toy": True}


@pytest.mark.parametrize("argument, words", [("--num=1", "[2, 2^63)"), ("--num=x", "invalid int"),
                                             ("--out=a.jpg", ".png"), ("--out=no/a.png", "no folder no"),
                                             ("--sed=1", "--sed")])
def test_wrong_options_get_one_sentence(argument, words, tmp_path):
    """Broken: a mistake would end in a traceback, or only after the work."""
    finished = run_here(lambda argv: inputs.read_options(OPTIONS, "test", "", argv), "a", argument, folder=tmp_path)
    assert_one_sentence(finished, words)


@pytest.mark.parametrize("script", [fig1_pipeline, fig3_process, fig5_receptive_field, fig6_clusters, reconstruct,
                                    table1_order, table2_noise, table3_linear_probe, table5_steps, table6_sweep,
                                    table7_size])
def test_a_missing_checkpoint_gets_one_sentence(script, tmp_path):
    """Broken: a script that needs a checkpoint would not say which command makes it."""
    arguments = ["digits"] if script is reconstruct else []
    finished = run_here(script.main, *arguments, "--ckpt=none.pt", folder=tmp_path)
    assert_one_sentence(finished, "no checkpoint none.pt", "python train_")


@pytest.mark.parametrize("data, channels, words", [(None, 1, ["t.pt", "--data"]), ("nowhere", 3, ["nowhere/val"]),
                                                   ("digits", 3, ["1 channels", "3", "--data"])])
def test_images_that_do_not_fit_get_one_sentence(data, channels, words, tmp_path):
    """Broken: a tokenizer would be measured with images of another kind, or end in a traceback."""
    config = dict(image_size=28, channels=channels, patch_size=7, num_tokens=6, codebook_size=10, code_dim=5, width=32,
                  heads=2, encoder_layers=1, decoder_layers=1)
    weights = small_tokenizer(**config).state_dict()
    torch.save({"kind": "tokenizer", "model_config": config, "weights": weights}, tmp_path / "t.pt")
    finished = run_here(lambda _: inputs.open_tokenizer("t.pt", data, torch.device("cpu")), folder=tmp_path)
    assert_one_sentence(finished, *words)


@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_images_are_spread_evenly(rank, world_size):
    """Broken: of validation images in the order of their classes only the first classes would be measured, or an image
    twice."""
    dataset = few_digits("test", 700)
    batches = list(inputs.read_batches(dataset, 300, 28, torch.device("cpu"), rank, world_size, 0))
    indices = [i for batch, _ in batches for i in batch]
    assert indices == [i * 700 // 300 for i in range(300 * rank // world_size, 300 * (rank + 1) // world_size)]
    assert torch.allclose(torch.cat([images for _, images in batches]), dataset.images[indices] / 127.5 - 1)


def test_images_in_files_and_folders(tmp_path):
    """Broken: an image would be missing, stretched, or not the center crop."""
    random, arrays = np.random.default_rng(0), []
    for name, size in (("folder/b.png", (24, 16)), ("folder/more/c.PNG", (16, 21)), ("a.bmp", (16, 16))):
        arrays.append(random.integers(256, size=(*size[::-1], 3)).astype(np.uint8))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[-1]).save(name)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    crops = np.stack([arrays[0][:, 4:20], arrays[1][2:18], arrays[2]])  # the shorter side is 16: nothing is resized
    colour, grey = (small_tokenizer(channels, image_size=16) for channels in (3, 1))
    images = inputs.read_images(["folder", "a.bmp"], 10, colour)
    assert torch.equal(images, torch.from_numpy(crops).permute(0, 3, 1, 2))
    assert torch.equal(inputs.read_images(["folder", "a.bmp"], 2, colour), images[:2])
    assert inputs.read_images(["a.bmp"], 1, grey).shape == (1, 1, 16, 16)
    digits = inputs.read_images(["digits"], 3, small_tokenizer(image_size=28))
    assert torch.equal(digits, few_digits("test", 3).images)


@pytest.mark.parametrize("path, words", [("none", "no image none"), ("empty", ".png"), ("digits", "16 with 3")])
def test_missing_images_get_one_sentence(path, words, tmp_path):
    """Broken: a mistake would end in a traceback."""
    (tmp_path / "empty").mkdir()
    tokenizer = small_tokenizer(3, image_size=16)
    assert_one_sentence(run_here(lambda argv: inputs.read_images(argv, 1, tokenizer), path, folder=tmp_path), words)
