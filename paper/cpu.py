"""Where the time of a training step of the digits goes on a CPU, and what changes it.

    python -m paper.cpu                about two minutes

Prints two Markdown tables. The first: the shares of a step's time, for both stages of the recipe. The second: forward
and backward pass of stage 2 as they are, and how many times longer they take in float32, with the other kind of
attention, and compiled (this needs a C++ compiler; left empty without one). Steps that are compared are measured in
alternation, so that other work on the machine slows all of them.
"""
import shutil
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import train_fsdd
import train_tokenizer
from beyond import SparseDenoiser, all_hidden, hide_tokens, sparse_loss
from fsdd import Denoiser, fsdd_loss, sample_noise
from paper.inputs import read_options
from support.hardware import autocast, keep_freed_memory, parallel
from support.optimizers import make_optimizers
from tokenizer import SetTokenizer

KINDS = {  # operations of PyTorch that count as one kind, "other" is the rest
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "sums, products": ("aten::add", "aten::add_", "aten::sum", "aten::mul"),
    "copies, casts": ("aten::copy_", "aten::cat"),
}
STEPS = {  # rows of the second table: how many codes the loss looks at, see stage2()
    "dense": 0,
    "sparse, loss of all codes": 257,
    "sparse, loss of 2 M codes": 64,
}
VARIATIONS = {  # arguments of stage2()
    "float32": {"bf16": "off"},
    "fused attention": {"fused": "on"},
    "written-out attention": {"fused": "off"},
    "torch.compile": {"compile": True},
}


def main(argv=None):
    read_options([], "cpu", __doc__, argv)  # there are none but --help
    keep_freed_memory()  # as both trainings
    print(f"{torch.get_num_threads()} threads; where the time of a step of the digits' recipe goes\n\n"
          f"| | ms | {' | '.join(KINDS)} | other | Muon | AdamW |\n|---|---|" + "---|" * (3 + len(KINDS)))
    for name, (model, step, cfg) in {"stage 1": stage1(), "stage 2": stage2(64)}.items():
        print(f"| {name} | {' | '.join(shares_of_time(model, step, cfg))} |", flush=True)
    print(f"\n| | as it is, ms | {' | '.join(VARIATIONS)} |\n|---|---|" + "---|" * len(VARIATIONS))
    compiler = shutil.which("g++") or shutil.which("clang++")
    for name, num_codes in STEPS.items():
        steps = {variation: stage2(num_codes, **options)[1] for variation, options in [("", {}), *VARIATIONS.items()]
                 if compiler or not options.get("compile")}
        seconds = in_turn(steps, repetitions=20)
        factors = [f"× {seconds[variation] / seconds['']:.2f}" if variation in seconds else ""
                   for variation in VARIATIONS]
        print(f"| {name} | {seconds[''] * 1e3:.1f} | {' | '.join(factors)} |", flush=True)


def stage1():
    """(The digits' tokenizer, a function that computes a training step's gradients, its settings)."""
    cfg = SimpleNamespace(**{name: digits for name, digits, *_ in train_tokenizer.HYPERPARAMETERS})
    model = SetTokenizer(channels=1, **{name: getattr(cfg, name) for name in train_tokenizer.MODEL})
    images = torch.rand(cfg.batch_size, 1, cfg.image_size, cfg.image_size) * 2 - 1
    shuffle = torch.rand(cfg.batch_size, cfg.num_tokens)
    unquantized = torch.rand(cfg.batch_size) < cfg.unquantized

    def step():
        with autocast(torch.device("cpu"), cfg.bf16):
            recon, _, latents, loss = model(images, shuffle, False, unquantized)
        (F.mse_loss(recon.float(), images) + loss + cfg.uniformity * train_tokenizer.uniformity(latents)).backward()

    return model, step, cfg


def stage2(num_codes, fused="auto", **changes):
    """The same for a denoiser of hidden tokens. num_codes: of sparse_loss(), 0 for a dense denoiser.
    fused: kind of attention, see tokenizer.Attention.  changes: other settings."""
    cfg = SimpleNamespace(**{name: digits for name, digits, *_ in train_fsdd.HYPERPARAMETERS} | changes)
    B, C, M = cfg.batch_size, 257, 32  # 256 codes and the null code
    compute_loss = partial(sparse_loss, num_codes=num_codes) if num_codes else fsdd_loss
    model = (SparseDenoiser if num_codes else Denoiser)(C, M, 10, *train_fsdd.MODELS["digits"], gelu=cfg.gelu)
    for block in model.blocks:
        block.attention.fused = fused
    called = parallel(model, torch.device("cpu"), cfg)
    x0, x1 = F.pad(sample_noise(B, C - 1, M, "multinomial"), (0, 1)), all_hidden(B, C, M)
    labels, t, (uniform, order) = torch.zeros(B, dtype=torch.int64), torch.rand(B), torch.rand(2, B, C)
    batch = train_fsdd.Batch(x0, labels, t, x1, uniform, order)

    def step():
        with autocast(torch.device("cpu"), cfg.bf16):
            loss = compute_loss(called, batch, process=hide_tokens)
        loss.backward()

    return model, step, cfg


def shares_of_time(model, step, cfg, repetitions=40):
    """Cells of the first table: ms of a step, optimizers included, and the shares of KINDS, the rest, Muon, AdamW."""
    optimizers = make_optimizers(model, cfg, cfg.beta2)
    seconds = in_turn({"step": step} | {type(optimizer).__name__: optimizer.step for optimizer in optimizers},
                      repetitions)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repetitions):
            step()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    shares = [sum(spent.get(operation, 0) for operation in kind) / sum(spent.values()) for kind in KINDS.values()]
    total = sum(seconds.values())
    shares = [share * seconds["step"] for share in (*shares, 1 - sum(shares))] + [seconds["Muon"], seconds["AdamW"]]
    return [f"{total * 1e3:.1f}", *(f"{share / total:.0%}" for share in shares)]


def in_turn(functions, repetitions):
    """{name: seconds that a function takes}: the functions run in alternation, once to warm up and then as often as
    given, of which the fastest counts."""
    best = dict.fromkeys(functions, float("inf"))
    for i in range(repetitions + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if i:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
