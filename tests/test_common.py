"""What the scripts share: the command line, the same batches for any number of processes, checkpoints that survive."""
import contextlib
import io
import os
import platform
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import common
from data import pictures, records

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE = [("steps", 10, 1000, "steps"), ("lr", 1e-3, 1e-4, "rate in %"), ("flip", False, True, "mirror"),
         ("ema", 0.9, 0.9, "decay"),
         ("tf32", True, True, "switch"),
         ("optimizer", "adamw", "muon", "which"), ("muon_lr", 0.1, 0.1, "rate"), ("bf16", "auto", "auto", "bfloat16"),
         ("out", "a.pt", "a.pt", "checkpoint"), ("beta2", 0.9, 0.9, "decay"), ("label_drop", 0.1, 0.1, "share"),
         ("gelu", "tanh", "none", "which")]


def run(script, *args, folder, processes=1):
    """Run a script of the project as a user does, in a folder of its own; returns the finished process."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run([sys.executable, *start, os.path.join(ROOT, script), *map(str, args)], cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)


def run_ranks(script, *args, folder, processes):
    """run(), by processes that are started here and not by torchrun, which takes two seconds longer: for what ends
    well. The output is rank 0's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        ranks.append(subprocess.Popen([sys.executable, os.path.join(ROOT, script), *map(str, args)], cwd=folder,
                                      env=os.environ | {name: str(value) for name, value in where.items()}, text=True,
                                      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    with ThreadPoolExecutor(processes) as pool:
        said = list(pool.map(lambda process: process.communicate(timeout=120), ranks))
    return SimpleNamespace(returncode=max(abs(process.returncode) for process in ranks), stdout=said[0][0],
                           stderr="".join(errors for _, errors in said))


def run_here(main, *args, folder):
    """The same of one process, in this one, on one thread: several seconds quicker, as nothing is imported."""
    said, errors, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stopped:
            code = stopped.code
        finally:
            torch.set_num_threads(threads)
    if isinstance(code, str):  # what Python prints when a program ends with a text
        code, _ = 1, errors.write(code + "\n")
    return SimpleNamespace(returncode=code, stdout=said.getvalue(), stderr=errors.getvalue())


def assert_one_sentence(finished, *words):
    """A mistake of the user's ends in one sentence and a non-zero exit, without a traceback."""
    assert finished.returncode != 0
    assert "Traceback" not in finished.stderr, finished.stderr
    for word in words:
        assert word in finished.stderr, finished.stderr


# --- command line ----------------------------------------------------------------------------------------------------


def test_recipe_chooses_the_column(tmp_path, monkeypatch, capsys):
    """Broken: the digits would be trained with ImageNet's settings or the other way round, or it would not be said."""
    monkeypatch.chdir(tmp_path)
    cfg, _ = common.parse(TABLE, "", "fsdd", [])
    assert (cfg.recipe, cfg.steps, cfg.flip) == ("digits", 10, False)
    assert "recipe digits: data/imagenet/train is not there" in capsys.readouterr().out
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "data" / "imagenet").mkdir(parents=True)
    (tmp_path / "data" / "imagenet" / "train").symlink_to(tmp_path / "somewhere")
    cfg, _ = common.parse(TABLE, "", "fsdd", [])
    assert (cfg.recipe, cfg.steps, cfg.flip) == ("imagenet256", 1000, True)
    assert "recipe imagenet256: data/imagenet/train is there" in capsys.readouterr().out
    assert common.parse(TABLE, "", "fsdd", ["--recipe", "digits"])[0].steps == 10


def test_key_value():
    """Broken: --key value and --key=value would not both work, or give another type than the table's."""
    cfg, _ = common.parse(TABLE, "", "fsdd",
                          ["--recipe=digits", "--steps", "7", "--lr=3e-4", "--flip", "true", "--out=b.pt"])
    assert (cfg.steps, cfg.lr, cfg.flip, cfg.out, cfg.tf32) == (7, 3e-4, True, "b.pt", True)
    assert common.parse(TABLE, "", "fsdd", ["--recipe=digits", "--tf32=false"])[0].tf32 is False


@pytest.mark.parametrize("argv, word", [(["--stepz", "7"], "--stepz"), (["--step", "7"], "--step"),
                                        (["--steps", "x"], "--steps"),
                                        (["--steps", "1.5"], "--steps"), (["--flip", "maybe"], "--flip"),
                                        (["--steps=0"], "--steps"), (["--lr=-1"], "--lr"), (["--lr=nan"], "--lr"),
                                        (["--ema=1"], "--ema"),
                                        (["--optimizer=sgd"], "--optimizer"),
                                        (["--optimizer=muon", "--muon_lr=0"], "--muon_lr"),
                                        (["--recipe", "cifar"], "--recipe"), (["--steps=" + 20 * "9"], "--steps"),
                                        (["--beta2=1"], "--beta2"), (["--label_drop=1.5"], "--label_drop"),
                                        (["--gelu=relu"], "--gelu")])
