"""Files that a kill, a full disk or another run leaves whole, and that hold finite numbers."""
import contextlib
import errno
import glob
import itertools
import math
import os
import tempfile
import uuid
import zipfile

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN, NUMBERS = uuid.uuid4().hex[:8], itertools.count()  # what the names of temporary files are made of


def check_output(path):
    """ValueError where path can't be written, found out before any work by writing a file beside it."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder} to write {path} to")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, so no file can be written there; move it away, or choose another name")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as problem:
        raise ValueError(f"{path} can't be written ({problem.strerror})") from None


@contextlib.contextmanager
def written(path, mode="wb", **how):
    """A file to write, open in this context, that takes path's place at its end: a kill at any moment, a full disk or
    another run that writes path too leave a whole file there. Its temporary name is its own. An OSError names path."""
    own = f".{RUN}-{os.getpid()}-"
    for left in glob.glob(f"{glob.escape(path)}.*.tmp"):
        if own not in left:  # what another process writes it has locked; the rest is of some that were killed
            with contextlib.suppress(OSError), open(left, "r+b") as file:
                if lock(file):
                    os.remove(left)
    temporary = f"{path}{own}{next(NUMBERS)}.tmp"
    try:
        with naming(path), open(temporary, mode, **how) as file:
            lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it has been renamed
            os.remove(temporary)


@contextlib.contextmanager
def naming(path):
    """In this context an OSError names path."""
    try:
        yield
    except (OSError, RuntimeError) as problem:  # torch.save hides an OSError in a RuntimeError
        while problem and not isinstance(problem, OSError):
            problem = problem.__context__
        if not problem:
            raise
        raise OSError(problem.errno or errno.EIO, problem.strerror or str(problem), path) from None


def lock(file):
    """Lock an open file against other processes until it is closed. Returns whether it is locked, False on a file
    system without locks. BlockingIOError where another process has locked it."""
    if not fcntl:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(errno.EAGAIN, "another process has locked it", file.name) from None
        return False


@contextlib.contextmanager
def claimed(path):
    """In this context no other run, on any machine that shares the folder, may write path. ValueError where one is."""
    with open(path + ".lock", "w") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise ValueError(f"another run is writing {path}; wait until it ends, or give this one another --out") \
                from None
        try:
            yield
        finally:
            os.remove(path + ".lock")


def sentence(problem):
    """What an exception says; of an OSError the path first."""
    path, why = (getattr(problem, name, None) for name in ("filename", "strerror"))
    return f"{os.fsdecode(path)}: {why}" if isinstance(path, (str, bytes)) and why else str(problem)


def read_checkpoint(path):
    """The dict in a checkpoint. ValueError where there is none, where it is damaged, or where a number in it is not
    finite."""
    previous = f"; {path}.previous is the one before it" if os.path.isfile(f"{path}.previous") else ""
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}{previous}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as problem:  # both fail in many ways on a file that is no checkpoint
        raise ValueError(f"{path} can't be read as a checkpoint ({type(problem).__name__}){previous}") from None
    if where := not_finite(checkpoint):
        raise ValueError(f"{path} holds numbers that are not finite ({where}){previous}")
    return name_layout(checkpoint)


def name_layout(checkpoint):
    """A checkpoint without SetTokenizer's former setting "layout": layouts other than "set" are checkpoint kinds."""
    for part in (checkpoint, checkpoint.get("tokenizer", {})):
        layout = part.get("model_config", {}).pop("layout", "set")
        if layout != "set":
            part["kind"] = f"{layout} tokenizer"
    return checkpoint


def not_finite(thing, name=""):
    """The name of the first number, or tensor with one, that is NaN or infinite in nested dicts and lists; "" where
    there is none."""
    if isinstance(thing, (dict, list, tuple)):
        parts = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return next(filter(None, (not_finite(part, f"{name} {key}".strip()) for key, part in parts)), "")
    finite = thing.isfinite().all() if torch.is_tensor(thing) else not isinstance(thing, float) or math.isfinite(thing)
    return "" if finite else name
