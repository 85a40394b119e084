"""What both training scripts and sample.py share: command line, processes, random numbers, checkpoints, pictures."""
import argparse
import contextlib
import csv
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Command line


MAY_CHANGE = ("steps", "device", "device_batch", "bf16", "tf32", "compile", "fused_attention", "recompute", "workers", "out",
              "data", "vqgan", "convnext", "tokens",  # other places of the same
              "log_every", "save_every", "picture_every")  # settings that --resume may be given anew


BEFORE = {"times": "uniform", "sampler": "paper", "gelu": "tanh"}  # what checkpoints that don't know these settings were trained with


def parse(table, description, kind, argv=None, prog=None):
    """Settings from the table of hyperparameters at the top of a training script and from the command line.

    table: rows (name, value in the recipe digits, value in the recipe imagenet256, meaning). Every row is an option --name,
    its type that of its value. --recipe chooses the column; left out, it is imagenet256 where data/imagenet/train exists and
    digits elsewhere, and the first line printed says which and why. With --resume all settings are the checkpoint's.
    kind: of the checkpoint that the script writes, "tokenizer" or "fsdd"; None where there is no --resume.
    prog: how the script is called, where that is not its file's name.
    Returns (a SimpleNamespace with one attribute a row, recipe and resume; the checkpoint to go on from or None).
    """
    recipes = ("digits", "imagenet256")
    parser = Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=recipes, help="which column of the table")
    if kind:
        parser.add_argument("--resume", action="store_true", help="go on from the checkpoint at --out, with its settings")
    for name, digits, imagenet256, meaning in table:
        parser.add_argument("--" + name, type=yes_or_no if isinstance(digits, bool) else type(digits),
                            metavar=type(digits).__name__.upper(),
                            help=f"{meaning} (digits: {digits}, imagenet256: {imagenet256})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    recipe, why = given.get("recipe"), "as asked for"
    if recipe is None:
        found = os.path.isdir("data/imagenet/train")
        recipe, why = recipes[found], f"data/imagenet/train is {'there' if found else 'not there'}"
    settings = {"recipe": recipe, "resume": False} | {row[0]: row[1 + recipes.index(recipe)] for row in table}
    checkpoint = None
    if given.get("resume"):
        out = given.get("out", settings["out"])
        checkpoint = load_checkpoint(out, "the same command without --resume", kind)
        if "config" not in checkpoint:
            stop(f"{out} holds weights without a training to go on from (imported weights have none); leave out --resume")
        settings, why = settings | BEFORE | checkpoint["config"], f"as in {out}"
        for name in given.keys() - {"resume", *MAY_CHANGE}:
            if given[name] != settings.get(name):
                stop(f"--{name} {given[name]} can't change with --resume: {out} was trained with {settings.get(name)}")
    settings = settings | given
    check_settings(parser, table, settings, checkpoint)
    if is_main():
        print(f"recipe {settings['recipe']}: {why}", flush=True)
    return SimpleNamespace(**settings), checkpoint


def check_settings(parser, table, settings, checkpoint):
    """End with one sentence where a setting can't be right, before any work is done."""
    for name, *values, _ in table:  # a number that is positive in both recipes has to be positive, and none may be negative
        if isinstance(values[0], (int, float)) and not isinstance(values[0], bool):
            least = 1 if isinstance(values[0], int) and min(values) >= 1 else 0
            is_zero = min(values) > 0 and settings[name] == 0
            if not least <= settings[name] < math.inf or is_zero:
                parser.error(f"argument --{name}: must be {'at least 1' if least else 'positive'}, got {settings[name]}")
    if settings["ema"] >= 1:
        parser.error(f"argument --ema: must be less than 1, got {settings['ema']}")
    if settings["optimizer"] not in ("adamw", "muon") or settings["optimizer"] == "muon" and not settings["muon_lr"]:
        parser.error(f"argument --optimizer: must be adamw, or muon with a --muon_lr, got {settings['optimizer']} "
                     f"with {settings['muon_lr']}")
    if checkpoint and settings["steps"] < checkpoint["step"]:
        parser.error(f"argument --steps: {settings['out']} is at step {checkpoint['step']} already, got {settings['steps']}")
    for name in ("bf16", "fused_attention"):
        if settings.get(name, "auto") not in ("auto", "on", "off"):
            parser.error(f"argument --{name}: must be auto, on or off, got {settings[name]}")
    check_folder(settings["out"])


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the list of all options in front."""

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def yes_or_no(text):
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def three_numbers(text):
    """ "4,50,55" -> [4.0, 50.0, 55.0], and "4" -> [4.0, 4.0, 4.0]; ValueError for anything else."""
    if isinstance(text, list):
        return text
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"guidance must be one number or three with commas between, none negative, such as 4,50,55; got {text!r}")
    return numbers * (3 // len(numbers))


def stop(sentence):
    """End the program with one sentence on standard error and the exit code 1."""
    sys.exit("error: " + sentence)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices


def start_processes(device, tf32=True):
    """Join the process group when started by torchrun, on one machine or many. Returns (device, rank, number of processes).

    device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".  tf32: float32 products in TF32 on GPUs that have it.
    """
    try:
        torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        stop(f"--device must be auto, cpu, cuda or cuda:N, got {device}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and int(device[5:] or 0) >= torch.cuda.device_count():
        stop(f"--device {device} was asked for, but PyTorch sees {torch.cuda.device_count()} GPUs here; use --device cpu")
    set_tf32(tf32)
    if "RANK" not in os.environ:
        return torch.device(device), 0, 1
    if device.startswith("cuda"):
        if device != "cuda" or int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            stop(f"each process needs a GPU of its own, and there are {torch.cuda.device_count()} here; start at most so many with "
                 f"--nproc_per_node, and without the number in --device {device}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def set_tf32(on):
    """Whether GPUs that have TF32 take float32 products in it."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def is_main():
    """Whether this process is the one that prints and writes (known before the process group exists)."""
    return os.environ.get("RANK", "0") == "0"


def run(main):
    """Run a script's main() and leave the process group after it: a DDP model that outlives the group may abort the process.

    Ctrl-C ends it with one sentence; inside a training loop see SignalsNoted.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        stop("interrupted")
    finally:  # processes that read images ignore SIGTERM (data/reading.py), by which Python would end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for reader in multiprocessing.active_children():
            reader.kill()
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(code)


class SignalsNoted:
    """Inside this context SIGTERM and SIGINT (Ctrl-C) do not end the process: they are noted, so that the training loop can
    save a checkpoint first. A signal sent to one process stops all of them, after the same step.

    agreed: the number of the signal that arrived() found, the same in all processes; 0 for none.
    """

    def __enter__(self):
        self.number = self.agreed = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        self.number = number

    def arrived(self):
        """Ask all processes whether any of them was sent a signal; the same answer in all."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.agreed = number.item()
        return self.agreed > 0

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave(signals, cfg):
    """Say that a signal stopped the training, whose checkpoint is written; returns the exit code."""
    if is_main():
        name = signal.Signals(signals.agreed).name
        print(f"stopped by {name}; {cfg.out} holds all that was done, and --resume goes on from there", file=sys.stderr, flush=True)
    return 128 + signals.agreed


def autocast(device, bf16):
    """Automatic mixed precision. bf16: "auto" (where the processor multiplies bfloat16 fast), "on" or "off"."""
    if bf16 == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            processor = torch.cpu.get_capabilities()
            fast = processor.get("avx512_bf16", False) or processor.get("amx_bf16", False)
        bf16 = "on" if fast else "off"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 == "on")