def test_wrong_command_lines(argv, word, capsys):
    """Broken: a misspelt key or a value of the wrong type would be taken for something else."""
    with pytest.raises(SystemExit) as stopped:
        common.parse(TABLE, "", "fsdd", argv)
    assert stopped.value.code == 2 and word in capsys.readouterr().err


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29544"}


@pytest.mark.parametrize("device, variables, word", [
    ("meta", {}, "--device must be auto, cpu, cuda or cuda:N, got meta"), ("mps", {}, "got mps"),
    ("cpu", {"RANK": "0"}, "WORLD_SIZE is missing"), ("cpu", {"WORLD_SIZE": "2"}, "RANK is missing"),
    ("cpu", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29544"}, "MASTER_ADDR is missing"),
    ("cpu", TORCHRUN | {"RANK": "1"}, "RANK 1 of WORLD_SIZE 1"), ("cpu", TORCHRUN | {"LOCAL_RANK": "a"}, "'a'"),
    ("cpu", TORCHRUN | {"MASTER_PORT": "70000"}, "no process group .* can be joined")])
def test_wrong_surroundings(device, variables, word, monkeypatch):
    """Broken: a device without data, or a part of torchrun's variables, would end in a traceback or hang."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=word):
        common.init_distributed(device)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept():
    """Broken: each large tensor of every step would come from the system anew, page by page."""
    code = """import resource, torch, common
common.init_distributed("cpu")
for _ in range(40):  # at first an aligned block may not fit in the one that was freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)  # 64 MiB, freed at once
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    faults = [int(number) for number in finished.stdout.split()]
    assert len(faults) == 40 and sorted(faults)[20] < 16, finished  # of 16384 pages of 4 KiB, or 32 of 2 MiB


def test_help_names_every_key(capsys):
    """Broken: --help would not be the table."""
    with pytest.raises(SystemExit) as stopped:
        common.parse(TABLE, "what it does", "fsdd", ["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "what it does" in text and all("--" + row[0] in text for row in TABLE)


def test_resume_takes_the_checkpoints_settings(tmp_path, capsys):
    """Broken: a resumed run would train with other settings than the run it goes on from."""
    path = str(tmp_path / "a.pt")
    config = {"recipe": "digits", "resume": False, "steps": 50, "lr": 0.5, "flip": True, "ema": 0.9,
              "optimizer": "adamw",
              "muon_lr": 0.1, "bf16": "off", "out": "old"}
    common.save_checkpoint({"kind": "fsdd", "step": 50, "config": config}, path)
    cfg, checkpoint = common.parse(TABLE, "", "fsdd", ["--resume", "--out", path, "--steps", "60"])
    assert vars(cfg).items() >= common.BEFORE.items()  # what the checkpoint was trained with before these settings came
    assert (cfg.steps, cfg.lr, cfg.flip, cfg.out) == (60, 0.5, True, path) and checkpoint is not None
    with pytest.raises(SystemExit):
        common.parse(TABLE, "", "fsdd", ["--resume", "--out", path, "--steps", "49"])
    with pytest.raises(SystemExit, match="is not a tokenizer checkpoint"):
        common.parse(TABLE, "", "tokenizer", ["--resume", "--out", path])
    with pytest.raises(SystemExit, match="--lr 0.1 can't change with --resume"):
        common.parse(TABLE, "", "fsdd", ["--resume", "--out", path, "--lr", "0.1"])


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 7, 128, 255])
def test_shares_cover_the_batch(total):
    """Broken: with some number of processes an image would be missing from the batch, or be in it twice."""
    for processes in range(1, 12):
        shares = [common.shard(total, rank, processes) for rank in range(processes)]
        rows = [row for part in shares for row in range(total)[part]]
        assert rows == list(range(total))
        lengths = [part.stop - part.start for part in shares]
        assert max(lengths) - min(lengths) <= 1
        for part in shares:
            pieces = common.chunks(part, 3)
            assert [row for piece in pieces for row in range(total)[piece]] == list(range(total)[part])
            assert all(piece.stop - piece.start <= 3 for piece in pieces)


def test_random_numbers_depend_on_the_key():
    """Broken: two steps, or two seeds, would draw the same noise, or the same step other noise after a resume."""
    draws = {key: torch.rand(4, generator=common.generator("cpu", "step", *key)).tolist()
             for key in [(0,), (0, 0), (0, 1), (1, 0), (0, 2), (0, 0, 1)]}
    assert len(set(map(tuple, draws.values()))) == 6
    assert torch.rand(4, generator=common.generator("cpu", "epoch", 0, 1)).tolist() != draws[0, 1]
    assert torch.rand(4, generator=common.generator("cpu", "step", 0, 1)).tolist() == draws[0, 1]


# --- optimization ----------------------------------------------------------------------------------------------------


def settings(**changes):
    return SimpleNamespace(**dict(optimizer="adamw", fused_adamw=True, lr=1.0, muon_lr=0.1, lr_end=0.1,
                                  weight_decay=0.5) | changes)


def test_schedule():
    """Broken: the learning rate would not rise over the warm-up and fall along a cosine to its end, or stay where
    lr_end is 1."""
    for lr_end in (0.1, 1.0):
        (optimizer, scheduler), = common.make_optimizers(torch.nn.Linear(2, 2), settings(lr_end=lr_end), 110, 10, 0.99)
        rates = []
        for _ in range(110):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates[:10] == sorted(rates[:10]) and rates[0] < 0.2 and max(rates) <= 1.0
        assert rates[-1] == pytest.approx(lr_end, abs=1e-3)
        assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_one_optimizer(optimizer):
    """Broken: a weight would be left out or stepped twice, or norms, biases and embeddings would decay."""
    from fsdd import Denoiser
    model = Denoiser(12, 6, 3, 32, 2, 2)
    for decay_all in (False, True):
        optimizers = common.make_optimizers(model, settings(optimizer=optimizer), 110, 10, 0.99, decay_all)
        groups = [group for one, _ in optimizers for group in one.param_groups]
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
        decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        assert decay[id(model.to_logits.weight)] == 0.5
        for p in (model.to_logits.bias, model.code_embedding, model.count_embedding.weight):
            assert decay[id(p)] == (0.5 if decay_all else 0.0)


# --- checkpoints, log, pictures --------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Broken: a run killed while it saves would lose the checkpoint it had."""
    path = str(tmp_path / "a.pt")
    common.save_checkpoint({"kind": "fsdd", "step": 1}, path)

    def half_a_save(checkpoint, target):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint({"step": 2}, path)
    assert common.load_checkpoint(path, "x", "fsdd")["step"] == 1


def test_bad_checkpoints_get_a_sentence(tmp_path):
    """Broken: a missing, broken or foreign file would end in a traceback."""
    broken, foreign = str(tmp_path / "broken.pt"), str(tmp_path / "foreign.pt")
    with open(broken, "wb") as file:
        file.write(b"not a checkpoint")
    torch.save({"other": 1}, foreign)
    for path, words in ((str(tmp_path / "none.pt"), "there is no checkpoint"), (broken, "can't be read"),
                        (foreign, "is not a fsdd checkpoint")):
        with pytest.raises(SystemExit, match=words) as stopped:
            common.load_checkpoint(path, "python train_fsdd.py", "fsdd")
        assert "python train_fsdd.py" in str(stopped.value.code)


def test_log_goes_on_from_the_checkpoint(tmp_path):
    """Broken: rows written after the last checkpoint would stand in the log twice."""
    path = str(tmp_path / "a.csv")
    write = records.open_log(path, ["step", "loss"], 0)
    for step in (10, 20, 30):
        write({"step": step, "loss": 0.5})
    write = records.open_log(path, ["step", "loss"], 20)
    write({"step": 30, "loss": 0.25})
    assert open(path).read().split() == ["step,loss", "10,0.5", "20,0.5", "30,0.25"]


def test_grid_puts_images_in_their_places():
    """Broken: pictures would show images in the wrong row or column, or with wrong colours."""
    images = torch.zeros(6, 3, 56, 56, dtype=torch.uint8)
    images[4, 0] = 255  # the fifth image is red
    page = pictures.grid(images, 3)
    assert page.size == (168, 112)
    assert page.getpixel((84, 84)) == (255, 0, 0) and page.getpixel((28, 84)) == (0, 0, 0)
    grey = pictures.grid(torch.full((2, 1, 28, 28), 7, dtype=torch.uint8), 2, ["label"])
    assert grey.getpixel((grey.width - 5, 5)) == (7, 7, 7) and grey.size[1] == 56
    assert grey.crop((0, 0, grey.width - 112, 56)).convert("L").getextrema()[0] < 128  # the label is there


def test_pixels_to_bytes():
    """Broken: [-1, 1] would not become 0..255, or would wrap around outside."""
    assert pictures.to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    everything = torch.arange(256)
    assert torch.equal(pictures.to_uint8(everything / 127.5 - 1).long(), everything)


@pytest.mark.parametrize("text, numbers", [("4,50,55", [4, 50, 55]), ("2", [2]), ("2,6", [2, 6]),
                                           ("1.5, 2, 3", [1.5, 2, 3])])
def test_guidance_weights(text, numbers):
    """Broken: --guidance would be read wrongly."""
    assert common.guidance_weights(text) == numbers
    for wrong in ("", "a", "1,2,", "1,2,3,4", "nan", "-1", "1,2,inf"):
        with pytest.raises(ValueError, match="one to three numbers"):
            common.guidance_weights(wrong)


@pytest.mark.parametrize("module", ["fsdd", "published.weights"])
def test_a_module_by_itself(module):
    """Broken: `from fsdd import generate` at the start of a script would fail, by imports that go in a circle."""
    finished = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
