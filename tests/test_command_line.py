"""Options from the tables of hyperparameters, --resume, and errors of one sentence."""
import importlib
import os

import pytest

from support.command_line import parse, parse_as
from support.files import NEEDED, check_outputs, save_checkpoint

TABLE = [
    ("steps", 10, 20, 1000, "[1, inf)", "steps"), ("lr", 1e-3, 1e-3, 1e-4, "(0, inf)", "rate in %"),
    ("flip", False, True, True, "", "mirror"), ("ema", 0.9, 0.9, 0.9, "[0, 1)", "decay"),
    ("noise", True, True, True, "", "switch"), ("bf16", "auto", "auto", "auto", "auto | on | off", "bfloat16"),
    ("data", "digits", "emoji", "imagenet", "", "images"), ("out", "a.pt", "a.pt", "a.pt", "", "checkpoint"),
]


def settings(*argv):
    return resumed(*argv)[0]


def resumed(*argv, kind="fsdd"):
    """The settings, and the checkpoint to resume."""
    return parse(TABLE, "what it does", kind, argv, may_change=("steps", "data", "out"))


def test_recipe_chooses_the_column(tmp_path, capsys):
    """Fails if the digits are trained with ImageNet's settings or the reverse, or if the choice is not printed."""
    cfg = settings()
    assert (cfg.recipe, cfg.steps, cfg.flip) == ("digits", 10, False)
    assert "recipe digits: data/imagenet/train does not exist" in capsys.readouterr().out
    os.makedirs("data/imagenet")
    os.symlink(tmp_path, "data/imagenet/train")
    cfg = settings()
    assert (cfg.recipe, cfg.steps, cfg.flip) == ("imagenet256", 1000, True)
    assert "recipe imagenet256: data/imagenet/train exists" in capsys.readouterr().out
    assert [settings("--recipe", recipe).steps for recipe in ("digits", "emoji")] == [10, 20]


def test_values_have_the_types_of_the_table():
    """Fails if --key value and --key=value do not both work, or if a value has another type than in the table."""
    cfg = settings("--recipe=digits", "--steps", "7", "--lr=3e-4", "--flip", "true", "--out=b.pt", "--noise=No")
    assert (cfg.steps, cfg.lr, cfg.flip, cfg.out, cfg.noise, cfg.ema) == (7, 3e-4, True, "b.pt", False, 0.9)
    assert isinstance(cfg.lr, float) and isinstance(settings("--lr=1").lr, float)


@pytest.mark.parametrize("argument, words", [
    ("--stepz=7", "--stepz"), ("--step=7", "--step"), ("--steps=1.5", "--steps: invalid int value: '1.5'"),
    ("--flip=maybe", "--flip: must be true or false"), ("--steps=0", "--steps: must lie in [1, 2^63), got 0"),
    ("--bf16=maybe", "--bf16: must be one of auto, on, off, got 'maybe'"), ("--recipe=cifar", "--recipe"),
    ("--lr=1e30", "--lr: must lie in (0, 2^63), got 1e30"),
    ("--out=a.csv", "--out must end in .pt"), ("--out=", "--out must end in .pt")])
def test_wrong_options_get_one_sentence(argument, words, capsys):
    """Fails if a misspelt option or an invalid value is accepted, or ends in a traceback."""
    with pytest.raises(SystemExit) as stopped:
        settings(argument)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.startswith("error: ") and said.count("\n") == 1


def test_outputs_are_checked_before_the_work():
    """Fails if an output that can't be written is noticed only after hours of work."""
    os.mkdir("folder.pt")
    for path, words in (("none/a.pt", "there is no folder none"), ("folder.pt", "is a folder")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}"):
            settings(f"--out={path}")
    check_outputs(None, "good.pt", inputs=[None, "other.pt"])
    os.symlink("good.pt", "also_good.pt")
    with pytest.raises(SystemExit, match="error: good.pt is read by this command"):
        check_outputs("good.pt", inputs=["also_good.pt"])
    open("a.csv", "w").close()  # which is written next to a.pt
    os.chmod("a.csv", 0o444)
    with pytest.raises(SystemExit, match="error: a.csv can't be written: permission denied"):
        settings("--out=a.pt")


