"""Batches of images: every image once an epoch, the same for all processes, and files that can't be read left out."""
import io
import os
from types import SimpleNamespace

import pytest
import torch

import common
import evaluate_fid
from data import open_dataset, pictures, reading, records
from data.image_folder import ImageFolder
from data.sides import open_images
from tests.image_folder import make_image_folder
from tests.test_common import ROOT, assert_one_sentence, run, run_here
from tokenizer import SetTokenizer


def test_an_epoch_sees_every_image_once():
    """Broken: images would repeat within an epoch, or every epoch would have the same order."""
    N, B = 103, 10
    steps = [reading.batch_indices(N, B, seed=5, step=step) for step in range(30)]
    epochs = [torch.cat(steps[i:i + 10]) for i in (0, 10, 20)]
    for epoch in epochs:
        assert len(epoch.unique()) == 100 and epoch.min() >= 0 and epoch.max() < N
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(steps[13], reading.batch_indices(N, B, seed=5, step=13))  # no hidden state
    assert not torch.equal(steps[13], reading.batch_indices(N, B, seed=6, step=13))


def test_an_epoch_of_a_folder(tmp_path):
    """Broken: an image would be seen twice in an epoch or not at all, or crops depend on the number of processes or
    workers."""
    make_image_folder(tmp_path, 100)
    cfg = SimpleNamespace(data=str(tmp_path), out=str(tmp_path / "a.pt"), workers=0)
    dataset, _ = reading.open_datasets(cfg, 24, crop="random", flip=True, seed=3)
    assert len(dataset) == 100
    B, steps = 20, 10  # two epochs
    seen = {}
    for processes, workers in ((1, 0), (1, 2), (2, 0), (3, 1)):
        shares = [common.shard(B, rank, processes) for rank in range(processes)]
        batches = zip(*(reading.loader(dataset, B, rows, 3, 0, steps, workers) for rows in shares))
        seen[processes, workers] = [torch.cat([images for images, _ in batch]) for batch in batches]
        assert len(seen[processes, workers]) == steps
    for batches in seen.values():
        assert all(map(torch.equal, batches, seen[1, 0]))
    resumed = list(reading.loader(dataset, B, slice(0, B), 3, 7, steps, 1))
    assert all(torch.equal(images, batch) for (images, _), batch in zip(resumed, seen[1, 0][7:], strict=True))
    for epoch in range(2):
        found = sorted(image.numpy().tobytes() for batch in seen[1, 0][5 * epoch:5 * epoch + 5] for image in batch)
        assert found == sorted(dataset.read(i, epoch).transpose(2, 0, 1).tobytes() for i in range(100))
        assert len(set(found)) == 100


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_lost_during_training(workers, tmp_path):
    """Broken: a disk error after the check would end in a traceback, or go unnoticed."""
    make_image_folder(tmp_path, 100)
    dataset = open_dataset(str(tmp_path), "train", 24)
    dataset.drop(["d0/cut.jpg"])
    os.truncate(dataset.path(30), 5)
    parts = common.chunks(slice(0, len(dataset)), 20)
    batches = reading.in_order(dataset, parts[:2], workers)
    assert torch.equal(next(batches)[0], dataset.__getitems__([(i, 0) for i in range(20)])[0])
    with pytest.raises(SystemExit) as stopped:
        next(batches)
    assert stopped.value.code.startswith(f"error: {dataset.path(30)} can't be read (")
    assert "\n" not in stopped.value.code


def test_unreadable_images_are_left_out_once(tmp_path, monkeypatch, capsys):
    """Broken: a truncated file would end the training or go unnoticed, or every run would read all files again."""
    make_image_folder(tmp_path, 300)
    cfg = SimpleNamespace(data=str(tmp_path), out=str(tmp_path / "a.pt"), workers=2)
    train_set, test_set = reading.open_datasets(cfg, 24, crop="random")
    said = capsys.readouterr().out
    assert len(train_set) == len(train_set.labels) == 300 and len(test_set) == 75
    assert b"d0/cut.jpg" not in train_set.names
    assert train_set.crop == "random" and test_set.crop == "center"
    assert "train/d0/cut.jpg can't be read (OSError: image file is truncated" in said
    assert f"1 of 301 images in {train_set.root} can't be read" in said and f"0 of 75 images in {test_set.root}" in said

    checked = []
    unreadable = ImageFolder.unreadable
    monkeypatch.setattr(ImageFolder, "unreadable",
                        lambda self, indices: checked.extend(indices) or unreadable(self, indices))
    cfg.workers = 0
    assert len(reading.open_datasets(cfg, 16)[0]) == 300 and not checked
    assert "1 of 301 images" in (said := capsys.readouterr().out) and "images.json" in said
    (tmp_path / "train" / "d1" / "new.jpg").write_bytes(open(train_set.path(0), "rb").read())
    # of the split that changed
    assert len(reading.open_datasets(cfg, 24)[0]) == 301 and sorted(checked) == list(range(302))
    os.truncate(train_set.path(1), 100)
    assert len(reading.open_datasets(cfg, 24)[0]) == 300 and len(checked) == 604
    (tmp_path / "images.json").write_text('{"train": {"made')
    assert len(reading.open_datasets(cfg, 24)[0]) == 300 and len(checked) == 604 + 302 + 75


