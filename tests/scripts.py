"""Running the project's scripts from tests, and comparing what they write."""
import contextlib
import csv
import gc
import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(script, *args, folder, world_size=1, **variables):
    """Run a script of the project in a folder as a user does, with environment variables; returns the finished
    process."""
    return subprocess.run(command(script, args, world_size), cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | variables, stdin=subprocess.DEVNULL)


def command(script, args, world_size):
    """The command line of a script, with torchrun if world_size is more than 1."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"] if world_size > 1 else []
    return [sys.executable, *start, os.path.join(ROOT, script), *map(str, args)]


def rank_variables(world_size):
    """The environment variables of each rank, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost",
             "MASTER_PORT": str(port)} for rank in range(world_size)]


def run_ranks(script, *args, folder, world_size):
    """run() on several ranks, as on_ranks(). The output is rank 0's, the errors are those of all ranks."""
    with tempfile.TemporaryDirectory() as captured:
        def run_rank():
            rank = os.environ["RANK"]
            os.chdir(folder)
            sys.argv = [script, *map(str, args)]
            sys.stdout, sys.stderr = (open(f"{captured}/{name}{rank}", "w") for name in ("output", "errors"))
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")

        codes = fork_ranks(world_size, run_rank)
        output, *errors = (open(f"{captured}/{name}").read()
                           for name in ("output0", *(f"errors{rank}" for rank in range(world_size))))
    returncode = next((code for code in codes if code != 0), 0)  # None: it did not end
    return SimpleNamespace(returncode=returncode, stdout=output, stderr="".join(errors))


def on_ranks(world_size, function):
    """function() on every rank of a process group: a list of what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        def run_rank():
            dist.init_process_group("gloo")
            torch.save(function(), f"{folder}/{os.environ['RANK']}.pt")
            dist.barrier()
            dist.destroy_process_group()

        assert fork_ranks(world_size, run_rank) == [0] * world_size
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def fork_ranks(world_size, function):
    """function() in processes that are forked from this one, which takes a second; torchrun takes several. What a test
    has patched stays patched. Returns their exit codes."""
    def run_rank(variables):
        os.environ |= variables
        torch.set_num_threads(1)
        function()

    gc.freeze()  # the ranks' garbage collection would copy the memory they share with this process
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=[variables]) for variables in rank_variables(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    gc.unfreeze()
    return codes


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


def successful(finished):
    """A script that has ended as it should, of run(), run_ranks() or run_here()."""
    assert finished.returncode == 0, finished.stderr
    return finished


class Crash(Exception):
    """Raised in place of a kill."""


def crash():
    raise Crash


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def stop_and_resume(monkeypatch, script, options, out, stops):
    """Train in this process, stopped and resumed several times, to the end.

    script: a module.  out: the path of its checkpoint.  stops: for each (the step in which it happens, counted from 1,
    send_sigterm or crash, the step of the checkpoint that must exist then).
    """
    done, set_lr = 0, script.set_lr
    for step, stop, saved in stops:
        calls = []

        def count(*args):
            calls.append(args)
            if done + len(calls) == step:
                stop()
            set_lr(*args)

        with monkeypatch.context() as context:
            context.setattr(script, "set_lr", count)
            try:
                finished = run_here(script.main, *options, f"--out={out}", folder=out.parent)
                assert finished.returncode == 143 and "stopped by SIGTERM" in finished.stderr, finished.stderr
            except Crash:
                assert stop is crash
        assert torch.load(out, weights_only=True)["step"] == saved
        done, options = saved, ["--resume"]
    successful(run_here(script.main, "--resume", f"--out={out}", folder=out.parent))


def assert_ranks_train_alike(script, options, folder):
    """Trainings by one rank and by three, whose shares of the batch are unequal, have the same losses and gradients.

    AdamW's first moment stands for the gradients. Those that cancel to almost 0 are compared in units of the largest.
    """
    logs, states = [], []
    for world_size in (1, 3):
        successful(run_ranks(script, *options, f"--out={world_size}.pt", folder=folder, world_size=world_size))
        logs.append(read_log(folder / f"{world_size}.csv"))
        training = torch.load(folder / f"{world_size}.pt", weights_only=True)["training"]
        states.append([optimizer["state"] for optimizer in training["optimizers"]])
    assert logs[0] and len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(*states, strict=True):
        assert ours.keys() == theirs.keys() and ours
        largest = max(state["exp_avg"].abs().max() for state in ours.values())
        for i in ours:
            gradient, other_gradient = ours[i]["exp_avg"], theirs[i]["exp_avg"]
            assert (gradient - other_gradient).abs().max() <= 0.01 * gradient.abs().max() + 1e-4 * largest


def assert_one_sentence(finished, *words):
    """A user's mistake ends in one sentence and a non-zero exit code, without a traceback."""
    assert finished.returncode != 0
    assert "Traceback" not in finished.stderr, finished.stderr
    for word in words:
        assert word in finished.stderr, finished.stderr


def names_and_shapes(tensors):
    """The number of tensors, {name: tensor or shape}, and the checksum of their sorted lines "name<TAB>shape"."""
    shapes = {name: getattr(tensor, "shape", tensor) for name, tensor in tensors.items()}
    lines = sorted(f"{name}\t{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return len(lines), zlib.crc32("\n".join(lines).encode())


def read_table(output):
    """The cells of the Markdown table that a script has printed, without its head."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    return rows[1:]


def read_log(path):
    """The rows of a log as dicts of numbers, without the empty columns."""
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same_training(path, other):
    """Two trainings have written the same log, and checkpoints with the same numbers, the optimizers' included."""
    assert read_log(path.with_suffix(".csv")) == read_log(other.with_suffix(".csv"))
    ours, theirs = (torch.load(file, weights_only=True) for file in (path, other))
    for name in ("step", "weights", "training"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