def test_help_names_every_option(capsys):
    """Fails if --help lacks a row of the table, its recipes or its allowed words, or ends in an error of argparse,
    which takes % for a format."""
    with pytest.raises(SystemExit) as stopped:
        settings("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "what it does" in text and all("--" + row[0] in text for row in TABLE)
    assert "rate in % (digits: 0.001, emoji: 0.001, imagenet256: 0.0001)" in text
    assert "bfloat16 {auto | on | off}" in text


def test_resume_takes_the_settings_of_the_checkpoint(capsys):
    """Fails if a resumed run trains with other settings than the run that it continues."""
    config = {"recipe": "digits", "resume": False, "steps": 50, "lr": 0.5, "flip": True, "ema": 0.9, "noise": True,
              "bf16": "off", "data": "digits", "out": "old.pt"}
    complete = dict.fromkeys(NEEDED["fsdd"], 0) | {"kind": "fsdd", "images": ""}
    checkpoint = complete | {"step": 50, "config": config, "training": {}}
    save_checkpoint(checkpoint, "b.pt")
    cfg, found = resumed("--resume", "--out=b.pt", "--steps=60", "--lr=0.5", "--data=moved")
    assert vars(cfg) == config | {"resume": True, "steps": 60, "out": "b.pt", "data": "moved"} and found == checkpoint
    for argument, words in (("--lr=0.1", "--lr 0.1 can't change with --resume: b.pt was trained with 0.5"),
                            ("--steps=49", "--steps must be at least 50, the step of b.pt, got 49"),
                            ("--out=none.pt", "there is no checkpoint none.pt")):
        with pytest.raises(SystemExit) as stopped:
            settings("--resume", "--out=b.pt", argument)
        assert words in f"{stopped.value.code} {capsys.readouterr().err}"
    with pytest.raises(SystemExit, match="is not a tokenizer checkpoint but a fsdd checkpoint"):
        resumed("--resume", "--out=b.pt", kind="tokenizer")
    for missing in ("training", "step", "images"):  # such as imported weights
        save_checkpoint({name: value for name, value in checkpoint.items() if name != missing}, "stripped.pt")
        with pytest.raises(SystemExit, match=f"stripped.pt has no {missing}, so --resume can't continue from it"):
            settings("--resume", "--out=stripped.pt")


def test_a_restart_by_torchrun_continues(monkeypatch):
    """Fails if torchrun --max_restarts starts a training anew, or continues that of an earlier run at the same path."""
    complete = dict.fromkeys(NEEDED["fsdd"], 0) | {"kind": "fsdd", "images": "", "training": {}, "step": 7}
    save_checkpoint(complete | {"config": vars(settings("--lr=0.5"))}, "a.pt")
    assert resumed("--lr=0.5")[1] is None  # not restarted
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for arguments, step in ((["--lr=0.5"], 7), (["--lr=0.5", "--bf16=on"], 7), (["--lr=0.1"], None),
                            (["--lr=0.5", "--steps=9"], None), (["--lr=0.5", "--out=b.pt"], None)):
        cfg, checkpoint = resumed(*arguments)
        assert (checkpoint and checkpoint["step"]) == step and cfg.lr == float(arguments[0][5:])
    save_checkpoint(complete | {"config": vars(settings("--lr=0.5"))}, "a.pt")
    assert resumed("--lr=0.5")[1]  # a second restart


@pytest.mark.parametrize("interval, inside, outside", [
    ("[0, 1)", (0, 0.5), (-0.1, 1, float("nan"))), ("(0, 1]", (0.5, 1), (0, 1.5)),
    ("[1, inf)", (1, 2 ** 63 - 1), (0, 2 ** 63, float("inf")))])
def test_intervals(interval, inside, outside):
    """Fails if a number outside the interval is accepted, such as one that does not fit into 64 bits, or if one inside
    is refused."""
    for value in inside:
        assert parse_as(type(value), interval)(str(value)) == value
    for value in outside:
        with pytest.raises(Exception, match=f"must lie in .*{interval[1:-1].replace('inf', '2.63')}"):
            parse_as(type(value), interval)(str(value))


@pytest.mark.parametrize("module", ["train_tokenizer", "train_fsdd"])
def test_defaults_are_allowed(module):
    """Fails if a script refuses its own default."""
    for name, *values, allowed, _ in importlib.import_module(module).HYPERPARAMETERS:
        for value in values:
            assert parse_as(type(values[0]), allowed)(str(value)) == value, name