def generator(device, purpose, *key):
    """A random generator that hangs on purpose, a word, and the numbers in key, such as (seed, step), and on nothing else."""
    seed = np.random.SeedSequence([zlib.crc32(purpose.encode()), len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) >> 1)


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def from_all_processes(thing):
    """What every process hands in, anything that pickle takes: a list in the order of the processes, the same in all of them."""
    things = [thing] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def together(work, *args, **settings):
    """work(...) in every process. Where it fails in one, all raise a ValueError, so that none is left waiting for another."""
    result, problem = None, ""
    try:
        result = work(*args, **settings)
    except (ValueError, OSError) as error:
        problem = str(error)
    problem = next(filter(None, from_all_processes(problem)), "")
    if problem:
        raise ValueError(problem)
    return result


def share(total, rank, processes):
    """This process's part of total rows: a slice; the slices of all processes cover them in order, without overlap."""
    return slice(total * rank // processes, total * (rank + 1) // processes)


def share_of_batch(cfg, num_images, rank, processes):
    """share() of the global batch; ValueError where the batch fits neither the processes nor the data."""
    if not processes <= cfg.batch_size <= num_images:
        raise ValueError(f"batch_size {cfg.batch_size} must lie between the number of processes, {processes}, and the number "
                         f"of training images, {num_images}")
    return share(cfg.batch_size, rank, processes)


def chunks(rows, size):
    """Cut a slice into slices of at most size rows: the micro-batches of gradient accumulation."""
    return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]


# ---------------------------------------------------------------------------------------------------------------------
# Optimization


