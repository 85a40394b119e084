"""Both stages, killed at random moments and resumed, give what an unbroken run gives: pytest --slow tests/test_kills.py

The moments are spread over all that a run does from its start: encoding, training, saving, drawing.
"""
import contextlib
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from tests.image_folder import make_image_folder
from tests.scripts import ROOT, assert_same_checkpoint, command, read_log, run

KILLS = 10  # of each stage, for each number of ranks
SMALL = ["--recipe=digits", "--data=images", "--width=16", "--heads=2", "--batch_size=7", "--warmup=1", "--steps=300",
         "--log_every=1", "--save_every=3", "--picture_every=20", "--bf16=off", "--device=cpu"]
STAGES = {
    "tokenizer.pt": ("train_tokenizer.py", [*SMALL, "--image_size=16", "--patch_size=8", "--encoder_layers=1",
                                            "--decoder_layers=1", "--num_tokens=4", "--codebook_size=16"]),
    "fsdd.pt": ("train_fsdd.py", [*SMALL, "--layers=1", "--sample_steps=2"]),
}
# After the first step of a run DDP sorts its buckets anew, and from three ranks on a sum depends on a number's index in
# its bucket, so the first step of a resumed run rounds differently. DDP that looks for unused parameters does not sort.
FIXED_BUCKETS = """import functools, runpy, sys
sys.path.insert(0, {root!r})
import support.hardware as hardware
hardware.DistributedDataParallel = functools.partial(hardware.DistributedDataParallel, find_unused_parameters=True)
runpy.run_path({root!r} + "/{script}", run_name="__main__")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    make_image_folder(folder / "images", 100)
    script, options = STAGES["tokenizer.pt"]
    finished = run(script, *options, "--steps=4", folder=folder)
    assert finished.returncode == 0, finished.stderr
    return folder


def linked(files, folder, names):
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(files / name)
    return folder


def start(script, options, folder, world_size):
    return subprocess.Popen(command(script, options, world_size), cwd=folder, text=True, stdin=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def family(process):
    """The process ids of a process and all its descendants, ancestors first. torchrun's ranks have sessions of their
    own, so they are found by their parents."""
    pairs = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    found = [process.pid]
    for parent in found:
        found += [int(pid) for pid, its_parent in zip(pairs[::2], pairs[1::2]) if int(its_parent) == parent]
    return found


def kill_after(seconds, script, options, folder, world_size):
    """Start a script and kill all its processes after so many seconds. Returns its exit code and its errors."""
    process = start(script, options, folder, world_size)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    for pid in family(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.returncode or process.wait(), process.stderr.read()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("out", STAGES)
def test_killed_at_random_moments(out, world_size, files, tmp_path):
    """Broken: a kill at some moment would lose the checkpoint, the log or the tokens, or change what --resume gives."""
    script, options = STAGES[out]
    if world_size > 2:
        (tmp_path / "fixed.py").write_text(FIXED_BUCKETS.format(root=ROOT, script=script))
        script = str(tmp_path / "fixed.py")
    names = ["images"] if out == "tokenizer.pt" else ["images", "tokenizer.pt"]
    whole, killed = (linked(files, tmp_path / name, names) for name in ("whole", "killed"))
    began = time.time()
    process = start(script, options, whole, world_size)
    ready = seconds_until(whole / out.replace(".pt", ".csv"), process)
    assert process.wait() == 0, process.stderr.read()
    training, moments, kills = time.time() - began - ready, random.Random(f"{out} {world_size}"), 0
    for _ in range(3 * KILLS):
        again = ["--resume"] if os.path.exists(killed / out) else options
        seconds = moments.uniform(0.7 * ready, ready + training / 16)
        code, errors = kill_after(seconds, script, again, killed, world_size)
        assert code in (-signal.SIGKILL, 0), errors
        kills += code != 0
        if os.path.exists(killed / out):
            torch.load(killed / out, weights_only=True)  # whole at any moment
        if kills == KILLS or code == 0:
            break
    print(f"{out}, {world_size} ranks: {kills} kills")
    assert kills >= 3
    finished = run(script, *(["--resume"] if os.path.exists(killed / out) else options), folder=killed,
                   world_size=world_size)
    assert finished.returncode == 0, finished.stderr
    ours, theirs = (read_log(folder / out.replace(".pt", ".csv")) for folder in (whole, killed))
    assert [row["step"] for row in ours] == list(range(1, 301)) and ours == theirs
    assert_same_checkpoint(whole / out, killed / out)


def seconds_until(path, process):
    """Wait until a file exists."""
    began = time.time()
    while not os.path.exists(path) and process.poll() is None:
        time.sleep(0.01)
    return time.time() - began


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_happens_to_one_of_two_ranks_ends_both(sent, files, tmp_path):
    """Broken: the loss of one rank would leave the other waiting forever, or a signal to one of them lose steps."""
    script, options = STAGES["fsdd.pt"]
    folder = linked(files, tmp_path / "stopped", ["images", "tokenizer.pt"])
    process = start(script, [*options, "--steps=60"], folder, 2)
    seconds_until(folder / "fsdd.pt", process)
    os.kill(family(process)[1], sent)
    _, errors = process.communicate(timeout=60)
    step = torch.load(folder / "fsdd.pt", weights_only=True)["step"]
    assert process.returncode != 0 and 3 <= step < 60
    if sent != signal.SIGKILL:
        assert f"stopped by {sent.name}" in errors and read_log(folder / "fsdd.csv")[-1]["step"] == step, errors
    finished = run(script, "--resume", folder=folder, world_size=2)
    assert finished.returncode == 0, finished.stderr
