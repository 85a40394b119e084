"""What is on the disk stays whole: under two runs at once, numbers that are not finite, a full disk, damaged files."""
import contextlib
import csv
import os
import resource
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import evaluate_fid
import sample
import train_fsdd
import train_tokenizer
from data import digits_classifier, files, pictures, records, token_sets
from data.digits_classifier import DigitsClassifier, load_classifier
from data.samples import SampleFile
from published.weights import check_tensors
from tests.image_folder import make_image_folder
from tests.test_common import assert_one_sentence, run, run_here

SMALL = ["--recipe=digits", "--data=images", "--width=16", "--heads=2", "--batch_size=7", "--warmup=1", "--log_every=1",
         "--save_every=2", "--picture_every=100", "--bf16=off", "--device=cpu", "--steps=4"]
STAGE1 = [*SMALL, "--image_size=16", "--patch_size=8", "--encoder_layers=1", "--decoder_layers=1", "--num_tokens=4",
          "--codebook_size=16"]
STAGE2 = [*SMALL, "--layers=1"]
TOO_FAST = ["--lr=1e20", "--muon_lr=1e20"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a few images and what both stages make of them."""
    folder = tmp_path_factory.mktemp("trained")
    make_image_folder(folder / "images", 100)
    for main, options in ((train_tokenizer.main, STAGE1), (train_fsdd.main, STAGE2)):
        finished = run_here(main, *options, folder=folder)
        assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A folder to work in, with copies of those files."""
    monkeypatch.chdir(tmp_path)
    os.symlink(trained / "images", "images")
    for name in ("tokenizer.pt", "tokenizer.csv", "fsdd.pt", "images.json", "tokens.npy", "tokens.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return tmp_path


@contextlib.contextmanager
def another_process_locks(path):
    """In this context another process has locked a file."""
    code = ("import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); "
            "sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-S", "-c", code, path], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield


@contextlib.contextmanager
def full_disk(size):
    """In this context no file can grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def spoil(path, value=float("nan")):
    """Put a number that is not finite into a checkpoint's weights."""
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["weights"].values())).view(-1)[0] = value
    torch.save(checkpoint, path)


