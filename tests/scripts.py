"""Running the project's scripts from tests, and comparing what they write."""
import contextlib
import csv
import io
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(script, *args, folder, world_size=1):
    """Run a script of the project in a folder as a user does; returns the finished process."""
    return subprocess.run(command(script, args, world_size), cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)


def command(script, args, world_size):
    """The command line of a script, with torchrun if world_size is more than 1."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"] if world_size > 1 else []
    return [sys.executable, *start, os.path.join(ROOT, script), *map(str, args)]


def run_ranks(script, *args, folder, world_size):
    """run() without torchrun, which takes two seconds longer. The output is rank 0's, the errors are those of all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost",
                     "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        ranks.append(subprocess.Popen(command(script, args, 1), cwd=folder, text=True, stdin=subprocess.DEVNULL,
                                      env=os.environ | {name: str(value) for name, value in variables.items()},
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    with ThreadPoolExecutor(world_size) as pool:
        output = list(pool.map(lambda process: process.communicate(timeout=240), ranks))
    return SimpleNamespace(returncode=max(abs(process.returncode) for process in ranks), stdout=output[0][0],
                           stderr="".join(errors for _, errors in output))


def run_here(main, *args, folder):
    """run() in this process, on one thread. This is several seconds faster, as nothing is imported."""
    output, errors, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stopped:
            code = stopped.code
        finally:
            torch.set_num_threads(threads)
    if isinstance(code, str):  # which Python prints when it exits
        errors.write(code + "\n")
        code = 1
    return SimpleNamespace(returncode=code, stdout=output.getvalue(), stderr=errors.getvalue())


def assert_one_sentence(finished, *words):
    """A user's mistake ends in one sentence and a non-zero exit code, without a traceback."""
    assert finished.returncode != 0
    assert "Traceback" not in finished.stderr, finished.stderr
    for word in words:
        assert word in finished.stderr, finished.stderr


def read_log(path):
    """The rows of a log as dicts of numbers, without the empty columns."""
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same_checkpoint(path, other):
    """Both checkpoints contain the same numbers, those of the optimizers included."""
    def compare(ours, theirs, name):
        if torch.is_tensor(ours):
            assert torch.equal(ours, theirs), name
        elif isinstance(ours, (dict, list, tuple)):
            assert len(ours) == len(theirs), name
            for key in ours if isinstance(ours, dict) else range(len(ours)):
                compare(ours[key], theirs[key], f"{name} {key}")
        else:
            assert ours == theirs, name

    ours, theirs = (torch.load(file, weights_only=True) for file in (path, other))
    for name in ("step", "weights", "training"):
        compare(ours[name], theirs[name], name)


def assert_same_gradients(path, other):
    """After one step, AdamW's first moment is the gradient of the global batch times a constant."""
    states, others = (torch.load(file, weights_only=True)["training"]["optimizers"] for file in (path, other))
    for ours, theirs in zip(states, others, strict=True):
        assert ours["state"].keys() == theirs["state"].keys() and ours["state"]
        for i in ours["state"]:
            gradient, other_gradient = ours["state"][i]["exp_avg"], theirs["state"][i]["exp_avg"]
            assert (gradient - other_gradient).abs().max() <= 0.01 * gradient.abs().max() + 1e-7
