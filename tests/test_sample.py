"""Images from a checkpoint: the same for any number of ranks, in every format, in little memory."""
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from data import open_example
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import Denoiser, sample_noise
from support.files import save_checkpoint
from tests.scripts import ROOT, assert_one_sentence, run, run_here, run_ranks, successful


@pytest.fixture
def draw(digits, tmp_path):
    """A function that calls sample.py with the checkpoint in an empty folder, and for an .npz returns its arrays."""

    def draw_images(*options, out="a.npz"):
        finished = successful(run_here(sample.main, f"--ckpt={digits}/fsdd.pt", "--device=cpu", f"--out={out}",
                                       *options, folder=tmp_path))
        return arrays(out) if out.endswith(".npz") else finished
    return draw_images


def arrays(path):
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


def assert_same_arrays(ours, theirs):
    assert all(np.array_equal(*pair) for pair in zip(ours, theirs))


# --- the same images -------------------------------------------------------------------------------------------------


def test_same_images_for_any_number_of_ranks(digits, tmp_path):
    """Fails if the images depend on the number of ranks, or come out in another order."""
    results = []
    for world_size in (1, 3):  # 5 chunks, so unequal shares
        out = tmp_path / f"{world_size}.npz"
        successful(run_ranks("sample.py", f"--ckpt={digits}/fsdd.pt", "--num_images=23", "--batch=5", "--bf16=off",
                             "--out", out, folder=tmp_path, world_size=world_size))
        results.append(arrays(out))
    images, labels = results[0]
    assert images.shape == (23, 28, 28, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i * 10 // 23 for i in range(23)]
    assert_same_arrays(*results)


@pytest.mark.slow
def test_same_images_under_torchrun(digits, tmp_path):
    """Fails if the README's command for several GPUs writes other images, or does not end."""
    for world_size in (1, 2):
        successful(run("sample.py", "--ckpt", digits / "fsdd.pt", "--num_images=230", "--batch=50",
                       f"--out={world_size}.npz", "--device=cpu", folder=tmp_path, world_size=world_size))
    assert_same_arrays(arrays(tmp_path / "1.npz"), arrays(tmp_path / "2.npz"))


def test_seed_labels_and_settings_matter(draw):
    """Fails if an option is read and then ignored, or if the checkpoint's settings are not the defaults."""
    plain, labels = draw("--num=12", "--labels=3,7")
    assert labels.tolist() == [3] * 6 + [7] * 6
    defaults = ("--seed=0", "--sampler=paper", "--steps=3", "--times=middle", "--guidance=1", "--top_p=1.0",
                "--top_k=2")
    assert (plain == draw("--num=12", "--labels=3,7", *defaults)[0]).all()
    for option in ("--seed=1", "--labels=3,8", "--sampler=exchange", "--steps=5", "--times=even", "--guidance=2,3,4",
                   "--top_p=0.3", "--top_k=1", "--batch=5"):
        assert (plain != draw("--num=12", "--labels=3,7", option)[0]).any(), option
    one_class = draw("--num=12", "--labels=3", "--batch=6")[0]
    assert (one_class[:6] != one_class[6:]).any()  # chunks do not repeat each other


def test_another_sampler_brings_its_settings():
    """Fails if --sampler alone keeps settings that were made for another sampler, or options do not override them."""
    papers = sample.default_settings("imagenet256", "distinct")
    assert papers == {"prior": "distinct", "sampler": "paper", "steps": 25, "times": "even", "guidance": "4,50,55",
                      "top_p": 0.8, "top_k": 0}
    given = dict.fromkeys(name for name, *_ in sample.GENERATION)
    exchange = sample.generation_settings(papers, SimpleNamespace(**given | {"sampler": "exchange", "steps": 7}))
    assert exchange == sample.default_settings("exchange", "distinct") | {"steps": 7}
    assert sample.generation_settings(papers, SimpleNamespace(**given | {"sampler": "paper"})) == papers
    for sampler, prior in (("masked", "multinomial"), ("paper", "masked"), ("exchange", "masked")):
        with pytest.raises(ValueError, match=f"got sampler {sampler} and a denoiser trained with prior {prior}"):
            sample.make_sampler(papers | {"sampler": sampler, "prior": prior})


def test_guidance_is_one_weight_or_several():
    """Fails if a mistake is taken for a weight."""
    assert sample.parse_guidance("4") == [4.0] and sample.parse_guidance("4,50,55") == [4.0, 50.0, 55.0]
    for wrong in ("", "x", "1,", "0.5:12", "-1", "nan", "inf", "1e7"):
        with pytest.raises(ValueError, match="guidance must be numbers from 0 to 1e6"):
            sample.parse_guidance(wrong)


def test_decoding_in_parts_changes_nothing(digits):
    """Fails if large images, which are decoded a few at a time, come out in another order, or if some are lost."""
    _, tokenizer, _ = sample.load(f"{digits}/fsdd.pt", torch.device("cpu"))
    tokens = counts_to_tokens(sample_noise(11, 64, 6, "multinomial"))
    whole = sample.decode(tokenizer, tokens)
    tokenizer.image_size = 512  # four at a time
    parts = sample.decode(tokenizer, tokens)
    assert parts.shape == (11, 1, 28, 28) and len(whole.unique(dim=0)) > 5
    assert (parts.int() - whole.int()).abs().max() <= 1


# --- labels and formats ----------------------------------------------------------------------------------------------


def test_labels_are_numbers_or_names(draw):
    """Fails if a name is taken for another class, or if it is not printed which class a label is."""
    names = ["cat", "dog", "2", "0"]
    for text, labels in (("dog,0, cat", [1, 3, 0]), ("2,3", [2, 2, 3, 3]), (None, [0, 1, 2, 3])):
        assert sample.choose_labels(text, len(labels), names, 10).tolist() == labels  # names come before numbers
    many = [str(i) for i in range(1000)]
    assert sample.choose_labels(None, 1000, many, 1000).tolist() == list(range(1000))
    assert sample.choose_labels(None, 10, many, 10).tolist() == list(range(0, 1000, 100))
    for wrong in ("bird", "4", "-1", "dog,", ",", "1.0"):
        with pytest.raises(ValueError, match="numbers from 0 to 3 or names of classes, such as cat"):
            sample.choose_labels(wrong, 3, names, 10)
    assert "generating 2 images of the classes 7 (7), 3 (3):" in draw("--num=2", "--labels=7,3", out="a.png").stdout


def test_an_animation_shows_every_step(draw):
    """Fails if the GIF does not have a frame for the noise and one for each step, or does not end with the sample."""
    for out in ("a.gif", "a.png"):
        draw("--num=10", "--steps=6", "--times=even", "--top_k=0", out=out)
    with Image.open("a.gif") as film, Image.open("a.png") as page:
        assert film.n_frames == 7
        first = np.asarray(film.convert("L"), dtype=float)
        film.seek(6)
        last = np.asarray(film.convert("L"), dtype=float)
        assert abs(last - np.asarray(page.convert("L"))).mean() < abs(last - first).mean() / 2


# --- files and memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
def test_memory_does_not_grow_with_the_number_of_images(digits, tmp_path):
    """Fails if sample.py keeps images, states or probabilities of all chunks."""
    script = "import sys, sample; sample.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    peaks = []
    for number in (200, 20000):
        finished = subprocess.run([sys.executable, "-c", script, f"--ckpt={digits}/fsdd.pt", f"--num={number}",
                                   "--out=a.npz", "--device=cpu"], cwd=tmp_path, capture_output=True, text=True,
                                  check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})
        peaks.append(int(re.search(r"VmHWM:\s+(\d+)", finished.stdout)[1]) / 2 ** 10)  # MiB
    assert peaks[1] < peaks[0] + 12  # the images alone, in grey, take 15 MiB