@pytest.mark.parametrize("number, broken, stops",
                         [(100, 1, False), (99, 1, True), (200, 2, False), (200, 3, True), (2, 2, True)])
def test_too_many_unreadable_images(number, broken, stops, tmp_path):
    """Broken: a data set with more than 1 % of broken files would be trained on, or one with fewer refused."""
    make_image_folder(tmp_path, 4)  # for val/
    for i in range(number):
        os.makedirs(tmp_path / "few" / "train" / "d0", exist_ok=True)
        content = b"" if i < broken else (tmp_path / "train" / "d1" / "00001.JPEG").read_bytes()
        (tmp_path / "few" / "train" / "d0" / f"{i}.jpg").write_bytes(content)
    (tmp_path / "few" / "val").symlink_to(tmp_path / "val")
    cfg = SimpleNamespace(data=str(tmp_path / "few"), out=str(tmp_path / "a.pt"), workers=0)
    (tmp_path / "val" / "d1").mkdir()
    if not stops:
        assert len(reading.open_datasets(cfg, 24)[0]) == number - broken
        return
    words = f"{broken} of the {number} images in .*train can't be read, which is more than 1 %; the first is d0/0.jpg"
    for _ in range(2):  # and the second run does not take it as checked
        with pytest.raises(ValueError, match=words):
            reading.open_datasets(cfg, 24)


def test_a_class_is_a_folder_with_a_readable_image(tmp_path, capsys):
    """Broken: folders of systems, of other formats or of broken files would be classes and shift all labels; a named
    pipe would hang the check; or what was passed over would not be said."""
    os.remove(make_image_folder(tmp_path, 200, classes=3))
    whole = (tmp_path / "train" / "d0" / "00000.JPEG").read_bytes()
    for name, content in {"__MACOSX/d0/._x.JPEG": b"", "__MACOSX/d0/y.JPEG": whole, "a_tif/a.tif": whole,
                          "broken/a.jpg": whole[:99], "a.jpg": whole, "d1/@eaDir/a.jpg/small.jpg": whole,
                          "d2/README": b""}.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(content)
    os.mkfifo(tmp_path / "train" / "d1" / "pipe.jpg")
    cfg = SimpleNamespace(data=str(tmp_path), out=str(tmp_path / "a.pt"), workers=0)
    for _ in range(2):  # the second time by images.json
        train_set, test_set = reading.open_datasets(cfg, 24)
        said = capsys.readouterr().out
        assert train_set.class_names == test_set.class_names == ["d0", "d1", "d2"] and len(train_set) == 200
        assert all(name.startswith(b"d%d/" % label) for name, label in zip(train_set.names, train_set.labels.tolist()))
        assert f"{train_set.root}: 200 images in 3 classes; files passed over: 4 hidden, " in said, said
        assert sum(train_set.passed_over.values()) == 9 and train_set.passed_over.keys() == {
            "hidden", ".tif", ".txt", "without a suffix", "outside the class folders", "no regular file"}
        assert "; no class, for want of a readable image: __MACOSX, a_tif, broken\n" in said


def test_train_and_val_have_the_same_classes(tmp_path):
    """Broken: stage 1 would run to its end on classes that stage 2 refuses, or it would not be said which they are."""
    make_image_folder(tmp_path, 40, classes=10)
    os.remove(tmp_path / "train" / "d0" / "cut.jpg")  # more than 1 % of 41 files
    for number in range(4):
        (tmp_path / "val" / f"d{number}").rename(tmp_path / "val" / f"other{number}")
    cfg = SimpleNamespace(data=str(tmp_path), out=str(tmp_path / "a.pt"), workers=0)
    with pytest.raises(ValueError, match=r"train and .*val are .* only in the first: d0, d1, d2 and 1 more; "
                                         r"only in the second: other0, other1, other2 and 1 more$"):
        reading.open_datasets(cfg, 24)


