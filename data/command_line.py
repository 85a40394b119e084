"""What a script starts with: the options of its command line, the environment variables of torchrun, its memory."""
import argparse
import ctypes
import os
import sys


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the list of all options."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | settings)
        self.register("type", int, whole_number)
        if hasattr(sys.stdout, "reconfigure"):  # what can't be printed, such as names of files that are no text
            sys.stdout.reconfigure(errors="backslashreplace")

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def whole_number(text):
    """An int that PyTorch's 64 bits hold."""
    if abs(number := int(text)) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} must be less than 2^63, about 9e18")
    return number


def yes_or_no(text):
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def launched():
    """This process's LOCAL_RANK where torchrun started it, None where it is alone. ValueError where it is neither."""
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        rank, world_size, local_rank, _ = (int(os.environ[name]) for name in
                                           ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        problem = not 0 <= rank < world_size and f"RANK {rank} of WORLD_SIZE {world_size}"
        os.environ["MASTER_ADDR"]
    except KeyError as missing:
        problem = f"{missing.args[0]} is missing"
    except ValueError as wrong:
        problem = wrong
    if problem:
        raise ValueError(f"the environment variables of torchrun are incomplete or wrong ({problem}); start with "
                         "torchrun, or unset RANK and WORLD_SIZE for a single process")
    return local_rank


def listed(names, first=3):
    """The first three names as text, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return (", ".join(names[:first]) or "nothing") + more


def keep_freed_memory():
    """Have glibc keep the memory that PyTorch frees. By default it returns large blocks to the system, and the page
    faults of the next step's tensors take up to a tenth of the digits' training. Not for other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: blocks of any size come from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
