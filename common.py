"""What the scripts share: command line, process group, random generators, optimizers, checkpoints."""
import argparse
import gc
import math
import multiprocessing
import os
import re
import signal
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import files
from data.command_line import Parser, keep_freed_memory, launched, yes_or_no

RECIPES = ("digits", "imagenet256")  # columns of the tables HYPERPARAMETERS; another one needs its name here
MAY_CHANGE = ("steps", "device", "device_batch", "bf16", "tf32", "compile", "fused_attention", "recompute", "workers",
              "out", "data", "vqgan", "convnext", "tokens",  # other paths to the same files
              "log_every", "save_every", "picture_every")  # settings that may be given anew with --resume
BEFORE = dict(denoiser="dense", loss_codes=3, code_start="zeros", times="uniform", sampler="paper", gelu="tanh",
              unquantized=0.0)  # in old checkpoints
MACHINE = [  # rows of HYPERPARAMETERS that both trainings have: what they run on, how often they log, save and draw
    # name               digits          imagenet256      meaning
    ("seed",             0,              0,               "all random numbers depend on it"),
    ("device",           "auto",         "auto",          "auto, cpu, cuda"),
    ("bf16",             "auto",         "auto",          "bfloat16 autocast: on, off, auto = where it is fast"),
    ("tf32",             True,           True,            "float32 products in TF32, on GPUs that have it"),
    ("compile",          False,          True,            "torch.compile"),
    ("fused_adamw",      True,           True,            "PyTorch's fused AdamW"),
    ("fused_attention",  "auto",         "auto",          "flash attention: on, off, auto = on GPUs, many keys"),
    ("recompute",        False,          False,           "activation checkpointing: less memory, a third more time"),
    ("workers",          0,              8,               "processes that read images, for each training process"),
    ("log_every",        20,             100,             "steps between lines of the log"),
    ("save_every",       500,            5000,            "steps between checkpoints"),
    ("picture_every",    500,            5000,            "steps between pictures"),
]


