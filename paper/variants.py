"""What the tables share: models with other settings than the digits' own, trained once and kept; their FID.

A variant is a run of train_tokenizer.py or train_fsdd.py with some options. Its checkpoint stands in FOLDER under a
name made of those options and a hash of all settings, so that a second run finds it, and changed defaults make a new
one. A run that was cut off goes on where it was. Whoever changes the code of a model or of its training removes the
folder.
"""
import hashlib
import os

import torch.distributed as dist

import common
import evaluate_fid
import train_fsdd
import train_tokenizer
from data import digits_classifier, records
from tokenizer import SetTokenizer

FOLDER = "paper/cache"
CLASSIFIER = digits_classifier.FILE  # one for all tables, which evaluate_fid.py keeps beside tokenizer.pt and fsdd.pt
NO_MATTER = {"recipe", "resume", "device", "tf32", "workers", "out", "tokenizer", "tokens", "log_every", "save_every",
             "picture_every"}  # settings that change where a variant is trained and what is told, not what it is


def tokenizer(model_class=SetTokenizer, kind="tokenizer", **options):
    """The path of a digits' tokenizer trained with options of train_tokenizer.py, trained now if it is not there.

    model_class, kind: see train_tokenizer.main().
    """
    return trained(train_tokenizer, kind, options, options, model_class, kind)


def fsdd(tokenizer_path, **options):
    """The path of a digits' denoiser of a tokenizer's sets, trained with options of train_fsdd.py, as tokenizer()."""
    places = {"tokenizer": tokenizer_path, "tokens": tokens_of(tokenizer_path)}
    return trained(train_fsdd, "fsdd", options | places, {"of": digest(tokenizer_path)} | options)


def make_folder():
    """Make FOLDER; ValueError where that can't be."""
    try:
        os.makedirs(FOLDER, exist_ok=True)
    except OSError as problem:
        raise ValueError(f"the folder {FOLDER}, which trained models are kept in, can't be made ({problem})") from None


def tokens_of(tokenizer_path):
    """Where the training set encoded by a tokenizer is kept."""
    return f"{FOLDER}/tokens-{digest(tokenizer_path)}.npy"


def digest(path):
    """Eight letters that tell a file from others."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:8]


def mark(settings):
    """Eight letters that tell settings from others."""
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]


def trained(script, kind, options, named, *more):
    """The path of what a training script makes with options.

    named: the options that the name shows.  more: further arguments of the script's main().
    """
    if dist.is_initialized():
        raise ValueError("what is trained on the digits here is trained by one process; leave out torchrun")
    make_folder()
    arguments = ["--recipe=digits", *(f"--{name}={value}" for name, value in options.items())]
    cfg, _ = common.parse(script.HYPERPARAMETERS, "", kind, arguments)
    settings = {name: value for name, value in (vars(cfg) | named).items() if name not in NO_MATTER}
    shown = [f"{name}{value}" for name, value in named.items() if name in settings]
    path = f"{FOLDER}/{'-'.join([*kind.split(), *shown, mark(settings)])}.pt"
    if os.path.isfile(path):
        if common.load_checkpoint(path, "the same command, with the file removed", kind)["step"] == cfg.steps:
            return path
        arguments.append("--resume")
    script.main([*arguments, f"--out={path}", f"--picture_every={cfg.steps}"], *more)
    return path


def fid(checkpoint, device, rank=0, processes=1, **options):
    """rFID of a tokenizer's checkpoint or gFID of a denoiser's, as evaluate_fid.py measures it with options; on the
    digits, digits FID. Only rank 0 knows it. What was measured of a variant is kept beside it. ValueError as
    there."""
    options = [f"--{name}={value}" for name, value in options.items() if value is not None]
    key = " ".join(options)
    kept = f"{checkpoint}.json" if os.path.dirname(checkpoint) == FOLDER else ""
    known = common.all_gather(records.read_json(kept))[0]
    if key not in known:
        common.set_tf32(False)
        args = evaluate_fid.parse([f"--ckpt={checkpoint}", f"--classifier={CLASSIFIER}", f"--device={device.type}",
                                   *options])
        results = evaluate_fid.evaluate(args, device, rank, processes)
        if rank == 0:
            known[key] = results.get("digits_fid", results.get("fid"))
            if kept:
                records.write_json(known, kept)
    return known.get(key)


def number(value):
    """An FID as the tables show it; None, where nothing was measured, as a dash."""
    return "-" if value is None else f"{value:.1f}"


def add_options(parser, num):
    """The options that every table of FIDs has."""
    parser.add_argument("--data", help="digits, or a folder with train/ and val/ (what the checkpoint was trained on)")
    parser.add_argument("--ref", help="what samples are compared with, see evaluate_fid.py (the training digits)")
    parser.add_argument("--inception", help="file of Inception's weights (downloaded to torch's cache)")
    parser.add_argument("--num", "--num_images", type=int,
                        help=f"images to generate (digits: {num}); under torchrun write --num_images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")


def check_options(parser, args):
    """args; ends with one sentence where a number is too small, before anything is trained."""
    for name, least in (("num", 2), ("steps", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args
