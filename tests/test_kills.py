"""Both stages, killed at random moments and resumed, give what an unbroken run gives: pytest --slow tests/test_kills.py

The moments are spread over all that a run does from its start: encoding, training, saving, drawing. With three or more
ranks a resumed run's first step rounds differently, as DDP sorts its buckets after the first step.
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
from tests.scripts import assert_same_training, command, rank_variables, read_log

KILLS = 10  # of each stage, for each number of ranks
SMALL = ["--recipe=digits", "--data=images", "--width=16", "--heads=2", "--batch_size=7", "--warmup=1", "--steps=300",
         "--log_every=1", "--save_every=3", "--picture_every=20", "--bf16=off", "--device=cpu"]
STAGES = {
    "tokenizer": [*SMALL, "--image_size=16", "--patch_size=8", "--encoder_layers=1", "--decoder_layers=1",
                  "--num_tokens=4", "--codebook_size=16"],
    "fsdd": [*SMALL, "--layers=1", "--picture_every=0"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    make_image_folder(folder / "images", 100)
    assert train("tokenizer", [*STAGES["tokenizer"], "--steps=4"], folder, 1) == {0}
    return folder


def train(stage, options, folder, world_size, seconds=None):
    """Run a training, and kill all its ranks after some seconds. Returns their exit codes."""
    ranks = [subprocess.Popen(command(f"train_{stage}.py", options, 1), cwd=folder, stderr=subprocess.DEVNULL,
                              env=os.environ | {"OMP_NUM_THREADS": "1"} | variables)
             for variables in (rank_variables(world_size) if world_size > 1 else [{}])]
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in ranks:
            process.wait(seconds)
    for process in ranks:
        process.kill()
    return {process.wait() for process in ranks}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(stage, world_size, files, tmp_path):
    """Fails if a kill at some moment loses the checkpoint, the log or the tokens, or changes what --resume gives."""
    options, seconds = STAGES[stage], {}
    for folder, steps in (("short", ["--steps=1"]), ("whole", []), ("killed", None)):
        (tmp_path / folder).mkdir()
        for name in ("images", "tokenizer.pt")[:1 + (stage == "fsdd")]:
            (tmp_path / folder / name).symlink_to(files / name)
        if steps is not None:
            began = time.time()
            assert train(stage, options + steps, tmp_path / folder, world_size) == {0}
            seconds[folder] = time.time() - began

    out, random_moments = tmp_path / "killed" / f"{stage}.pt", random.Random(f"{stage} {world_size}")
    kills, scale = 0, 1.0
    while kills < KILLS:
        moment = scale * random_moments.uniform(0.5 * seconds["short"], seconds["short"] + seconds["whole"] / 20)
        codes = train(stage, ["--resume"] if out.exists() else options, out.parent, world_size, moment)
        if out.exists():
            torch.load(out, weights_only=True)  # whole at any moment
        if codes == {0} and kills >= 3:  # it ended before its moment
            break
        if codes == {0}:  # the machine was busy when the times were taken: from the start, with earlier moments
            out.unlink()
            kills, scale = 0, scale / 2
            continue
        assert codes <= {0, -signal.SIGKILL}
        kills += 1
    print(f"{stage}.pt, {world_size} ranks: {kills} kills")
    assert train(stage, ["--resume"] if out.exists() else options, out.parent, world_size) == {0}
    assert [row["step"] for row in read_log(out.with_suffix(".csv"))] == list(range(1, 301))
    assert_same_training(tmp_path / "whole" / f"{stage}.pt", out)
