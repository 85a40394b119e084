"""Both stages, killed at random moments and resumed, give what an unbroken run gives: pytest --slow tests/test_kills.py

The moments are spread over all that a run does once it has claimed its output: encoding, training, saving, drawing.
"""
import os
import random
import signal
import time

import pytest

from tests.image_folder import make_image_folder
from tests.test_common import ROOT, run
from tests.test_files import STAGE1, STAGE2
from tests.test_train_tokenizer import assert_same_checkpoint, kill_when, read_log

KILLS = 10  # of each stage, by each number of processes
LONG = ["--steps=300", "--save_every=3", "--picture_every=20"]
STAGES = {"tokenizer.pt": ("train_tokenizer.py", [*STAGE1, *LONG]), "fsdd.pt": ("train_fsdd.py", [*STAGE2, *LONG])}
# After the first step of a run DDP sorts its buckets anew, and from three ranks on a sum depends on a number's place in
# its bucket: a resumed run's first step then rounds otherwise. DDP that looks for unused parameters doesn't sort.
FIXED_BUCKETS = """import functools, runpy, sys
sys.path.insert(0, {root!r})
import common
common.DistributedDataParallel = functools.partial(common.DistributedDataParallel, find_unused_parameters=True)
runpy.run_path({root!r} + "/{script}", run_name="__main__")
"""

pytestmark = pytest.mark.slow


def place(folder, files, *names):
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(files / name)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    make_image_folder(folder / "images", 100)
    assert run("train_tokenizer.py", *STAGE1, folder=folder).returncode == 0
    return folder


def seconds_claimed(out):
    """A function that tells for how long a file has been claimed by a run, 0 where it is not."""
    first = []

    def seconds():
        if not first and os.path.exists(f"{out}.lock"):
            first.append(time.time())
        return time.time() - first[0] if first else 0.0

    return seconds


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("out", STAGES)
def test_killed_at_random_moments(out, processes, files, tmp_path):
    """Broken: some moment of a kill would lose the checkpoint, the log or the tokens, or change what --resume gives."""
    script, options = STAGES[out]
    if processes > 2:
        (tmp_path / "fixed.py").write_text(FIXED_BUCKETS.format(root=ROOT, script=script))
        script = str(tmp_path / "fixed.py")
    names = ["images"] if out == "tokenizer.pt" else ["images", "tokenizer.pt"]
    whole, killed = (place(tmp_path / name, files, *names) for name in ("whole", "killed"))
    began = time.time()
    assert run(script, *options, folder=whole, processes=processes).returncode == 0
    lasts = time.time() - began
    moments, reached = random.Random(f"{out} {processes}"), 0
    for _ in range(3 * KILLS):  # a run that had little left to do may end before its moment
        moment, seconds = moments.uniform(0, lasts / 8), seconds_claimed(killed / out)
        if os.path.exists(killed / f"{out}.lock"):  # the last kill left it
            os.remove(killed / f"{out}.lock")
        more = ["--resume"] if os.path.exists(killed / out) else options
        code, errors = kill_when(lambda: seconds() > moment, script, more, killed, processes)
        assert code == -signal.SIGKILL or code == 0, errors
        reached += code != 0
        if reached == KILLS or code == 0:
            break
    print(f"{out}, {processes} processes: {reached} kills")
    finished = run(script, *(["--resume"] if os.path.exists(killed / out) else options), folder=killed,
                   processes=processes)
    assert finished.returncode == 0, finished.stderr
    ours, theirs = (read_log(folder / out.replace(".pt", ".csv")) for folder in (whole, killed))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, len(ours) + 1))
    assert ours == theirs
    assert_same_checkpoint(whole / out, killed / out)
    assert not [name for name in os.listdir(killed) if name.endswith((".tmp", ".lock"))]
