"""Files that stay whole after a kill or a full disk, and reading checkpoints."""
import contextlib
import errno
import json
import math
import os
import sys
import zipfile

import torch


def check_outputs(*paths, inputs=()):
    """Exit before any work if a file can't be written to one of the paths, or is one of the inputs; None is skipped."""
    read = [os.path.realpath(name) for name in filter(None, inputs)]
    for path in filter(None, paths):
        target = os.path.realpath(path)  # of a link, as in atomic_open()
        folder = os.path.dirname(target if os.path.islink(path) else path) or "."
        if not os.path.isdir(folder):
            sys.exit(f"error: there is no folder {folder} to write {path} to")
        if os.path.exists(path) and not os.path.isfile(path) or os.path.abspath(path).startswith("/dev/"):
            sys.exit(f"error: {path} is a folder, a device or a pipe; choose another name")
        if not os.access(folder, os.W_OK) or os.path.isfile(path) and not os.stat(path).st_mode & 0o222:
            sys.exit(f"error: {path} can't be written: permission denied for it or {folder}")
        if target in read:
            sys.exit(f"error: {path} is read by this command, which would replace it; choose another name")


@contextlib.contextmanager
def atomic_open(path, mode="wb", **how):
    """Open a file that replaces path at the end of this context. After a kill at any moment or a full disk, path is the
    old file or the new one, complete. An OSError names path. If path is a link, its target is replaced."""
    target = os.path.realpath(path)
    try:
        with open(target + ".tmp", mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(target + ".tmp", target)
    except (OSError, RuntimeError) as problem:  # torch.save hides an OSError in a RuntimeError
        while problem and not isinstance(problem, OSError):
            problem = problem.__context__
        if not problem:
            raise
        raise OSError(problem.errno or errno.EIO, problem.strerror or str(problem), path) from None
    finally:
        with contextlib.suppress(OSError):  # after os.replace() there is none
            os.remove(target + ".tmp")


def write_json(content, path):
    with atomic_open(path, "w") as file:
        json.dump(content, file, indent=1)


def read_json(path):
    """The dict in a JSON file; {} if there is none."""
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError):
        return {}


def save_checkpoint(checkpoint, path):
    with atomic_open(path) as file:
        torch.save(checkpoint, file)


NEEDED = {"tokenizer": ["model_config", "weights"],  # what is read from each kind of checkpoint
          "fsdd": ["model_config", "weights", "class_names", "denoiser", "generation", "tokenizer"]}


def load_checkpoint(path, made_by, *kinds):
    """The dict in a checkpoint of one of these kinds. If there is none, exits with a sentence that says which command
    makes one, made_by."""
    try:
        checkpoint = read_checkpoint(path)
        if (kind := checkpoint.get("kind")) not in kinds:
            raise ValueError(f"{path} is not a {' or '.join(kinds)} checkpoint"
                             f"{f' but a {kind} checkpoint' if kind else ''}")
        if missing := [name for name in NEEDED.get(kind, []) if name not in checkpoint]:
            raise ValueError(f"{path} has no {missing[0]}")
    except ValueError as problem:
        sys.exit(f"error: {problem}; make it with: {made_by}")
    return checkpoint


def read_checkpoint(path):
    """The dict in a checkpoint. ValueError if there is none, it is damaged, or a number in it is not finite."""
    previous = f"; {path}.previous is an earlier one" if os.path.isfile(f"{path}.previous") else ""
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}{previous}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
            if archive.testzip():
                raise ValueError
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as problem:  # both fail in many ways if the file is not a checkpoint
        raise ValueError(f"{path} can't be read as a checkpoint ({type(problem).__name__}){previous}") from None
    if where := not_finite(checkpoint):
        raise ValueError(f"{path} holds numbers that are not finite ({where}){previous}")
    return checkpoint


def not_finite(value, name=""):
    """The name of the first number that is NaN or infinite, or tensor with one, in nested dicts and lists; "" if there
    is none."""
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return next(filter(None, (not_finite(part, f"{name} {key}".strip()) for key, part in parts)), "")
    finite = value.isfinite().all() if torch.is_tensor(value) else not isinstance(value, float) or math.isfinite(value)
    return "" if finite else name
