"""How a checkpoint becomes images: the samplers and what they need, by name, their settings, and the models.

sample.py, evaluate_fid.py, train_fsdd.py and the scripts of paper/ use these to generate images.
"""
import os

import torch

from beyond import (SparseDenoiser, all_hidden, exchange_step, exchange_times, guidance_ramp, hide_tokens,
                    likely_probabilities, reveal_step)
from fsdd import Denoiser, forward_process, paper_step, sample_noise, uniform_times
from support.command_line import checked
from support.files import load_checkpoint
from support.pictures import to_uint8
from tokenizer import SetTokenizer

# Settings of fsdd.refine(), for the pictures during training and as options of all scripts that generate. To add one,
# add a parameter to refine() and a row here; to add a sampler, an entry of SAMPLERS and its name in the first row.
GENERATION = [
    # name               digits    emoji    imagenet256   allowed                meaning
    ("sampler",          "reveal", "paper", "paper",      "paper | exchange | reveal", "Eq. 9-10, or beyond.py's"),
    ("sample_steps",     16,       25,      25,           "[1, inf)",            "steps from noise to data"),
    ("guidance",         "2.5",    "4,8,8", "4,50,55",    "",                    "one weight, thirds A,B,C, ramp A:B"),
    ("top_p",            1.0,      1.0,     0.8,          "(0, 1]",              "keep the most probable counts"),
    ("top_k",            0,        2,       0,            "[0, inf)",            "keep so many counts, 0 = all"),
]
SAMPLERS = {  # the arguments of refine() that make it use a sampler
    "paper": {"step": paper_step, "times": uniform_times},
    "exchange": {"step": exchange_step, "times": exchange_times},
    "reveal": {"noise": all_hidden, "predict": likely_probabilities, "step": reveal_step},  # for the prior hidden
}
PROCESS = {  # what draws X_1 and X_t, by the prior
    "multinomial": (sample_noise, forward_process),  # the paper
    "distinct": (sample_noise, forward_process),     # the authors' release
    "hidden": (all_hidden, hide_tokens),             # beyond.py; the denoiser has one more code, the null code
}
DENOISERS = {"dense": Denoiser, "sparse": SparseDenoiser}


def add_generation_options(parser):
    """The options that generated images depend on, for every script that generates."""
    for name, value, *_, allowed, meaning in GENERATION:
        parser.add_argument("--" + name.removeprefix("sample_"), type=checked(type(value), allowed),
                            help=f"{meaning} (the checkpoint's)")
    parser.add_argument("--batch", type=checked(int, "[1, inf)"), default=100,
                        help="images at once (100); another number gives other images")
    parser.add_argument("--seed", type=checked(int, "[0, inf)"), default=0, help="another seed gives other images (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--bf16", default="auto", choices=("auto", "on", "off"),
                        help="bfloat16 autocast of the denoiser; auto: where it is fast (auto)")


def generation_settings(defaults, args):
    """The settings of refine() as a checkpoint has them, plain numbers and words; those of the command line come first.
    ValueError for a guidance that can't be read."""
    names = [name.removeprefix("sample_") for name, *_ in GENERATION]
    settings = defaults | {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    refine_arguments(settings)  # raises ValueError if they do not fit
    return settings


def refine_arguments(settings):
    """The keyword arguments of refine() for the settings of generation_settings(). ValueError if they do not fit."""
    if (settings["sampler"] == "reveal") != (settings["prior"] == "hidden"):
        raise ValueError(f"the sampler reveal and the prior hidden need each other, got sampler {settings['sampler']} "
                         f"and prior {settings['prior']}")
    arguments = settings | {"guidance": parse_guidance(settings["guidance"])} | SAMPLERS[settings["sampler"]]
    del arguments["sampler"]
    return arguments


def parse_guidance(text):
    """ "4" -> [4.0], "4,50,55" -> [4.0, 50.0, 55.0], "0.5:12" -> guidance_ramp(0.5, 12.0). ValueError for anything
    else."""
    try:
        weights = [float(weight) for weight in text.replace(":", ",").split(",")]
        if not all(0 <= weight <= 1e6 for weight in weights) or ":" in text and (len(weights) != 2 or "," in text):
            raise ValueError
    except ValueError:
        raise ValueError("guidance must be numbers from 0 to 1e6, such as 4, or 4,50,55 for the three thirds of the "
                         f"time, or 0.5:12 for a ramp; got {text!r}") from None
    return guidance_ramp(*weights) if ":" in text else weights


def choose_labels(text, num, class_names, at_most):
    """Labels (num,) int64 of the classes in text, numbers or names such as "0,cat": evenly spread, one class after the
    other.

    Without text: over all classes, or at_most of them. ValueError for what is no class.
    """
    every = len(class_names)
    numbers = {str(i): i for i in range(every)} | {name: i for i, name in enumerate(class_names)}  # names count first
    try:
        classes = [numbers[name.strip()] for name in text.split(",")] if text else range(0, every, -(-every // at_most))
    except KeyError:
        raise ValueError(f"--labels must be numbers from 0 to {every - 1} or names of classes, such as "
                         f"{class_names[0]}, separated by commas, got {text!r}") from None
    return torch.tensor(classes)[torch.arange(num) * len(classes) // num]


def default_checkpoint():
    """fsdd.pt of train_fsdd.py or, as long as there is none, digits.pt, which the repository contains."""
    return "fsdd.pt" if os.path.isfile("fsdd.pt") else "digits.pt"


def load(path, device):
    """fsdd.pt -> (denoiser, tokenizer, the whole checkpoint), both with their averaged weights, on the device."""
    checkpoint = load_checkpoint(path, "python train_fsdd.py", "fsdd")
    return *models(checkpoint, device), checkpoint


def models(checkpoint, device):
    """The denoiser and the tokenizer of a checkpoint of train_fsdd.py, for use."""
    denoiser = DENOISERS[checkpoint["denoiser"]](**checkpoint["model_config"])
    denoiser.load_state_dict(checkpoint["weights"])
    return denoiser.to(device).eval(), load_tokenizer(checkpoint["tokenizer"], device)


def load_tokenizer(checkpoint, device, model_class=SetTokenizer):
    """The tokenizer of a checkpoint of train_tokenizer.py, for use. model_class: see paper/layouts.py."""
    tokenizer = model_class(**checkpoint["model_config"])
    tokenizer.load_state_dict(checkpoint["weights"])
    return tokenizer.to(device).eval()


def decode(tokenizer, tokens):
    """Tokens (n, M) -> images (n, ch, H, W) uint8 on the CPU, about a million pixels at a time to bound the memory of
    MaskGIT-VQGAN."""
    at_once = max(1, 2 ** 20 // tokenizer.image_size ** 2)
    return torch.cat([to_uint8(tokenizer.decode(part)).cpu() for part in tokens.split(at_once)])
