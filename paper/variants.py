"""What the tables share: models with other settings than the digits' own, trained once and kept, and their digits FID.

A variant is a run of train_tokenizer.py or train_fsdd.py with some options. Its checkpoint lies in FOLDER under a name
made of those options and a hash of all settings, so that a second run finds it, and changed defaults give a new one. A
run that was interrupted resumes. After a change to the code of a model or of its training, remove the folder.
"""
import hashlib
import os

import evaluate_fid
import train_fsdd
import train_tokenizer
from support.command_line import parse
from support.files import load_checkpoint, read_json, write_json
from tokenizer import SetTokenizer

FOLDER = "paper/cache"
CLASSIFIER = "digits_classifier.pt"  # one for all tables, in the folder of tokenizer.pt and fsdd.pt
NOT_THE_MODEL = {"recipe", "resume", "device", "workers", "out", "tokenizer", "tokens", "log_every",
                 "save_every", "picture_every"}  # settings that a trained model does not depend on


def tokenizer(model_class=SetTokenizer, kind="tokenizer", **options):
    """The path of a tokenizer of the digits, trained with options of train_tokenizer.py unless it exists already.

    model_class, kind: see train_tokenizer.main().
    """
    return trained(train_tokenizer, kind, options, options, model_class, kind)


def fsdd(tokenizer_path, **options):
    """The path of a denoiser of a tokenizer's sets, trained with options of train_fsdd.py unless it exists already."""
    files = {"tokenizer": tokenizer_path, "tokens": tokens_of(tokenizer_path)}
    return trained(train_fsdd, "fsdd", options | files, {"of": digest(tokenizer_path)} | options)


def tokens_of(tokenizer_path):
    """Where the training set encoded by a tokenizer is kept."""
    return f"{FOLDER}/tokens-{digest(tokenizer_path)}.npy"


def digest(path):
    """Eight letters that identify the content of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:8]


def settings_digest(settings):
    """Eight letters that identify the settings that a model depends on."""
    settings = sorted((name, value) for name, value in settings.items() if name not in NOT_THE_MODEL)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def trained(script, kind, options, named, *more):
    """The path of what a training script makes with options.

    named: the options that the name shows.  more: further arguments of the script's main().
    """
    os.makedirs(FOLDER, exist_ok=True)
    arguments = ["--recipe=digits", *(f"--{name}={value}" for name, value in options.items())]
    cfg, _ = parse(script.HYPERPARAMETERS, "", kind, arguments)
    shown = [f"{name}{value}" for name, value in named.items() if name not in NOT_THE_MODEL]
    path = f"{FOLDER}/{'-'.join([*kind.split(), *shown, settings_digest(vars(cfg) | named)])}.pt"
    if os.path.isfile(path):
        if load_checkpoint(path, "the same command, with the file removed", kind)["step"] == cfg.steps:
            return path
        arguments.append("--resume")
    script.main([*arguments, f"--out={path}", "--picture_every=0"], *more)
    return path


def digits_fid(checkpoint, device, **options):
    """The digits FID of a tokenizer's reconstructions or of a denoiser's samples. That of a variant is kept in a file
    next to it."""
    def measure():
        given = [f"--{name}={value}" for name, value in options.items()]
        args = evaluate_fid.parse([f"--ckpt={checkpoint}", f"--classifier={CLASSIFIER}", f"--device={device.type}",
                                   *given])
        return evaluate_fid.evaluate(args, device)["digits_fid"]

    key = " ".join(f"{name}={value}" for name, value in options.items())
    return keep(f"{checkpoint}.json", key, measure) if os.path.dirname(checkpoint) == FOLDER else measure()


def keep(path, key, measure):
    """What a JSON file has under key; otherwise what measure() returns, which is added to the file."""
    result = read_json(path).get(key)
    if result is None:
        result = measure()
        write_json(read_json(path) | {key: result}, path)
    return result