# --- images like another ---------------------------------------------------------------------------------------------


def test_ink_on_paper_is_inverted(tmp_path, capsys):
    """Fails if --like takes a drawing on paper for another image."""
    paper = Image.new("RGB", (28, 28), (255, 255, 255))
    paper.paste((0, 0, 0), (0, 0, 9, 28))
    paper.save(tmp_path / "ink.png")
    image, label = open_example(str(tmp_path / "ink.png"), 28, 1, "digits")
    assert image.shape == (1, 1, 28, 28) and label is None and image.dtype == torch.uint8
    assert image[..., :9].min() > 250 and image[..., 9:].max() < 5
    assert "ink.png is dark on light; it is inverted" in capsys.readouterr().out


@pytest.mark.parametrize("prior, sampler", [("multinomial", "paper"), ("distinct", "exchange"),
                                            ("masked", "masked")])
def test_images_that_share_tokens_with_an_image(prior, sampler, digits, tmp_path):
    """Fails if --like does not keep tokens of the image, keeps more or fewer than it says, or takes other labels."""
    found = torch.load(digits / "fsdd.pt", weights_only=True)
    C = 65 if prior == "masked" else 64  # with the mask code
    found["model_config"]["codebook_size"] = C
    found["weights"] = Denoiser(**found["model_config"]).state_dict()
    found["generation"] |= {"prior": prior, "sampler": sampler}
    save_checkpoint(found, tmp_path / "fsdd.pt")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    starts, classes, refine = [], [], sample.SAMPLERS[sampler]

    def record(denoiser, labels, start, **settings):
        starts.append(start)
        classes.append(labels.tolist())
        return refine(denoiser, labels, start=start, **settings)

    with mock.patch.dict(sample.SAMPLERS, {sampler: record}):
        for options in ([], ["--labels=3,4"]):
            successful(run_here(sample.main, "--ckpt=fsdd.pt", "--like=photo.png", *options, folder=tmp_path))
    assert [10 * [10]] * 4 + [5 * [3] + 5 * [4]] * 4 == classes
    tokenizer = sample.load_tokenizer(found["tokenizer"], "cpu")
    photo, _ = open_example(str(tmp_path / "photo.png"), 28, 1, "digits")
    counts = tokens_to_counts(tokenizer.encode(photo / 127.5 - 1), C)
    for (x, t), kept in zip(starts, 2 * (4, 3, 1, 0), strict=True):
        assert (x.sum(1) == 6).all() and (x.minimum(counts).sum(1) >= kept).all()
        assert t == 1 if kept == 0 else 0.1 < t < 0.9
        assert prior != "masked" or (x[:, -1] == 6 - kept).all()
    with Image.open(tmp_path / "samples.png") as page:
        assert page.size[1] == 5 * 56