def damage(path, how):
    """Cut a file off, or change one of its last data bytes."""
    content = bytearray(open(path, "rb").read())
    content[len(content) // 2] ^= 1
    with open(path, "wb") as file:
        file.write(content if how == "changed" else content[:len(content) // 2])


# --- A: several runs -------------------------------------------------------------------------------------------------


def test_two_writers_of_a_file(tmp_path, monkeypatch):
    """Broken: two runs that write one file would write into each other's temporary file; or a kill's leavings stay."""
    monkeypatch.chdir(tmp_path)
    with files.written("a", "w") as one, files.written("a", "w") as two:
        one.write("one" * 9), two.write("two")
    assert open("a").read() == "one" * 9 and os.listdir() == ["a"]
    for name in ("a.killed.tmp", "a.alive.tmp"):
        open(name, "w").close()
    with another_process_locks("a.alive.tmp"), files.written("a", "w") as file:
        file.write("three")
    assert sorted(os.listdir()) == ["a", "a.alive.tmp"] and open("a").read() == "three"


@pytest.mark.parametrize("main, options, out", [(train_tokenizer.main, STAGE1, "tokenizer.pt"),
                                                (train_fsdd.main, STAGE2, "fsdd.pt")])
def test_a_second_run_on_the_same_output_is_refused(main, options, out, place):
    """Broken: two runs would take turns at overwriting one checkpoint and one log."""
    before = open(out, "rb").read()
    with another_process_locks(out + ".lock"):
        for arguments in (options, ["--resume", "--steps=6"]):
            assert_one_sentence(run_here(main, *arguments, folder=place), f"another run is writing {out}", "--out")
    assert open(out, "rb").read() == before and not os.path.exists(out + ".previous")
    assert run_here(main, "--resume", "--steps=6", folder=place).returncode == 0
    assert not os.path.exists(out + ".lock")


def encoding(place, monkeypatch):
    """encode_training_set() with stand-ins whose encoding is numbers, and what it should return."""
    tokens = np.arange(24, dtype=np.uint16).reshape(1, 6, 4)
    monkeypatch.setattr(token_sets, "encode", lambda *args: tokens)
    tokenizer = SimpleNamespace(image_size=16, num_tokens=4, state_dict=dict)
    dataset = type("Images", (), {"fingerprint": lambda self: "images", "__len__": lambda self: 6})()
    cfg = SimpleNamespace(tokens="t.npy", flip=False)
    return lambda: token_sets.encode_training_set(tokenizer, dataset, None, cfg), tokens


def test_the_tokens_are_the_runs_own(place, monkeypatch):
    """Broken: a run would train on tokens that another run wrote to the same file, before or after it opened them."""
    encode, tokens = encoding(place, monkeypatch)
    mine = encode()
    with files.written("t.npy") as file:
        np.save(file, np.zeros_like(tokens))
    assert np.array_equal(mine, tokens)
    write_json = records.write_json

    def another_run(content, path):
        write_json(content, path)
        np.save("t.npy", np.zeros_like(tokens))

    monkeypatch.setattr(records, "write_json", another_run)
    with pytest.raises(ValueError, match="t.npy does not hold what rank 0 wrote: another run writes it too"):
        encode()


# --- B: numbers that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("main, options, out", [(train_tokenizer.main, STAGE1, "tokenizer.pt"),
                                                (train_fsdd.main, STAGE2, "fsdd.pt")])
def test_a_diverging_training_stops(main, options, out, place):
    """Broken: it would go on with NaN, and save NaN over the good checkpoint."""
    good = open(out, "rb").read()
    finished = run_here(main, *options, *TOO_FAST, folder=place)
    assert_one_sentence(finished, "gradient of step", "not finite", f"the last good checkpoint is {out}.previous")
    assert open(out + ".previous", "rb").read() == good and not os.path.exists(out)
    finished = run_here(main, *options, "--lr=1e39", "--save_every=1", folder=place)
    assert_one_sentence(finished, "after step 1 weights", f"the last good checkpoint is {out}.previous")
    assert open(out + ".previous", "rb").read() == good and not os.path.exists(out)


def test_all_processes_stop(place):
    """Broken: when a training diverges, one process would wait for another forever."""
    finished = run("train_tokenizer.py", *STAGE1, *TOO_FAST, folder=place, processes=2)
    assert finished.returncode != 0 and "gradient of step" in finished.stderr and not os.path.exists("tokenizer.pt")


def test_a_model_that_gives_nan_is_no_success(place, monkeypatch):
    """Broken: a training whose result is of no use would end as if it were."""
    monkeypatch.setattr(train_tokenizer, "evaluate", lambda *args: (float("nan"), 0.0, 0.0))
    assert_one_sentence(run_here(train_tokenizer.main, *STAGE1, folder=place), "tokenizer.pt gives nan", "diverged")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, place):
    """Broken: stage 2, sampling or evaluation would work on with them."""
    spoil("tokenizer.pt", value), spoil("fsdd.pt", value)
    for main, *arguments in ((train_fsdd.main, *STAGE2), (train_tokenizer.main, "--resume"), (sample.main,),
                             (evaluate_fid.main, "--ckpt=fsdd.pt"), (evaluate_fid.main, "--ckpt=tokenizer.pt")):
        assert_one_sentence(run_here(main, *arguments, folder=place), ".pt holds numbers that are not finite (weights ")
    net = DigitsClassifier()
    net.head.bias.data[0] = value
    torch.save({"kind": "digits classifier", "weights": net.state_dict()}, "c.pt")
    assert not load_classifier(net, "c.pt")
    with pytest.raises(ValueError, match="x.pth is damaged: b holds numbers that are not finite"):
        check_tensors({"a": torch.zeros(2), "b": torch.tensor([0.0, value])}, {"a": (2,), "b": (2,)}, "x.pth")


