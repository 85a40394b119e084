"""Files stay whole under a kill or a full disk, and bad checkpoints end in one sentence."""
import contextlib
import os
import resource

import numpy as np
import pytest
import torch

from support import pictures
from support.files import (atomic_open, check_output, load_checkpoint, not_finite, read_checkpoint, read_json,
                           save_checkpoint, write_json)
from support.training import open_log, run


@contextlib.contextmanager
def full_disk(size):
    """In this context no file can grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_interrupted_write_leaves_the_old_file():
    """Broken: a run that is killed while it saves would lose the checkpoint it had, or leave half a file behind."""
    write_json({"a": 1}, "a.json")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_open("a.json", "w") as file:
            file.write("half")
            assert read_json("a.json") == {"a": 1}
            raise error
    assert read_json("a.json") == {"a": 1} and os.listdir() == ["a.json"]


def test_a_link_stays_a_link():
    """Broken: --out that links to a large disk would be replaced by a file on the small one."""
    os.mkdir("disk")
    os.symlink("disk/a.json", "a.json")
    for number in (1, 2):  # the target does not exist yet, and exists
        write_json({"a": number}, "a.json")
        assert os.path.islink("a.json") and read_json("disk/a.json") == {"a": number}
    assert os.listdir("disk") == ["a.json"]


def outputs():
    """Functions that write more than 100 kB to a file, by its name."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(256, size=(1, 2000, 1, 8, 8), dtype=np.uint8))
    page = pictures.to_pil(torch.from_numpy(random.integers(256, size=(1, 400, 300), dtype=np.uint8)))
    return {
        "s.npz": lambda path: pictures.save_npz(path, [images], torch.zeros(2000, dtype=torch.int64), 8),
        "s.png": lambda path: pictures.save(page, path, compress_level=0),
        "a.pt": lambda path: save_checkpoint({"a": torch.zeros(30000)}, path),
        "a.json": lambda path: write_json({"a": "a" * 100000}, path),
        "a.csv": lambda path: open_log(path, ["a" * 100000], 0),
    }


def test_a_full_disk_destroys_nothing():
    """Broken: the old file would be lost, or the error would be a traceback."""
    for name, write in outputs().items():
        with open(name, "w") as file:
            file.write("old content")
        before = sorted(os.listdir())
        with full_disk(50000), pytest.raises(SystemExit) as stopped:
            run(lambda: write(name))
        assert f"error: [Errno 27] File too large: '{name}'" == stopped.value.code
        assert open(name).read() == "old content" and sorted(os.listdir()) == before


def test_outputs_are_checked_before_the_work(monkeypatch):
    """Broken: hours of work would end when their result is to be written."""
    os.mkdir("folder.pt")
    for path, words in (("folder.pt", "is a folder"), ("none/a.pt", "there is no folder none")):
        with pytest.raises(ValueError, match=words):
            check_output(path)
    check_output("a.pt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root has access to everything
    with pytest.raises(ValueError, match="a.pt can't be written: permission denied"):
        check_output("a.pt")


def damage(path, how):
    """Truncate a file, or change one bit in its middle."""
    content = bytearray(open(path, "rb").read())
    content[len(content) // 2] ^= 1
    with open(path, "wb") as file:
        file.write(content if how == "changed" else content[:len(content) // 2])


def test_bad_checkpoints_get_one_sentence():
    """Broken: a missing, damaged or foreign file, or one with NaN, would end in a traceback or be worked with."""
    save_checkpoint({"kind": "fsdd", "weights": {"a": torch.randn(1000)}}, "good.pt")
    assert load_checkpoint("good.pt", "x", "tokenizer", "fsdd")["kind"] == "fsdd"
    for how in ("truncated", "changed"):
        with open(f"{how}.pt", "wb") as file:
            file.write(open("good.pt", "rb").read())
        damage(f"{how}.pt", how)
    write_json({"kind": "fsdd"}, "text.pt")
    save_checkpoint([1, 2], "list.pt")
    save_checkpoint({"kind": "tokenizer"}, "other.pt")
    save_checkpoint({"kind": "fsdd", "weights": {"a": torch.tensor([1, float("nan")])}}, "nan.pt")
    for name, words in (("none", "there is no checkpoint none.pt"), ("truncated", "can't be read as a checkpoint"),
                        ("changed", "can't be read as a checkpoint"), ("text", "can't be read as a checkpoint"),
                        ("list", "can't be read as a checkpoint"),
                        ("other", "is not a fsdd checkpoint but a tokenizer checkpoint"),
                        ("nan", "numbers that are not finite .weights a.")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*python train_fsdd.py$"):
            load_checkpoint(f"{name}.pt", "python train_fsdd.py", "fsdd")
    os.rename("good.pt", "none.pt.previous")
    with pytest.raises(ValueError, match="none.pt.previous is the one before it"):
        read_checkpoint("none.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found(value):
    """Broken: NaN would be saved over a good checkpoint."""
    good = {"step": 3, "name": "nan", "list": [1.0, {"b": torch.ones(2), "i": torch.tensor([1])}], "none": None}
    assert not_finite(good) == ""
    assert not_finite(good | {"list": [1.0, {"b": torch.tensor([1.0, value])}]}) == "list 1 b"
    assert not_finite(good | {"lr": value}) == "lr" and not_finite(good | {"t": (value,)}) == "t 0"


def test_json_that_can_not_be_read():
    """Broken: a damaged note would end the run in a traceback."""
    for content in ('{"a": 1', "[1, 2]", "", "3"):
        with open("a.json", "w") as file:
            file.write(content)
        assert read_json("a.json") == {}
    assert read_json("none.json") == {}
