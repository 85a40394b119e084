"""Command lines: options from a table of hyperparameters, checked against it, and error messages of one sentence."""
import argparse
import os
import sys
from types import SimpleNamespace

from support.distributed import is_main
from support.files import check_outputs, load_checkpoint

RECIPES = ("digits", "emoji", "imagenet256")  # the columns of the tables HYPERPARAMETERS, which need them all
HARDWARE = [  # rows of HYPERPARAMETERS that both trainings have: what they run on, how often they log, save and draw
    # name               digits    emoji    imagenet256     allowed           meaning
    ("seed",             0,        0,       0,              "[0, inf)",       "all random numbers depend on it"),
    ("device",           "auto",   "auto",  "auto",         "",               "auto, cpu, cuda"),
    ("bf16",             "auto",   "auto",  "auto",         "auto | on | off", "bfloat16; auto: where it is fast"),
    ("compile",          False,    False,   True,           "",               "torch.compile"),
    ("workers",          0,        0,       8,              "[0, inf)",       "processes of a rank that read images"),
    ("log_every",        20,       20,      100,            "[1, inf)",       "steps between lines of the log"),
    ("save_every",       500,      500,     5000,           "[1, inf)",       "steps between checkpoints"),
    ("picture_every",    1000,     5000,    5000,           "[0, inf)",       "steps between pictures, 0 = none"),
]


def stop(sentence):
    """Exit with one sentence on standard error and the exit code 1."""
    sys.exit("error: " + sentence)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the list of all options."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | settings)
        if hasattr(sys.stdout, "reconfigure"):  # for file names that cannot be printed
            sys.stdout.reconfigure(errors="backslashreplace")

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def parse_as(kind, allowed):
    """A type for argparse: text -> a value of this kind: int, float, str or bool. allowed: the values that are
    accepted: an interval such as "[0, 1)" for numbers, all words such as "on | off", or "" for any value."""
    def convert(text):
        if kind is bool:
            if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
                raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
            return text.lower() in ("true", "yes", "1")
        value = kind(text)
        if allowed[:1] in ("[", "("):
            low, high = (min(float(end), 2 ** 63) for end in allowed[1:-1].split(","))  # the limit of PyTorch's int64
            if not low <= value <= high or value == low and allowed[0] == "(" or value == high and allowed[-1] == ")":
                raise argparse.ArgumentTypeError(f"must lie in {allowed.replace('inf', '2^63')}, got {text}")
        elif allowed and value not in allowed.split(" | "):
            raise argparse.ArgumentTypeError(f"must be one of {allowed.replace(' |', ',')}, got {text!r}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type if a text is not a number
    return convert


def parse(table, description, kind, argv=None, prog=None, may_change=()):
    """Read the settings of a script from its table HYPERPARAMETERS and its command line.

    A row (name, a value for each recipe, allowed, meaning) defines an option --name; for allowed see parse_as().
    kind: the kind of checkpoint that the script trains and --resume reads; None: there is no option --resume.
    may_change: settings that may change with --resume, besides those of HARDWARE other than the seed.
    Returns the settings, a namespace, and the checkpoint to resume or None.
    """
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--recipe", choices=RECIPES, help="which column of the table")
    if kind:
        parser.add_argument("--resume", action="store_true", help="resume the checkpoint at --out, with its settings")
    for name, *values, allowed, meaning in table:
        defaults = ", ".join(f"{recipe}: {value}" for recipe, value in zip(RECIPES, values))
        choices = f" {{{allowed}}}" if "|" in allowed else ""
        parser.add_argument("--" + name, type=parse_as(type(values[0]), allowed),
                            metavar=type(values[0]).__name__.upper(),
                            help=f"{meaning}{choices} ({defaults})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    fixed = {row[0] for row in table} - {row[0] for row in HARDWARE[1:]} - {*may_change} | {"recipe"}
    recipe, why = given.get("recipe"), "as given"
    if recipe is None:
        found = os.path.isdir("data/imagenet/train")
        recipe = "imagenet256" if found else "digits"
        why = f"data/imagenet/train {'exists' if found else 'does not exist'}"
    settings = {"recipe": recipe, "resume": False} | {row[0]: row[1 + RECIPES.index(recipe)] for row in table}
    out, resume = given.get("out", settings["out"]), "resume" in given
    restarted = kind and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.path.isfile(out)  # by torchrun
    checkpoint = load_checkpoint(out, "the same command without --resume", kind) if resume or restarted else None
    if restarted and not resume:  # it continues, unless it had not yet saved and this is another training's checkpoint
        config, wanted = checkpoint.get("config", {}), settings | given
        same = (config.get(name) == wanted[name] for name in fixed | {"steps"})
        checkpoint = checkpoint if all(same) else None
    if checkpoint:
        if missing := [name for name in ("training", "step", "config", "images") if name not in checkpoint]:
            stop(f"{out} has no {missing[0]}, so --resume can't continue from it (imported weights have none)")
        settings, why = settings | checkpoint["config"], f"as in {out}"
        for name, value in given.items():
            if name in fixed and value != settings.get(name):
                stop(f"--{name} {value} can't change with --resume: {out} was trained with {settings.get(name)}")
    settings |= given | {"out": out}
    if checkpoint and settings["steps"] < checkpoint["step"]:
        parser.error(f"--steps must be at least {checkpoint['step']}, the step of {out}, got {settings['steps']}")
    if kind and not settings["out"].endswith(".pt"):  # log and picture: the same name with other suffixes
        parser.error(f"--out must end in .pt, got {settings['out']}")
    others = [out[:-3] + ".csv", out[:-3] + ".png"] if kind else []
    check_outputs(out, *others, inputs=[settings.get("tokenizer")])
    if is_main():
        print(f"recipe {settings['recipe']}: {why}", flush=True)
    return SimpleNamespace(**settings), checkpoint


def list_first(names, first=3):
    """The first names as text, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return (", ".join(names[:first]) or "nothing") + more