# --- E: errors of the disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main, option", [(train_tokenizer.main, "--out"), (train_fsdd.main, "--out"),
                                          (train_fsdd.main, "--tokens"), (sample.main, "--out"),
                                          (evaluate_fid.main, "--json"), (evaluate_fid.main, "--save_stats")])
def test_outputs_are_tried_before_the_work(main, option, place):
    """Broken: hours of work would end at the moment when they are to be written."""
    suffix = {"--tokens": ".npy", "--json": ".json"}.get(option, ".pt" if "train" in main.__module__ else ".npz")
    os.mkdir("folder" + suffix)
    options = {train_tokenizer.main: STAGE1, train_fsdd.main: STAGE2, sample.main: []}.get(main, ["--ckpt=fsdd.pt"])
    for path, words in ((f"folder{suffix}", "is a folder"), (f"none/a{suffix}", "there is no folder none"),
                        (f"/proc/a{suffix}", "can't be written")):  # not even by root
        assert_one_sentence(run_here(main, *options, f"{option}={path}", folder=place), path, words)


def test_a_log_or_picture_that_is_a_folder(place):
    """Broken: the training would be lost when the first row or picture is to be written."""
    os.mkdir("a.csv"), os.mkdir("b.png")
    for out, path in (("a.pt", "a.csv"), ("b.pt", "b.png")):
        assert_one_sentence(run_here(train_tokenizer.main, *STAGE1, "--out", out, folder=place), f"{path} is a folder")
    assert_one_sentence(run_here(train_tokenizer.main, *STAGE1, "--out=c.csv", folder=place), "--out", "c.csv")
    assert_one_sentence(run_here(train_fsdd.main, *STAGE2, "--tokens=tokenizer.pt", folder=place), "--tokens", ".npy")


def outputs(random):
    """Ways to write a file of more than 100 kB, by its name."""
    images, page = random.integers(256, size=(1, 2000, 1, 8, 8), dtype=np.uint8), random.integers(256, size=(300, 300))
    partial = tempfile.TemporaryFile()
    partial.write(images.tobytes())

    def made(path):
        """A SampleFile whose images have all been made."""
        samples = object.__new__(SampleFile)
        samples.args, samples.labels = SimpleNamespace(out=path), torch.zeros(2000, dtype=torch.int64)
        samples.shape, samples.file, samples.partial = (1, 1, 8, 8), partial, "partial"
        return samples

    return {
        "s.npz": lambda path: made(path).write_out(),
        "s.png": lambda path: pictures.save(pictures.Image.fromarray(page.astype(np.uint8)), path, compress_level=0),
        "a.pt": lambda path: common.save_checkpoint({"a": torch.zeros(30000)}, path),
        "a.json": lambda path: records.write_json({"a": "a" * 100000}, path),
        "a.csv": lambda path: records.open_log(path, ["a" * 100000], 0),
        "s2.npz": lambda path: evaluate_fid.save_statistics(
            path, SimpleNamespace(mu=torch.zeros(200), sigma=torch.zeros(200, 200), num=1), SimpleNamespace(name="a")),
    }


def test_a_full_disk_destroys_nothing(place, capsys):
    """Broken: the valid file that stood there would be lost, or the error be a traceback."""
    for name, write in outputs(np.random.default_rng(0)).items():
        with open(name, "w") as file:
            file.write("what was there")
        before = sorted(os.listdir())
        with full_disk(50000), pytest.raises(SystemExit) as stopped:
            common.run(lambda: write(name))
        assert str(stopped.value.code).startswith(f"error: {name}: ") and "\n" not in stopped.value.code
        assert open(name).read() == "what was there" and sorted(os.listdir()) == before