def make_optimizers(model, cfg, decay_all=False):
    """AdamW, or Muon for the matrices in the blocks and AdamW for the rest, each with warm-up and cosine decay.

    Weight decay falls on matrices only, none on norms, biases and embeddings, or with decay_all on everything.
    Returns [(optimizer, scheduler), ...].
    """
    matrices, embeddings, muon = [], [], []
    for module in model.modules():
        for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters(recurse=False)):
            is_matrix = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and parameter.ndim > 1
            (matrices if is_matrix else embeddings).append(parameter)
    if cfg.optimizer == "muon":
        muon = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2 and p.requires_grad]
        in_muon = set(map(id, muon))
        matrices = [p for p in matrices if id(p) not in in_muon]
    groups = [{"params": matrices}, {"params": embeddings, "weight_decay": cfg.weight_decay * decay_all}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay,
                                    fused=cfg.fused_adamw)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=cfg.muon_lr, weight_decay=cfg.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))

    def factor(step):  # the cosine counts the warm-up's steps too
        warm = min(1.0, (step + 1) / max(1, cfg.warmup))
        cosine = (1 + math.cos(math.pi * min(1.0, step / cfg.steps))) / 2
        return warm * (cfg.lr_end + (1 - cfg.lr_end) * cosine)

    return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)) for optimizer in optimizers]


def set_switches(model, cfg):
    """Tell a model's parts about the fused attention and the recomputed activations that cfg asks for."""
    for module in model.modules():
        if hasattr(module, "fused_attention"):
            module.fused_attention = cfg.fused_attention
        if hasattr(module, "recompute"):
            module.recompute = cfg.recompute


def wrap(model, device, cfg):
    """The model as the training loop calls it: compiled if asked for, averaging gradients where there are several processes."""
    if cfg.compile:
        model = torch.compile(model)
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def backward(model, loss_of, rows, size, batch_size):
    """Gradients of the mean loss over the global batch, whatever the number of processes.

    loss_of: a slice of this process's rows -> their mean loss.  size: rows taken at once.
    DDP averages over processes, which may hold unequal shares; so every loss counts by its rows of the global batch.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    parts = chunks(slice(0, rows.stop - rows.start), size)
    for part in parts:
        wait = processes > 1 and part is not parts[-1]
        with model.no_sync() if wait else contextlib.nullcontext():
            weight = processes * (part.stop - part.start) / batch_size
            (loss_of(part) * weight).backward()


def optimizer_step(model, ema, optimizers, clip):
    """Clip the gradients to the norm clip (0 = leave them), then one step of every optimizer, its schedule and the average
    (ema, or None)."""
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer, scheduler in optimizers:
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if ema is not None:
        ema.update_parameters(model)


def moving_average(model, decay):
    """The exponential moving average (EMA) of a model's weights, which starts at its first update."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, log, pictures


def check_folder(path):
    """Stop before the work where the folder that a file is to be written to does not exist."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        stop(f"there is no folder {folder} to write {path} to")


def check_picture(parser, path):
    """Stop before the work where a picture can't be written to path."""
    if not path.endswith(".png"):
        parser.error(f"--out must end in .png, got {path}")
    check_folder(path)


def save_checkpoint(checkpoint, path):
    """Write a checkpoint so that a kill at any moment leaves the old file or the new one, whole."""
    torch.save(checkpoint, path + ".tmp")
    os.replace(path + ".tmp", path)


def load_checkpoint(path, made_by, *kinds):
    """Read a checkpoint; one sentence and the exit code 1 where there is none, or it is of none of the kinds that are needed."""
    if not os.path.isfile(path):
        stop(f"there is no checkpoint {path}; make it with: {made_by}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch.load fails in many ways on a file that is no checkpoint
        stop(f"{path} can't be read as a checkpoint ({type(problem).__name__}); make it with: {made_by}")
    kind = name_layout(checkpoint).get("kind") if isinstance(checkpoint, dict) else None
    if kind not in kinds:
        stop(f"{path} is not a {' or '.join(kinds)} checkpoint{f' but a {kind} checkpoint' if kind else ''}; "
             f"make it with: {made_by}")
    return checkpoint


def name_layout(checkpoint):
    """A checkpoint without the setting "layout", which SetTokenizer had once: a layout other than "set" is a kind of
    checkpoint of its own now (paper/layouts.py)."""
    for part in (checkpoint, checkpoint.get("tokenizer", {})):
        layout = part.get("model_config", {}).pop("layout", "set")
        if layout != "set":
            part["kind"] = f"{layout} tokenizer"
    return checkpoint


def write_json(content, path):
    """Write a JSON file so that a kill at any moment leaves the old file or the new one, whole."""
    with open(path + ".tmp", "w") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".tmp", path)


def read_json(path):
    """The dict in a JSON file; {} where there is no such file or none that can be read."""
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}


