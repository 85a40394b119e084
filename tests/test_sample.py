"""Images from a checkpoint: the same for any number of processes, in every format asked for."""
import os
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from data.samples import SampleFile
from dual_transform import counts_to_tokens
from fsdd import Denoiser, sample_noise
from tests.test_common import assert_one_sentence, run, run_here, run_ranks
from tokenizer import SetTokenizer


def save_random_checkpoint(path, channels=1, num_classes=10):
    """A checkpoint in the format of train_fsdd.py with random weights."""
    torch.manual_seed(0)
    tokenizer_config = dict(image_size=8, channels=channels, patch_size=4, num_tokens=6, codebook_size=10, code_dim=5,
                            width=32,
                            heads=2, encoder_layers=1, decoder_layers=2)
    model_config = dict(codebook_size=10, num_tokens=6, num_classes=num_classes, width=16, layers=1, heads=2)
    models = SetTokenizer(**tokenizer_config), Denoiser(**model_config)
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5 if model is models[0] else 0.2)
    torch.save({"kind": "fsdd", "model_config": model_config, "weights": models[1].state_dict(),
                "tokenizer": {"model_config": tokenizer_config, "weights": models[0].state_dict()},
                "class_names": [f"class {i}" for i in range(num_classes)],
                "generation": {"prior": "distinct", "steps": 4, "guidance": [2.0, 3.0, 4.0], "top_p": 0.9, "top_k": 0,
                               "adjust_from": 0.65}}, path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "fsdd.pt"
    save_random_checkpoint(path)
    return path


def arrays(path):
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


def test_same_images_for_any_number_of_processes(checkpoint, tmp_path):
    """Broken: the images would depend on the number of processes, or come out in another order."""
    results = []
    for processes in (1, 3):  # unequal shares
        out = tmp_path / f"{processes}.npz"
        options = ["--ckpt", checkpoint, "--num_images=23", "--batch=5", "--bf16=off", "--out", out]
        finished = run_here(sample.main, *options, folder=tmp_path) if processes == 1 else \
            run_ranks("sample.py", *options, folder=tmp_path, processes=processes)
        assert finished.returncode == 0, finished.stderr
        results.append(arrays(out))
    images, labels = results[0]
    assert images.shape == (23, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i * 10 // 23 for i in range(23)]
    for other_images, other_labels in results[1:]:
        assert (images == other_images).all() and (labels == other_labels).all()
    assert len(np.unique(images.reshape(23, -1), axis=0)) > 15  # chunks don't repeat each other


def test_seed_labels_and_settings_matter(checkpoint, tmp_path, monkeypatch):
    """Broken: an option would be read and then forgotten."""
    monkeypatch.chdir(tmp_path)

    def images(*options):
        sample.main(["--ckpt", str(checkpoint), "--num=12", "--out=a.npz", "--device=cpu", *options])
        return arrays("a.npz")

    plain, labels = images("--labels=3,7")
    assert labels.tolist() == [3] * 6 + [7] * 6
    # its defaults
    assert (plain == images("--labels=3,7", "--seed=0", "--steps=4", "--guidance=2,3,4", "--top_p=0.9")[0]).all()
    for option in ("--seed=1", "--labels=3,8", "--steps=5", "--guidance=1", "--top_p=0.3", "--top_k=1"):
        assert (plain != images("--labels=3,7", option)[0]).any(), option


def test_a_new_knob_is_a_parameter_and_a_row(checkpoint, tmp_path, monkeypatch):
    """Broken: a new setting of refine() would need more edits than its parameter and a row of GENERATION, or would be
    ignored for a checkpoint that was trained before it."""
    monkeypatch.chdir(tmp_path)
    seen, refine = [], sample.refine
    monkeypatch.setattr(sample, "refine", lambda *args, knob=0.5, **rest: seen.append(knob) or refine(*args, **rest))
    monkeypatch.setattr(sample, "GENERATION", [*sample.GENERATION, ("knob", 1.0, 2.0, "what it does")])
    for options in ([], ["--knob=0.25"]):
        sample.main(["--ckpt", str(checkpoint), "--num=2", "--out=a.npz", "--device=cpu", *options])
    assert seen == [0.5, 0.5, 0.25, 0.25]


def test_grid(checkpoint, tmp_path, monkeypatch):
    """Broken: the default call would not draw a row for each class."""
    monkeypatch.chdir(tmp_path)
    sample.main(["--ckpt", str(checkpoint)])
    with Image.open("samples.png") as page:
        assert page.size[1] == 10 * 56 and page.size[0] > 10 * 56  # 8 pixels are drawn 7 times as large; and the labels
    sample.main(["--ckpt", str(checkpoint), "--labels=4", "--num=3"])
    with Image.open("samples.png") as page:
        assert page.size[1] == 56


def test_animation_shows_every_step(checkpoint, tmp_path, monkeypatch):
    """Broken: the GIF would not have a frame for the noise and one for each step, or its end would not be the
    sample."""
    monkeypatch.chdir(tmp_path)
    sample.main(["--ckpt", str(checkpoint), "--num=10", "--steps=6", "--out=a.gif"])
    sample.main(["--ckpt", str(checkpoint), "--num=10", "--steps=6", "--out=a.png"])
    with Image.open("a.gif") as film, Image.open("a.png") as page:
        assert film.n_frames == 7
        first = np.asarray(film.convert("L"), dtype=float)
        film.seek(6)
        last = np.asarray(film.convert("L"), dtype=float)
        assert abs(last - np.asarray(page.convert("L"))).mean() < abs(last - first).mean() / 2


def test_colour_and_many_classes(tmp_path, monkeypatch):
    """Broken: three channels, or more classes than a grid shows."""
    monkeypatch.chdir(tmp_path)
    save_random_checkpoint("colour.pt", channels=3, num_classes=1000)
    sample.main(["--ckpt=colour.pt", "--num=20"])
    with Image.open("samples.png") as page:
        assert page.size[1] == 10 * 56
    sample.main(["--ckpt=colour.pt", "--num=1000", "--batch=500", "--out=a.npz", "--steps=1"])
    images, labels = arrays("a.npz")
    assert labels.tolist() == list(range(1000)) and (images[..., 0] != images[..., 1]).any()


def test_decoding_in_parts(checkpoint):
    """Broken: large images, which are decoded a few at once, would come out in another order, or some be lost."""
    _, tokenizer, _ = sample.load(str(checkpoint), torch.device("cpu"))
    tokens = counts_to_tokens(sample_noise(11, 10, 6, "multinomial"))
    whole = sample.decode(tokenizer, tokens)
    tokenizer.image_size = 512  # four at once
    parts = sample.decode(tokenizer, tokens)
    assert parts.shape == (11, 1, 8, 8) and len(whole.unique(dim=0)) > 5
    assert (parts.int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("out", ["a.npz", "a.png", "a.gif"])
def test_an_interrupted_run_goes_on(out, checkpoint, tmp_path, monkeypatch, capsys):
    """Broken: hours of sampling would be lost by Ctrl-C or a kill, the file of a run before destroyed, or a resumed run
    give other images than an unbroken one."""
    monkeypatch.chdir(tmp_path)
    draw, drawn = sample.draw_chunk, []
    command = ["--ckpt", str(checkpoint), "--num=23", "--batch=5", "--device=cpu", f"--out={out}"]
    sample.main(command)
    whole = (tmp_path / out).read_bytes()

    def interrupted(*arguments):
        drawn.append(arguments[4])
        if drawn == [0, 1, 2]:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(sample, "draw_chunk", interrupted)
    (tmp_path / out).write_bytes(b"of another run")
    with pytest.raises(KeyboardInterrupt):
        sample.main(command)
    partial, = tmp_path.glob("*.partial")
    assert f"10 of 23 images are kept in {partial.name}; the same command continues" in capsys.readouterr().err
    assert (tmp_path / out).read_bytes() == b"of another run"
    with open(partial, "ab") as file:
        file.write(b"half of an image, as a kill leaves it")
    sample.main([*command, "--seed=1"])  # another command begins anew, and leaves the images there
    assert drawn == [0, 1, 2, 0, 1, 2, 3, 4] and (tmp_path / out).read_bytes() != whole
    sample.main(command)
    assert drawn[8:] == [2, 3, 4] and "continuing after the 10 images" in capsys.readouterr().out
    assert os.listdir(tmp_path) == [out]
    if out == "a.npz":  # the zip file holds the time
        images, labels = arrays(out)
        (tmp_path / "whole.npz").write_bytes(whole)
        assert (images == arrays("whole.npz")[0]).all() and (labels == arrays("whole.npz")[1]).all()
    else:
        assert (tmp_path / out).read_bytes() == whole


def test_one_run_makes_the_images(checkpoint, tmp_path, monkeypatch):
    """Broken: two runs of the same command would write into one file."""
    monkeypatch.chdir(tmp_path)
    command, draw, found = ["--ckpt", str(checkpoint), "--num=4", "--batch=2", "--device=cpu"], sample.draw_chunk, []

    def and_another(*arguments):
        if not found:
            found.append(run("sample.py", *command, folder=tmp_path))
        return draw(*arguments)

    monkeypatch.setattr(sample, "draw_chunk", and_another)
    sample.main(command)
    assert_one_sentence(found[0], "another run makes the same images")
    assert os.listdir(tmp_path) == ["samples.png"]


def test_memory_does_not_grow_with_the_images(tmp_path):
    """Broken: 50,000 images of 256 x 256 would take 25 GB before the first of them is written."""
    sizes = {"channels": 3, "image_size": 64}
    checkpoint = {"class_names": ["a"], "weights": {}, "tokenizer": {"model_config": sizes, "weights": {}}}
    args = SimpleNamespace(out=str(tmp_path / "a.npz"), seed=0, batch=100, bf16="off")
    chunk = torch.randint(256, (1, 100, 3, 64, 64), dtype=torch.uint8)
    labels = torch.zeros(3000, dtype=torch.int64)  # 37 MB
    tracemalloc.start()
    with SampleFile(args, labels, checkpoint, {"steps": 1}, "cpu") as samples:
        for _ in range(30):
            samples.add([[chunk]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    images, _ = arrays(args.out)
    assert (images.reshape(30, 100, 64, 64, 3) == chunk[0].permute(0, 2, 3, 1).numpy()).all()


def test_labels_are_numbers_or_names(checkpoint, tmp_path, monkeypatch, capsys):
    """Broken: a label could be given by its number only, a name be taken for another class, or nothing say which class
    a label is."""
    names = ["cat", "dog", "2", "0"]
    choose = lambda text, num: sample.choose_labels(text, num, names, 10).tolist()  # noqa: E731
    assert choose("dog,0, cat", 3) == [1, 0, 0]  # "0": a number goes before a name
    assert choose("2,3", 4) == [2, 2, 3, 3] and choose(None, 4) == [0, 1, 2, 3]
    for wrong in ("bird", "4", "-1", "dog,", ",", "1.0"):
        with pytest.raises(ValueError, match="numbers from 0 to 3 or names of classes, such as cat"):
            choose(wrong, 3)
    monkeypatch.chdir(tmp_path)
    sample.main(["--ckpt", str(checkpoint), "--num=2", "--labels=class 7,3", "--device=cpu"])
    assert "generating 2 images of the classes 7 (class 7), 3 (class 3):" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["--ckpt=none.pt"], ["no checkpoint none.pt", "python train_fsdd.py"]),
    (["--labels=10"], ["--labels", "from 0 to 9", "'10'"]),
    (["--labels=a"], ["--labels", "'a'"]), (["--num=0"], ["--num", "at least 1"]),
    (["--out=a.jpg"], ["--out", "a.jpg"]),
    (["--top_p=0"], ["top_p", "0"]), (["--top_k=-1"], ["top_k", "-1"]), (["--guidance=x"], ["guidance", "'x'"]),
    (["--steps=0"], ["--steps"]),
    (["--seed=-1"], ["--seed"]),
    (["--device=gpu"], ["--device", "gpu"]),
    (["--num=20000"], ["20000", ".npz"]),
    (["--out=nowhere/a.png"], ["nowhere"]),
])
def test_mistakes_get_one_sentence(arguments, words, checkpoint, tmp_path):
    """Broken: a mistake on the command line would end in a traceback, or be found only after the work."""
    assert_one_sentence(run_here(sample.main, "--ckpt", checkpoint, *arguments, folder=tmp_path), *words)