def parse(table, description, kind, argv=None, prog=None):
    """(Settings from a table HYPERPARAMETERS and the command line, a namespace; the checkpoint to resume or None).
    A row (name, a value for each recipe, meaning) gives an option --name. kind: the checkpoint's; None: no --resume."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--recipe", choices=RECIPES, help="which column of the table")
    if kind:
        parser.add_argument("--resume", action="store_true", help="resume the checkpoint at --out, with its settings")
    for name, *values, meaning in table:
        assert len(values) == len(RECIPES), f"the row {name} needs a value for each of {RECIPES}"
        kind_of_value, each = type(values[0]), ", ".join(f"{recipe}: {value}" for recipe, value in zip(RECIPES, values))
        parser.add_argument("--" + name, type=yes_or_no if kind_of_value is bool else kind_of_value,
                            metavar=kind_of_value.__name__.upper(), help=f"{meaning} ({each})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    recipe, why = given.get("recipe"), "as asked for"
    if recipe is None:
        found = os.path.isdir("data/imagenet/train")
        recipe, why = RECIPES[found], f"data/imagenet/train is {'there' if found else 'not there'}"
    settings = {"recipe": recipe, "resume": False} | {row[0]: row[1 + RECIPES.index(recipe)] for row in table}
    checkpoint = None
    if given.get("resume"):
        out = given.get("out", settings["out"])
        checkpoint = load_checkpoint(out, "the same command without --resume", kind)
        if "config" not in checkpoint:
            stop(f"{out} holds weights without a training state (imported weights have none); leave out --resume")
        settings, why = settings | BEFORE | checkpoint["config"], f"as in {out}"
        for name in given.keys() - {"resume", *MAY_CHANGE}:
            if given[name] != settings.get(name):
                stop(f"--{name} {given[name]} can't change with --resume: {out} was trained with {settings.get(name)}")
    settings |= given
    check_settings(parser, table, settings, checkpoint)
    if kind and settings["out"].endswith((".csv", ".png", ".json", ".npy")):  # what else a training writes
        parser.error(f"--out is the checkpoint and should end in .pt, got {settings['out']}")
    if is_main():
        print(f"recipe {settings['recipe']}: {why}", flush=True)
    return SimpleNamespace(**settings), checkpoint


def check_settings(parser, table, settings, checkpoint):
    """Exit with one sentence where a setting is out of range, before any work is done."""
    for name, *values, _ in table:  # what is positive in both recipes must be positive, and no number may be negative
        if isinstance(values[0], (int, float)) and not isinstance(values[0], bool):
            least = 1 if isinstance(values[0], int) and min(values) >= 1 else 0
            if not least <= settings[name] < math.inf or min(values) > 0 and not settings[name]:
                parser.error(f"--{name} must be {'at least 1' if least else 'positive'}, got {settings[name]}")
        if isinstance(values[0], str) and all(values) and not settings[name]:  # what neither recipe leaves empty
            parser.error(f"--{name} must not be empty")
    for name in settings.keys() & {"ema", "beta2", "proxy_beta2", "lecam_ema"}:
        if settings[name] >= 1:
            parser.error(f"--{name} must be less than 1, got {settings[name]}")
    for name in settings.keys() & {"unquantized", "label_drop", "revive_until"}:
        if settings[name] > 1:
            parser.error(f"--{name} must be at most 1, got {settings[name]}")
    optimizer, muon_lr = settings["optimizer"], settings["muon_lr"]
    if optimizer not in ("adamw", "muon") or optimizer == "muon" and not muon_lr:
        parser.error(f"--optimizer must be adamw, or muon with a --muon_lr, got {optimizer} with {muon_lr}")
    if checkpoint and settings["steps"] < (step := checkpoint["step"]):
        parser.error(f"--steps must be at least {step}, the step of {settings['out']}, got {settings['steps']}")
    switch, start = ("auto", "on", "off"), ("zeros", "codebook")
    for name, choices in dict(bf16=switch, fused_attention=switch, gelu=("tanh", "none"), code_start=start).items():
        if settings.get(name, choices[0]) not in choices:
            parser.error(f"--{name} must be one of {', '.join(choices)}, got {settings[name]}")
    check_output(settings["out"], *(os.path.splitext(settings["out"])[0] + suffix for suffix in (".csv", ".png")))


def guidance_weights(text):
    """ "4" -> [4.0], "2,6" -> [2.0, 6.0], "4,50,55" -> [4.0, 50.0, 55.0]; ValueError for anything else."""
    if isinstance(text, list):
        return text
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2, 3) or not all(0 <= number <= 1e6 for number in numbers):
        raise ValueError(f"guidance must be one to three numbers from 0 to 1e6, such as 4; 2,6; 4,50,55; got {text!r}")
    return numbers


def stop(sentence):
    """Exit with one sentence on standard error and the exit code 1."""
    sys.exit("error: " + sentence)


# --- process group, devices, random generators -----------------------------------------------------------------------
def init_distributed(device, tf32=True):
    """Join the process group where torchrun started this process. device: text. Returns (device, rank, world size)."""
    gpus = torch.cuda.device_count()
    device = ("cuda" if gpus else "cpu") if device == "auto" else device
    if not re.fullmatch("cpu|cuda(:[1-9]?[0-9])?", device):
        stop(f"--device must be auto, cpu, cuda or cuda:N, got {device}")
    try:
        device, local_rank = torch.device(device), launched()
    except ValueError as problem:
        stop(str(problem))
    on_gpu = device.type == "cuda"
    set_tf32(tf32)
    keep_freed_memory()
    if on_gpu and (device.index or 0) >= gpus:
        stop(f"--device {device} was asked for, but PyTorch sees {gpus} GPUs; use --device cpu")
    if local_rank is not None:
        if on_gpu and (device.index is not None or local_rank >= gpus):
            stop(f"each process needs its own GPU; give torchrun --nproc_per_node at most {gpus}, and --device cuda")
        if on_gpu:
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        except (RuntimeError, ValueError) as problem:
            stop(f"no process group at MASTER_ADDR, MASTER_PORT can be joined ({str(problem).splitlines()[0]})")
    return device, *rank_and_world_size()


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this is rank 0, which prints and writes (known before the process group exists)."""
    return os.environ.get("RANK", "0") == "0"


def set_tf32(on):
    """Whether GPUs that have TF32 use it for float32 products."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def run(main):
    """Run a script's main(), then leave the process group, after all DDP models: one that outlives it may abort."""
    code = 0
    try:
        main()
    except StoppedBySignal as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        stop("interrupted")
    except OSError as problem:  # of a disk, for one
        stop(files.sentence(problem))
    except (MemoryError, RuntimeError) as problem:
        if "memory" not in str(problem):
            raise
        stop(f"out of memory: {str(problem).splitlines()[0]}; take a smaller model, or fewer images at once")
    finally:  # the data loader's workers ignore SIGTERM (data/reading.py), by which Python would end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(code)


class StoppedBySignal(SystemExit):
    """Raised on all ranks after the same step, with the exit code 128 + the signal's number."""