def test_evaluation_leaves_out_what_training_does(tmp_path, capsys):
    """Broken: a truncated file would end an evaluation after hours, or be left out of the training only."""
    make_image_folder(tmp_path, 400, classes=2)
    val = tmp_path / "val" / "d0"
    os.truncate(val / "00000.JPEG", 300)
    config = dict(image_size=16, channels=3, patch_size=8, num_tokens=4, codebook_size=16, code_dim=4, width=16,
                  heads=2, encoder_layers=1, decoder_layers=1)
    checkpoint = {"kind": "tokenizer", "model_config": config, "weights": SetTokenizer(**config).state_dict()}
    torch.save(checkpoint, tmp_path / "tokenizer.pt")
    _, dataset = evaluate_fid.open_tokenizer("", checkpoint, str(tmp_path), torch.device("cpu"))
    folder = open_images(str(tmp_path / "val"), 16)
    assert len(dataset) == folder.num == 99
    assert torch.equal(folder.read(slice(0, 99)), dataset.__getitems__([(i, 0) for i in range(99)])[0])
    said = capsys.readouterr().out
    for words in ("val/d0/00000.JPEG can't be read (OSError", "1 of 100 images in", "99 images in 2 classes"):
        assert words in said
    os.truncate(val / "00002.JPEG", 300)  # more than 1 %
    for arguments in (["--ckpt=tokenizer.pt", "--data=."], ["--images=val", "--image_size=16", "--save_stats=s.npz"]):
        finished = run_here(evaluate_fid.main, *arguments, "--device=cpu", folder=tmp_path)
        assert_one_sentence(finished, "2 of the 100 images in", "val can't be read, which is more than 1 %")


def test_names_that_are_no_text(tmp_path, monkeypatch):
    """Broken: a file or a class named in another encoding than UTF-8 would end the run in a traceback when it is
    printed, drawn or written."""
    make_image_folder(tmp_path, 200, classes=2)
    odd = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (tmp_path / split / "d1").rename(tmp_path / split / odd)
    (tmp_path / "train" / "d0" / "cut.jpg").rename(tmp_path / "train" / "d0" / f"{odd}.jpg")
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", printed)
    common.Parser()
    cfg = SimpleNamespace(data=str(tmp_path), out=str(tmp_path / "a.pt"), workers=0)
    for _ in range(2):  # and by images.json
        train_set, _ = reading.open_datasets(cfg, 24)
        assert train_set.class_names == [odd, "d0"] and len(train_set) == 200
    common.save_checkpoint({"kind": "fsdd", "class_names": train_set.class_names}, str(tmp_path / "a.pt"))
    assert common.load_checkpoint(str(tmp_path / "a.pt"), "", "fsdd")["class_names"] == [odd, "d0"]
    pictures.grid(train_set.__getitems__([(0, 0), (199, 0)])[0], 1, train_set.class_names)
    print("classes", *train_set.class_names, flush=True)
    said = printed.buffer.getvalue().decode()
    assert r"train/d0/caf\udce9.jpg can't be read (" in said and r"classes caf\udce9 d0" in said


THREE_PROCESSES = """
import os, sys
import torch.distributed as dist
sys.path.insert(0, %r)
from types import SimpleNamespace
import common
from data import reading

_, rank, processes = common.init_distributed("cpu")
cfg = SimpleNamespace(data="images", out="a.pt", workers=rank %% 2)
train_set, test_set = reading.open_datasets(cfg, 24, crop="random", flip=True, seed=3)
said = open(f"{rank}.txt", "w")
print("sees", len(train_set), len(test_set), train_set.fingerprint(), file=said)
for data in ("images", "nowhere", "other"):
    cfg.data = data if rank == 1 else "images"
    try:
        reading.open_datasets(cfg, 24)
    except ValueError as problem:
        print("stops:", problem, file=said)
said.close()
dist.barrier()
dist.destroy_process_group()
"""


def test_all_ranks_check_images(tmp_path):
    """Broken: processes would train on different images, or wait forever for one that has stopped."""
    make_image_folder(tmp_path / "images", 120)
    make_image_folder(tmp_path / "other", 110)
    (tmp_path / "three.py").write_text(THREE_PROCESSES % ROOT)
    finished = run(tmp_path / "three.py", folder=tmp_path, processes=3)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("cut.jpg can't be read (") == 1
    assert finished.stdout.count("1 of 121 images in images/train can't be read;") == 1
    said = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(3)]
    assert said[0][0].startswith("sees 120 30 ") and said[0][0] == said[1][0] == said[2][0]
    for lines in said:
        assert lines[1].startswith("stops: there is no folder nowhere/train") and len(lines) == 3
        assert lines[2].endswith("train are not the same on all machines; each needs the same files")
    assert records.read_json(str(tmp_path / "images.json"))["train"]["unreadable"].keys() == {"d0/cut.jpg"}
