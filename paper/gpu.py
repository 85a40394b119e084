"""Does the project work on a GPU, and how fast? One run of at most 8 minutes that needs no files.

    python -m paper.gpu                        on one GPU
    python -m paper.gpu --device cpu --toy     the same at tiny sizes, to try the script; its numbers mean nothing

Checks the invariants, trains the digits by their recipe and measures them, draws 16 samples by an untrained S, and
times the reading of images and the six trainings of paper/cost.py at full size. Their images and weights are random,
which changes no speed. The table at the end is for paper/details.md.

Every part says how long it took. One that fails, or is not done in time, says why in one line. The others go on, and
the exit code is 1. So far the script ran at tiny sizes on a CPU only.
"""
import contextlib
import gc
import io
import math
import os
import signal
import sys
import tempfile
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import evaluate_fid
import train_fsdd
import train_tokenizer
from beyond import exchange, hide_tokens
from data import open_dataset
from data.loader import read_ahead
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import GUIDANCE, STEPS, forward_process, generate, greedy_adjust, refine, sample_noise
from generation import DENOISERS, refine_arguments
from paper.cost import (BATCH, GPUS, LOSS_CODES, STAGE1_IMAGES, STAGE2_IMAGES, denoiser_cost, settings,
                        tokenizer_cost)
from paper.inputs import read_options
from published.classifier import classifier_of
from published.convnext import ConvNeXt
from published.losses import load_networks
from published.maskgit_vqgan import VQGAN
from support.command_line import listed, stop
from support.files import read_checkpoint, read_json, save_checkpoint
from support.hardware import autocast, init_distributed, set_tf32
from support.training import StoppedBySignal, run

CPU = torch.device("cpu")
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165,
         "RTX 3090": 71}  # dense TFLOP/s in bfloat16, with sums in float32, of the GPUs whose name contains the word
WARM_UP, SECONDS = 3, 4   # a training is timed after so many steps, for so long
TINY = ["--recipe=digits", "--batch_size=8", "--width=16", "--heads=2"]  # trainings of the digits in seconds
TINY1 = [*TINY, "--num_tokens=8", "--codebook_size=32", "--encoder_layers=1", "--decoder_layers=1"]
TINY2 = [*TINY, "--layers=1", "--sample_steps=3"]
OPTIONS = [
    ("--device", "auto", "", "auto, cpu or cuda"),
    ("--toy", False, "", "tiny sizes, few steps, no torch.compile"),
    ("--minutes", 8, "[1, 1000]", "what is not done by then fails"),
    ("--only", "", "", "run only the parts whose names contain this"),
    ("--peak", 0, "[0, inf)", "dense bfloat16 peak of the GPU, TFLOP/s, 0 = as in PEAKS"),
    ("--workers", os.cpu_count(), "[1, inf)", "processes that read images"),
]