def test_sizes_beyond_memory_get_one_sentence():
    """Broken: a model that is too large, or too many images at once, would end in a traceback; or a fault of the
    code would be taken for one."""
    with pytest.raises(SystemExit, match="out of memory: .*; take a smaller model") as stopped:
        common.run(lambda: torch.empty(2 ** 60, dtype=torch.uint8))
    assert "\n" not in stopped.value.code
    with pytest.raises(RuntimeError, match="size of tensor"):
        common.run(lambda: torch.zeros(2) + torch.zeros(3))


def test_space_for_the_tokens_is_claimed_first(place, monkeypatch):
    """Broken: the encoding would run for hours and find no room for what it found."""
    encode, tokens = encoding(place, monkeypatch)
    monkeypatch.setattr(token_sets, "encode", lambda *args: pytest.fail("encoded first"))
    with full_disk(100), pytest.raises(OSError, match="t.npy"):
        encode()
    assert not os.path.exists("t.npy") and not os.path.exists("t.json")


def test_a_kill_while_the_log_is_taken_up_again(tmp_path, monkeypatch):
    """Broken: a kill right after --resume would leave the log with a part of its rows, and the rest never come back."""
    path = str(tmp_path / "a.csv")
    write = records.open_log(path, ["step"], 0)
    for step in range(1, 3001):
        write({"step": step})
    whole = open(path).read()

    def killed(self, rows):
        self.writerow(rows[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        records.open_log(path, ["step"], 3000)
    assert open(path).read() == whole and os.listdir(tmp_path) == ["a.csv"]


# --- I: damaged files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut off", "changed"])
def test_damaged_tokens_are_made_anew(how, place, monkeypatch):
    """Broken: the note beside them would be trusted, and the training read other tokens, or end in a traceback."""
    encode, tokens = encoding(place, monkeypatch)
    encode(), damage("t.npy", how)
    assert np.array_equal(encode(), tokens) and np.array_equal(np.load("t.npy"), tokens)


@pytest.mark.parametrize("how", ["cut off", "changed"])
def test_a_damaged_checkpoint_replaces_no_good_one(how, place):
    """Broken: the advice to train anew would cost the one checkpoint that can be read, and its log."""
    good = open("tokenizer.pt", "rb").read()
    for name in ("tokenizer.pt", "tokenizer.csv"):
        (place / (name + ".previous")).write_bytes((place / name).read_bytes())
    damage("tokenizer.pt", how)
    damaged, log = open("tokenizer.pt", "rb").read(), open("tokenizer.csv").read()
    for main, *arguments in ((train_fsdd.main, *STAGE2), (train_tokenizer.main, "--resume")):
        assert_one_sentence(run_here(main, *arguments, folder=place), "tokenizer.pt can't be read as a checkpoint",
                            "tokenizer.pt.previous is the one before it")
    finished = run_here(train_tokenizer.main, *STAGE1, "--steps=1", folder=place)
    assert finished.returncode == 0 and "kept as tokenizer.pt.unreadable" in finished.stdout, finished.stderr
    assert open("tokenizer.pt.previous", "rb").read() == good and open("tokenizer.csv.previous").read() == log
    assert open("tokenizer.pt.unreadable", "rb").read() == damaged
    os.remove("tokenizer.pt")  # and a run that was cut off before its first checkpoint
    assert_one_sentence(run_here(train_tokenizer.main, "--resume", folder=place), "no checkpoint tokenizer.pt",
                        "tokenizer.pt.previous is the one before it")
    assert run_here(train_tokenizer.main, *STAGE1, "--steps=1", folder=place).returncode == 0
    assert open("tokenizer.csv.previous").read() == log


def test_a_file_of_another_kind_is_no_classifier_to_overwrite(place, monkeypatch):
    """Broken: --classifier with the name of a checkpoint would cost the checkpoint."""
    good = open("fsdd.pt", "rb").read()
    monkeypatch.setattr(digits_classifier, "train_classifier", lambda digits: DigitsClassifier())
    monkeypatch.setattr(digits_classifier, "share_read_as", lambda *args: 0.5)
    digits_classifier.open_classifier("fsdd.pt", "cpu", 0)
    assert open("fsdd.pt.previous", "rb").read() == good