@pytest.mark.parametrize("arguments, words", [
    (["--ckpt=none.pt"], ["no checkpoint none.pt", "python train_fsdd.py"]),
    (["--labels=10"], ["--labels", "from 0 to 9", "'10'"]), (["--num=0"], ["--num", "[1, 2^63)"]),
    (["--out=a.jpg"], ["--out", "a.jpg"]), (["--out=nowhere/a.png"], ["nowhere"]),
    (["--guidance=x"], ["guidance", "'x'"]), (["--sampler=best"], ["--sampler", "paper, exchange"]),
    (["--num=20000"], ["20000", ".npz"]), (["--like=none.png"], ["none.png can't be read"]),
    (["--like=digits:x"], ["--like must be", "digits:9999"]), (["--like=digits:10000"], ["--like must be"]),
    (["--like=emoji:1"], ["--like must be an image file", "not trained on the emoji"]),
    (["--like=digits:1", "--out=a.gif"], [".png"]),
    (["--num=201", "--out=a.gif"], ["a picture has at most 200 images, got 201"]),
])
def test_mistakes_get_one_sentence(arguments, words, digits, tmp_path):
    """Fails if a mistake on the command line ends in a traceback, or is found only after the work."""
    assert_one_sentence(run_here(sample.main, f"--ckpt={digits}/fsdd.pt", *arguments, folder=tmp_path), *words)