def main(argv=None):
    args = read_options(OPTIONS, "gpu", __doc__, argv)
    if args.device == "auto" and not torch.cuda.is_available():
        stop("this needs a GPU that PyTorch sees; --device cpu --toy tries the script without one")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic products need, see check_resume()
    device, *_ = init_distributed(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = 1e12 * (args.peak or next((peak for word, peak in PEAKS.items() if word in name), 0))  # FLOP/s
    name += f", PyTorch {torch.__version__}"
    print(name, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        parts = {"states": partial(check_states, device), "adjusting": partial(check_adjusting, device),
                 "sets and counts": partial(check_counts, device), "draws": partial(check_draws, device),
                 "stop and resume": partial(check_resume, folder, device),
                 "digits": partial(train_digits, folder, device, args.toy),
                 "samples": partial(draw_samples, device, args.toy),
                 "reading": partial(time_reading, folder, args)}
        for training, (start, count, _) in trainings().items():
            parts[training] = partial(time_training, start, count, peak, folder, device, args.toy)
        parts = {part: function for part, function in parts.items() if args.only in part}
        found = run_parts(parts, time.time() + 60 * args.minutes, device)
    print_table(found, name, peak)
    sys.exit(len(found) < len(parts))


def trainings():
    """The rows of the table: {name: (what starts a training, what counts its cost, images that it sees)}."""
    rows = {"stage 1, proxy codes": (partial(stage1, True), partial(tokenizer_cost, True), STAGE1_IMAGES),
            "stage 1, pixels": (partial(stage1, False), partial(tokenizer_cost, False), STAGE1_IMAGES)}
    for name in ("S", "B"):
        rows[f"stage 2, {name}"] = partial(stage2, name, "dense"), partial(denoiser_cost, name), STAGE2_IMAGES
        rows[f"stage 2, {name}, sparse, {LOSS_CODES} codes"] = (
            partial(stage2, name, "sparse"), partial(denoiser_cost, name, LOSS_CODES), STAGE2_IMAGES)
    return rows


def run_parts(parts, deadline, device):
    """Run parts, {name: function}, one after the other; returns {name: result} of those that did not fail."""
    found = {}

    def time_is_over(*_):
        raise TimeoutError("the time is over, see --minutes")

    signal.signal(signal.SIGALRM, time_is_over)
    for name, part in parts.items():
        began = time.time()
        print(f"\n{name}", flush=True)
        signal.alarm(max(1, math.ceil(deadline - began)))
        try:
            gc.collect()
            set_tf32(True)  # which evaluate_fid.py turns off
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            found[name] = part()
            print(f"  passed in {time.time() - began:.1f} s", flush=True)
        except StoppedBySignal:  # a training was told to end
            raise
        except (Exception, SystemExit) as problem:
            reason = (str(problem).splitlines() or [""])[0]
            print(f"  FAILED after {time.time() - began:.1f} s: {type(problem).__name__}: {reason}", flush=True)
        finally:
            signal.alarm(0)
    return found


def now(device):
    """Seconds, once the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device):
    """GiB that tensors took at most since the part began; 0 on a CPU, where PyTorch does not count them."""
    return torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == "cuda" else 0


# ---------------------------------------------------------------------------------------------------------------------
# Invariants


def check_states(device, C=256, M=32):
    """Every state of generation sums to M, for every noise, sampler and kind of denoiser."""
    for prior, sampler, kind in (("multinomial", "paper", "dense"), ("distinct", "paper", "sparse"),
                                 ("multinomial", "exchange", "sparse"), ("hidden", "reveal", "sparse")):
        denoiser = DENOISERS[kind](C + (prior == "hidden"), M, 10, width=32, layers=2, heads=2).to(device)
        for weight in denoiser.parameters():
            torch.nn.init.normal_(weight, std=0.3)  # it would predict the same for all codes
        arguments = refine_arguments({"prior": prior, "sampler": sampler, "steps": 8, "guidance": "4,50,55",
                                      "top_p": 0.8, "top_k": 0})
        with autocast(device, "auto"):
            for x in refine(denoiser, torch.arange(10, device=device), **arguments):
                assert (x.sum(1) == M).all() and (x >= 0).all(), f"a state of the sampler {sampler} breaks the sum"


def check_adjusting(device, B=64, C=256, M=32):
    """greedy_adjust() takes as few steps as possible; exchange(), X_t and hidden tokens keep the sum."""
    x = (3 * torch.rand(B, C, device=device) * torch.rand(B, 1, device=device)).long()  # of any sum
    p = torch.randn(B, C, M + 1, device=device).softmax(2)
    adjusted = greedy_adjust(x, p.log(), M)
    assert (adjusted.sum(1) == M).all() and (adjusted >= 0).all(), "greedy_adjust() breaks the sum"
    assert ((adjusted - x).abs().sum(1) == (x.sum(1) - M).abs()).all(), "greedy_adjust() takes more steps than needed"

    x0, x1 = (sample_noise(B, C, M, "multinomial", device=device) for _ in range(2))
    x0[:, -2] += x0[:, -1]
    x0[:, -1] = 0  # the null code of hide_tokens()
    t = torch.linspace(0, 1, B, device=device)
    x_t, hidden, exchanged = forward_process(x0, x1, t), hide_tokens(x0, x1, t), exchange(x0, p)
    assert all((x.sum(1) == M).all() and (x >= 0).all() for x in (x_t, hidden, exchanged)), "a sum is not M"
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[-1], x1[-1]), "X_t does not end at X_0 and X_1"
    assert (hidden <= x0)[:, :-1].all() and hidden[0, -1] == 0 and hidden[-1, -1] == M, "wrong tokens are hidden"


def check_counts(device, B=64, C=4096, M=128):
    """From sets to counts and back nothing is lost but the order."""
    tokens = torch.randint(C, (B, M))
    counts = tokens_to_counts(tokens.to(device), C)
    assert torch.equal(counts.cpu(), tokens_to_counts(tokens, C)), "the counts are not those of the CPU"
    assert torch.equal(counts_to_tokens(counts).cpu(), tokens.sort(1).values), "the tokens are not those of the counts"


def check_draws(device, B=64, C=4096, M=128):
    """A training sees the same images as on a CPU. Its other random numbers come from the device's own generator; says
    which differ. With the same numbers, the same tokens are hidden. Says how many counts of the paper's X_t differ,
    as rounding does, and the order in which equal scores are sorted."""
    cfg = settings(train_fsdd.HYPERPARAMETERS, batch_size=B, label_drop=0.0)
    tokens, labels = np.random.default_rng(0).integers(C, size=(1, 100, M), dtype=np.uint16), torch.arange(100)
    batches = []
    for place in (CPU, device):
        model = SimpleNamespace(codebook_size=C, num_tokens=M, num_classes=100,
                                code_embedding=torch.zeros(1, device=place))
        batches.append(train_fsdd.draw_batch(tokens, labels, model, slice(0, B), 0, cfg))
    cpus, ours = batches
    same = [name for name in cpus._fields if torch.equal(getattr(ours, name).cpu(), getattr(cpus, name))]
    print(f"  as on a CPU: {listed(same, 6)}; not: {listed([name for name in cpus._fields if name not in same], 6)}")
    assert {"x0", "labels"} <= set(same), "a training sees other images than on a CPU"
    arguments = cpus.x0, cpus.x1, cpus.t, cpus.uniform
    x_t, hidden = (process(*(x.to(device) for x in arguments)).cpu() for process in (forward_process, hide_tokens))
    print(f"  {(x_t != forward_process(*arguments)).double().mean():.3%} of the counts of X_t are not those of a CPU")
    assert torch.equal(hidden, hide_tokens(*arguments)), "other tokens are hidden than on a CPU"


def check_resume(folder, device):
    """A training that is stopped and resumed gives exactly the weights of an unbroken one. On a GPU, some operations
    add up in any order. If the weights differ, both are trained again without these, and then must not."""
    sets = [f"--tokenizer={folder}/whole-train_tokenizer.pt", f"--tokens={folder}/tiny.npy"]
    for script, options in ((train_tokenizer, TINY1), (train_fsdd, [*TINY2, *sets])):
        for deterministic in (False, True):
            difference = resumed_difference(script, [*options, f"--device={device}"], folder, deterministic)
            print(f"  {script.__name__}.py{', deterministic' * deterministic}: resumed and unbroken weights differ "
                  f"by at most {difference:.1e}")
            if not difference:
                break
        assert not difference, f"{script.__name__}.py --resume does not give the weights of an unbroken training"


def resumed_difference(script, options, folder, deterministic):
    """The largest difference of a weight, or of its moving average, between an unbroken training of 4 steps and one
    that is resumed after 2."""
    whole, parts = (f"{folder}/{name}-{script.__name__}.pt" for name in ("whole", "parts"))
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for out, *more in ((whole, "--steps=4"), (parts, "--steps=2"), (parts, "--steps=4", "--resume")):
                script.main([*options, "--lr_end=1", f"--out={out}", *more])  # no decay: it depends on --steps
    finally:
        torch.use_deterministic_algorithms(False)
    weights = [[*checkpoint["weights"].values(), *checkpoint["training"]["model"].values()]
               for checkpoint in map(read_checkpoint, (whole, parts))]
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(*weights, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The digits, samples, reading images


def train_digits(folder, device, toy):
    """Both stages by the digits' recipe, and what evaluate_fid.py says of them, with a classifier trained here."""
    tokenizer, fsdd = f"{folder}/tokenizer.pt", f"{folder}/fsdd.pt"
    sets = [f"--tokenizer={tokenizer}", f"--tokens={folder}/tokens.npy"]
    if toy:  # an untrained classifier
        weights = classifier_of(open_dataset("digits", "test", None), "digits").state_dict()
        save_checkpoint({"kind": "digits classifier", "weights": weights}, f"{folder}/digits_classifier.pt")
    for script, out, options, tiny in ((train_tokenizer, tokenizer, [], TINY1), (train_fsdd, fsdd, sets, TINY2)):
        began = time.time()
        options = [*options, *tiny, "--steps=4"] if toy else options
        script.main(["--recipe=digits", f"--device={device}", f"--out={out}", *options])
        trained = time.time()
        options = ["--num=50", f"--ref={tokenizer}"] if toy else []
        evaluate_fid.main([f"--ckpt={out}", f"--device={device}", f"--json={folder}/results.json", *options])
        results = [f"{name} {value:.4g}" for name, value in read_json(f"{folder}/results.json").items()
                   if isinstance(value, float)]
        print(f"  {script.__name__}.py took {trained - began:.0f} s, evaluate_fid.py {time.time() - trained:.0f} s: "
              f"{', '.join(results)}")


def draw_samples(device, toy, number=16):
    """Counts of 16 images by an untrained S and the paper's sampler: the time of a second call, and memory."""
    denoiser = made_denoiser("S", settings(train_fsdd.HYPERPARAMETERS), device, toy).eval()
    with torch.no_grad():
        denoiser.to_logits.bias[0] = 10  # most counts are 0, which a trained one knows
    for _ in range(2):
        began = now(device)
        with autocast(device, "auto"):
            x = generate(denoiser, torch.arange(number, device=device))  # the defaults are the release's settings
        seconds = now(device) - began
    print(f"  {number} samples in {STEPS} steps, guidance {GUIDANCE}: {seconds:.1f} s, {peak_memory(device):.1f} GiB")
    assert (x.sum(1) == denoiser.num_tokens).all(), "the sampler breaks the sum"


def time_reading(folder, args, rounds=8):
    """Images a second that stage 1 reads and crops, {number of worker processes: speed}. The JPEGs are like ImageNet's,
    500 x 375 pixels and about 100 kB; they come from the system's memory, not from a disk."""
    os.makedirs(f"{folder}/train/made")
    random = np.random.default_rng(0)
    for i in range(BATCH):
        smooth = Image.fromarray(random.integers(256, size=(6, 8, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(smooth) + random.normal(0, 12, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(f"{folder}/train/made/{i}.jpg", quality=90)
    dataset, speeds = open_dataset(folder, "train", 256, crop="random", flip=True), {}
    for workers in sorted({1, args.workers}):
        batches = ([(i, epoch) for i in range(BATCH)] for epoch in range(workers * (2 if args.toy else rounds)))
        images = read_ahead(dataset, batches, workers)
        for _ in range(workers):  # the first round, in which the workers start
            next(images)
        began = time.perf_counter()
        speeds[workers] = sum(len(labels) for _, labels in images) / (time.perf_counter() - began)
        print(f"  {speeds[workers]:.0f} images/s by {workers} worker processes", flush=True)
    return speeds


# ---------------------------------------------------------------------------------------------------------------------
# The paper's trainings


def stage1_settings(toy, **changes):
    """The recipe imagenet256 of stage 1 on one GPU, with all critics from the first step of the pixels on."""
    tiny = dict(image_size=32, num_tokens=4, codebook_size=16, code_dim=4, width=16, heads=2, encoder_layers=1,
                decoder_layers=1, discriminator=32) if toy else {}
    return settings(train_tokenizer.HYPERPARAMETERS, adversarial_from=0, batch_size=BATCH, workers=0, compile=not toy,
                    **tiny, **changes)


def stage1(proxy, folder, device, toy):
    """A phase of train_tokenizer.py on random images, with random weights in the published files: its training loop, of
    which the last argument, signals, is left open."""
    vqgan, convnext = (VQGAN(32, 8, 16), ConvNeXt((4, 4, 8, 8), (1, 1, 2, 1), 10)) if toy else (VQGAN(), ConvNeXt())
    cfg = stage1_settings(toy, vqgan=f"{folder}/vqgan.bin", convnext=f"{folder}/convnext.pth")
    torch.save(vqgan.state_dict(), cfg.vqgan)
    torch.save(convnext.state_dict(), cfg.convnext)
    vqgan, pixel_losses = load_networks(cfg, None, device)
    model, _ = train_tokenizer.make_model(cfg, None, 3, vqgan, device)
    images = open_dataset("digits", "test", None)  # a dataset in memory, of which only the labels stay
    images.images = torch.randint(256, (4 * BATCH, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8)
    networks = (vqgan, None) if proxy else (None, pixel_losses)
    return partial(train_tokenizer.train_phase, model, *networks, images, None, None, {}, cfg, lambda row: None)


def stage2(name, kind, folder, device, toy):
    """train_fsdd.py on random sets: its training loop, as above. name: S or B.  kind: dense or sparse."""
    cfg = settings(train_fsdd.HYPERPARAMETERS, denoiser=kind, batch_size=BATCH, compile=not toy,
                   out=f"{folder}/stage2.pt")
    model = made_denoiser(name, cfg, device, toy)
    size = 2, 4 * BATCH, model.num_tokens  # with mirror images
    tokens = np.random.default_rng(0).integers(model.codebook_size, size=size, dtype=np.uint16)
    return partial(train_fsdd.train, model, None, tokens, torch.zeros(size[1], dtype=torch.int64), None, {}, cfg)


def made_denoiser(name, cfg, device, toy):
    """The untrained denoiser S or B of the recipe imagenet256."""
    width, layers, heads = (16, 1, 2) if toy else train_fsdd.MODELS[name]
    C, M = (64, 4) if toy else (4096, 128)
    return train_fsdd.make_model(dict(codebook_size=C, num_tokens=M, num_classes=1000, width=width, layers=layers,
                                      heads=heads, unused_rows=cfg.unused_rows, gelu=cfg.gelu), None, device, cfg)


def time_training(start, count, peak, folder, device, toy):
    """(Images a second, peak memory in GiB, share of the peak or 0 if that is not known) of a training on one GPU.

    start: stage1() or stage2().  count: the training's cost, as paper/cost.py counts it.  peak: FLOP/s in bfloat16.
    """
    torch.compiler.reset()
    speed = BATCH / step_seconds(start(folder, device, toy), device, 0 if toy else SECONDS)
    memory = peak_memory(device)
    print(f"  {speed:.1f} images/s, {memory:.1f} GiB", flush=True)
    cost = count() if peak else None
    # as in paper/cost.py: the networks of the losses run in TF32, which has half of the peak
    return speed, memory, (2 * cost.step - cost.training) * speed / peak if peak else 0


def step_seconds(train, device, at_least):
    """How long a step of a training loop takes, optimizers included, in seconds, measured after WARM_UP steps for at
    least so many seconds. The loop asks its argument signals after every step whether to stop."""
    taken, began = 0, 0

    def received():
        nonlocal taken, began
        taken += 1
        if taken == WARM_UP:
            began = now(device)
        elif taken > WARM_UP and time.perf_counter() - began >= at_least:
            raise StoppedBySignal
        return 0

    with contextlib.suppress(StoppedBySignal):
        train(SimpleNamespace(received=received))
    return (now(device) - began) / (taken - WARM_UP)


def print_table(found, name, peak):
    """The table of the trainings that did not fail, and how fast images are read. found: the results of the parts."""
    rows = {training: row for training, row in trainings().items() if training in found}
    if rows:
        of = f"{peak / 1e12:.0f} TFLOP/s" if peak else "the peak"
        print(f"\n| {name} | images/s, batch {BATCH} | GiB | share of {of} "
              f"| hours on {GPUS} such GPUs |\n|---|---|---|---|---|")
    for training, (*_, images) in rows.items():
        speed, memory, share = found[training]
        cells = f"{memory:.1f}" if memory else "", f"{share:.0%}" if share else ""
        print(f"| {training} | {speed:.0f} | {' | '.join(cells)} | {images / speed / GPUS / 3600:.0f} |")
    if "reading" in found:
        read = " and ".join(f"{speed:.0f} a second by {workers}" for workers, speed in found["reading"].items())
        taken = [f"{found[training][0]:.0f} ({training})" for training in rows if training.startswith("stage 1")]
        print(f"\nImages read and cropped: {read} processes. The GPU takes {' and '.join(taken) or 'nothing'}.")


if __name__ == "__main__":
    run(main)