class Signals:
    """In this context SIGTERM and SIGINT (Ctrl-C) are only recorded, so that the training loop can save first."""

    def __enter__(self):
        self.number = 0
        self.handlers = {number: signal.signal(number, self.record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def record(self, number, frame):
        self.number = number

    def received(self):
        """Whether any rank has received a signal; the same answer on all ranks."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.agreed = number.item()
        return self.agreed > 0

    def exit_if_received(self, path, option="--resume"):
        """End the training, saved at path, where received() found a signal."""
        if self.agreed and is_main():
            name = signal.Signals(self.agreed).name
            print(f"\nstopped by {name}; {path} is saved, {option} continues from it", file=sys.stderr, flush=True)
        if self.agreed:
            raise StoppedBySignal(128 + self.agreed)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def autocast(device, bf16):
    """Automatic mixed precision in bfloat16: "on", "off", or "auto", on where the hardware multiplies bfloat16 fast."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else any(
        torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 == "on" or bf16 == "auto" and fast)


def generator(device, purpose, *key):
    """A random generator whose seed depends on purpose, a word, and key, numbers such as (seed, step), only."""
    seed = np.random.SeedSequence([zlib.crc32(purpose.encode()), len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) >> 1)


def all_reduce(tensor):
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(thing):
    """Every rank's thing, anything that pickle takes, as a list in the order of ranks."""
    things = [thing] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def on_every_rank(work, *args, **settings):
    """work(...) on every rank. Where it fails on one, all raise ValueError, so that none waits for another forever."""
    result, problem = None, ""
    try:
        result = work(*args, **settings)
    except (ValueError, OSError) as error:
        problem = files.sentence(error)
    problem = next(filter(None, all_gather(problem)), "")
    if problem:
        raise ValueError(problem)
    return result


def shard(total, rank, world_size):
    """This rank's rows of total: a slice; the slices of all ranks cover them in order, without overlap."""
    return slice(total * rank // world_size, total * (rank + 1) // world_size)


def shares(batch_size, device_batch):
    """(this rank's rows of a global batch, a slice; those rows in micro-batches, slices from 0 on; the world size)."""
    rank, world_size = rank_and_world_size()
    rows = shard(batch_size, rank, world_size)
    return rows, chunks(slice(0, rows.stop - rows.start), device_batch), world_size


def chunks(rows, size):
    """Cut a slice into slices of at most size rows, such as the micro-batches of gradient accumulation."""
    return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]


def make_optimizers(model, cfg, steps, warmup, beta2, decay_all=False):
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest, each with linear warm-up and cosine decay over
    steps: [(optimizer, schedule), ...]. Weight decay is not for norms, biases and embeddings, except with decay_all."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = {m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    muon = {name: w for name, w in trained.items() if "blocks." in name and w.ndim == 2 and cfg.optimizer == "muon"}
    adamw = [weight for name, weight in trained.items() if name not in muon]
    decay, rest = [w for w in adamw if w in matrices], [w for w in adamw if w not in matrices]
    wd, groups = cfg.weight_decay, [{"params": decay}, {"params": rest, "weight_decay": cfg.weight_decay * decay_all}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, beta2), fused=cfg.fused_adamw, weight_decay=wd)]
    if muon:
        optimizers += [torch.optim.Muon(muon.values(), lr=cfg.muon_lr, weight_decay=wd, adjust_lr_fn="match_rms_adamw")]

    def factor(step):  # the cosine counts the warm-up's steps too
        cosine = (1 + math.cos(math.pi * min(1.0, step / steps))) / 2
        return min(1.0, (step + 1) / max(1, warmup)) * (cfg.lr_end + (1 - cfg.lr_end) * cosine)

    return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)) for optimizer in optimizers]


def set_switches(model, cfg):
    """Set fused attention and activation checkpointing (recompute) in all parts of a model."""
    for module in model.modules():
        for name in ("fused_attention", "recompute"):
            if hasattr(module, name):
                setattr(module, name, getattr(cfg, name))


def parallel(model, device, cfg):
    """The model as the training loop calls it: compiled where asked for, in DDP where there is a process group."""
    model = torch.compile(model) if cfg.compile else model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids) if dist.is_initialized() else model


# --- checkpoints -----------------------------------------------------------------------------------------------------
def check_output(*paths):
    """Exit before any work where a file can't be written to one of the paths."""
    try:
        for path in filter(None, paths):
            files.check_output(path)
    except ValueError as problem:
        stop(str(problem))


def save_checkpoint(checkpoint, path):
    """Write a checkpoint so that a kill at any moment leaves the old file or the new one, whole."""
    with files.written(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path, made_by, *kinds):
    """Read a checkpoint; exits with one sentence where there is none, or one of another kind."""
    try:
        checkpoint = files.read_checkpoint(path)
    except ValueError as problem:
        stop(f"{problem}; make it with: {made_by}")
    if (kind := checkpoint.get("kind")) not in kinds:
        stop(f"{path} is not a {' or '.join(kinds)} checkpoint{f' but a {kind} checkpoint' if kind else ''}; "
             f"make it with: {made_by}")
    return checkpoint