def save_training(checkpoint, step, cfg, model, ema, optimizers, **state):
    """Add to a checkpoint the averaged weights and all that --resume needs, and write it (the main process does)."""
    if is_main():
        training = {"model": model.state_dict(), "n_averaged": ema.n_averaged, **state,
                    "optimizers": [(optimizer.state_dict(), scheduler.state_dict()) for optimizer, scheduler in optimizers]}
        save_checkpoint(checkpoint | {"step": step, "config": vars(cfg), "weights": ema.module.state_dict(),
                                      "training": training}, cfg.out)


def keep_previous(path):
    """A new run does not overwrite the checkpoint of the run before: that is kept as PATH.previous."""
    if is_main() and os.path.isfile(path):
        os.replace(path, path + ".previous")
        print(f"{path} was there already; it is kept as {path}.previous", flush=True)


def check_resume(checkpoint, dataset):
    """The step to go on from, 0 without a checkpoint. ValueError where the images are other ones than the checkpoint's, which would
    be other batches, or where the processes do not see the same checkpoint."""
    step = checkpoint["step"] if checkpoint else 0
    if len(set(from_all_processes(step))) > 1:
        raise ValueError("the processes do not see the same checkpoint; --out must lie in a folder that all machines share")
    if checkpoint and checkpoint["images"] != dataset.fingerprint():
        raise ValueError("the training images are not those that the checkpoint was trained on, so --resume can't go on as if "
                         "nothing had been; bring them back, or train anew")
    return step


def restore(checkpoint, model, ema, optimizers):
    """Put a checkpoint's training state back."""
    training = checkpoint["training"]
    model.load_state_dict(training["model"])
    ema.module.load_state_dict(checkpoint["weights"])
    ema.n_averaged.copy_(training["n_averaged"])
    for (optimizer, scheduler), (optimizer_state, scheduler_state) in zip(optimizers, training["optimizers"]):
        optimizer.load_state_dict(optimizer_state)
        scheduler.load_state_dict(scheduler_state)


def due(done, every, last):
    """Whether after so many steps something is to be done that comes every so often, and at the last."""
    return done % every == 0 or done == last


def open_log(path, columns, step):
    """Open a CSV log and return the function that writes a row. Where a run goes on from a step, the rows up to it stay; a log
    of another run is kept as PATH.previous."""
    if not is_main():
        return lambda row: None
    rows = []
    if os.path.isfile(path) and not step:
        os.replace(path, path + ".previous")
    elif os.path.isfile(path):
        with open(path, newline="") as file:
            rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
    write = csv.writer(open(path, "w", newline="", buffering=1)).writerow
    for row in [columns, *rows]:
        write(row)
    return write


def progress_bar(start, steps):
    """A tqdm bar over training steps, of the main process only; where nobody watches it prints a line now and then."""
    watched = sys.stderr.isatty()
    return tqdm(total=steps, initial=start, disable=not is_main(), mininterval=0.5 if watched else 20, dynamic_ncols=watched)


def show(progress, cfg, text):
    """Put text and the images a second behind the bar (only the main process's bar keeps the time)."""
    if not progress.disable:
        rate = (progress.n - progress.initial) * cfg.batch_size / (time.time() - progress.start_t)
        progress.set_postfix_str(f"{text}, {rate:.0f} images/s", refresh=False)


def beside(path, suffix):
    """The path of a file that stands beside a checkpoint: tokenizer.pt -> tokenizer.csv."""
    return os.path.splitext(path)[0] + suffix


def duration(seconds):
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def to_uint8(images):
    """Images in [-1, 1] -> uint8 0..255, same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images, columns, row_labels=None, column_labels=None):
    """A PIL image of uint8 images (N, ch, H, W) in rows of columns; row_labels: a text in front of each row, column_labels: one
    above each column."""
    N, _, H, W = images.shape
    rows = -(-N // columns)
    scale = max(1, 56 // H)  # digits would be tiny
    margin = 0 if row_labels is None else 12 + max(7 * len(text) for text in row_labels)
    top = 0 if column_labels is None else 18
    page = Image.new("RGB", (margin + columns * W * scale, top + rows * H * scale), "white")
    for i, image in enumerate(images.cpu().numpy()):
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).resize((W * scale, H * scale), 0)
        page.paste(picture, (margin + i % columns * W * scale, top + i // columns * H * scale))
    for row, text in enumerate(row_labels or []):
        ImageDraw.Draw(page).text((6, top + (row + 0.5) * H * scale - 6), text, fill="black")
    for column, text in enumerate(column_labels or []):
        ImageDraw.Draw(page).text((margin + column * W * scale + 2, 3), text, fill="black")
    return page
