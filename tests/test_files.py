"""Files stay whole under a kill or a full disk, and bad checkpoints end in one sentence."""
import contextlib
import os
import resource

import pytest
import torch

from data.evaluation_inputs import save_npz
from support import pictures
from support.files import NEEDED, atomic_open, load_checkpoint, read_json, save_checkpoint, write_json
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


def test_an_interrupted_write_leaves_the_old_file():
    """Fails if a run that is killed while it saves loses its previous checkpoint, or leaves an incomplete file."""
    write_json({"a": 1}, "a.json")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_open("a.json", "w") as file:
            file.write("half")
            assert read_json("a.json") == {"a": 1}
            raise error
    assert read_json("a.json") == {"a": 1} and os.listdir() == ["a.json"]


def test_a_link_stays_a_link():
    """Fails if a link to a file on a large disk is replaced by a file."""
    os.mkdir("disk")
    os.symlink("disk/a.json", "a.json")
    for number in (1, 2):  # the target does not exist yet, and exists
        write_json({"a": number}, "a.json")
        assert os.path.islink("a.json") and read_json("disk/a.json") == {"a": number}
    assert os.listdir("disk") == ["a.json"]


def outputs():
    """Functions that write more than 100 kB to a file, by its name."""
    images = torch.randint(256, (1, 2000, 1, 8, 8), dtype=torch.uint8)
    return {
        "s.npz": lambda path: save_npz(path, [images], torch.zeros(2000, dtype=torch.int64), 8),
        "s.png": lambda path: pictures.save(pictures.grid(images[0], 40), path, compress_level=0),
        "a.pt": lambda path: save_checkpoint({"a": torch.zeros(30000)}, path),
        "a.json": lambda path: write_json({"a": "a" * 100000}, path),
        "a.csv": lambda path: open_log(path, ["a" * 100000], 0),
    }


def test_a_full_disk_destroys_nothing():
    """Fails if a full disk destroys the old file, or ends in a traceback."""
    for name, write in outputs().items():
        with open(name, "w") as file:
            file.write("old content")
        before = sorted(os.listdir())
        with full_disk(50000), pytest.raises(SystemExit) as stopped:
            run(lambda: write(name))
        assert f"error: [Errno 27] File too large: '{name}'" == stopped.value.code
        assert open(name).read() == "old content" and sorted(os.listdir()) == before


def test_bad_checkpoints_get_one_sentence():
    """Fails if a missing, damaged or foreign file, or one with NaN, is accepted or ends in a traceback."""
    complete = dict.fromkeys(NEEDED["fsdd"], 0) | {"kind": "fsdd"}
    save_checkpoint(complete | {"weights": torch.randn(1000)}, "good.pt")
    assert load_checkpoint("good.pt", "x", "tokenizer", "fsdd")["kind"] == "fsdd"
    with open("good.pt", "rb") as file:
        content = file.read()
    middle = len(content) // 2
    for name, damaged in (("truncated", content[:middle]),
                          ("changed", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])):
        with open(f"{name}.pt", "wb") as file:
            file.write(damaged)
    os.rename("good.pt", "changed.pt.previous")
    save_checkpoint({"kind": "tokenizer"}, "other.pt")
    save_checkpoint({"kind": "fsdd", "a": [{"b": torch.tensor([1, float("nan")])}]}, "nan.pt")
    save_checkpoint({"kind": "fsdd", "lr": float("inf")}, "inf.pt")
    save_checkpoint({"kind": "fsdd", "model_config": {}}, "stripped.pt")
    for name, words in (("none", "there is no checkpoint none.pt"), ("truncated", "can't be read as a checkpoint"),
                        ("changed", "can't be .*; changed.pt.previous is an earlier one"),
                        ("other", "is not a fsdd checkpoint but a tokenizer checkpoint"),
                        ("nan", "numbers that are not finite .a 0 b."), ("inf", "numbers that are not finite .lr."),
                        ("stripped", "stripped.pt has no weights")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*python train_fsdd.py$"):
            load_checkpoint(f"{name}.pt", "python train_fsdd.py", "fsdd")
