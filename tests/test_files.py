"""Files stay whole under a kill or a full disk, and bad checkpoints end in one sentence."""
import os
import resource

import pytest
import torch

from data.evaluation_inputs import save_npz
from support import pictures
from support.files import NEEDED, atomic_open, load_checkpoint, read_json, save_checkpoint, write_json
from support.training import open_log, run


def test_an_interrupted_write_leaves_the_old_file():
    """Fails if a run that is killed while it saves loses its previous checkpoint, or leaves an incomplete file, or if a
    link to a file on a large disk is replaced by a file."""
    os.mkdir("disk")
    os.symlink("disk/a.json", "a.json")
    write_json({"a": 1}, "a.json")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_open("a.json", "w") as file:
            file.write("half")
            assert read_json("a.json") == {"a": 1}
            raise error
    assert os.path.islink("a.json") and read_json("disk/a.json") == {"a": 1}
    assert sorted(os.listdir()) == ["a.json", "disk"] and os.listdir("disk") == ["a.json"]


IMAGES = torch.zeros(1, 2000, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("name, write", [
    ("s.npz", lambda path: save_npz(path, [IMAGES], torch.zeros(2000, dtype=torch.int64), 8)),
    ("s.png", lambda path: pictures.save(pictures.grid(IMAGES[0], 40), path, compress_level=0)),
    ("a.pt", lambda path: save_checkpoint({"a": torch.zeros(30000)}, path)),
    ("a.json", lambda path: write_json({"a": "a" * 100000}, path)),
    ("a.csv", lambda path: open_log(path, ["a" * 100000], 0)),
])
def test_a_full_disk_destroys_nothing(name, write, tmp_path):
    """Fails if a full disk destroys the old file, or ends in a traceback."""
    (tmp_path / name).write_text("old content")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, before[1]))  # no file can grow beyond this size
    try:
        with pytest.raises(SystemExit, match=f"error: .Errno 27. File too large: '{name}'"):
            run(lambda: write(name))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert open(name).read() == "old content" and os.listdir() == [name]


def test_bad_checkpoints_get_one_sentence(tmp_path):
    """Fails if a missing, damaged or foreign file, or one with NaN, is accepted or ends in a traceback."""
    complete = dict.fromkeys(NEEDED["fsdd"], 0) | {"kind": "fsdd"}
    save_checkpoint(complete | {"weights": torch.randn(1000)}, "good.pt")
    assert load_checkpoint("good.pt", "x", "tokenizer", "fsdd")["kind"] == "fsdd"
    content = (tmp_path / "good.pt").read_bytes()
    middle = len(content) // 2
    for name, damaged in (("truncated", content[:middle]),
                          ("changed", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])):
        (tmp_path / f"{name}.pt").write_bytes(damaged)
    os.rename("good.pt", "changed.pt.previous")
    save_checkpoint({"kind": "tokenizer"}, "other.pt")
    save_checkpoint({"kind": "fsdd", "a": [{"b": torch.tensor([1, float("nan")])}]}, "nan.pt")
    save_checkpoint({"kind": "fsdd", "model_config": {}}, "stripped.pt")
    for name, words in (("none", "there is no checkpoint none.pt"), ("truncated", "can't be read as a checkpoint"),
                        ("changed", "can't be .*; changed.pt.previous is an earlier one"),
                        ("other", "is not a fsdd checkpoint but a tokenizer checkpoint"),
                        ("nan", "numbers that are not finite .a 0 b."), ("stripped", "stripped.pt has no weights")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*python train_fsdd.py$"):
            load_checkpoint(f"{name}.pt", "python train_fsdd.py", "fsdd")
