"""Stage 2: train Fixed-Sum Discrete Diffusion on the token sets of stage 1 (Sec. 3.3, 4.1). tokenizer.pt -> fsdd.pt

    python train_fsdd.py                          after train_tokenizer.py
    torchrun --nproc_per_node=8 train_fsdd.py     eight processes, the same training
    python train_fsdd.py --resume                 resume a run that was interrupted

Every training image is encoded once (tokens.npy, kept for the next run with the same tokenizer and images). After that
no training image is read. Writes fsdd.pt (weights, their moving average, the tokenizer: all that sample.py and --resume
need), fsdd.csv (a log) and fsdd.png (samples). On the digits: about 7 minutes on two CPU cores without bfloat16
instructions (README.md).
"""
import math
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from beyond import flip_times, sparse_loss, start_from_codebook
from data.loader import batch_indices, open_datasets, read_slices
from data.token_sets import check_token_file, encode_training_set
from dual_transform import counts_to_tokens, sequence_bits, set_bits, tokens_to_counts
from fsdd import fsdd_loss, generate
from generation import DENOISERS, GENERATION, PROCESS, decode, load_tokenizer, refine_arguments
from support.command_line import HARDWARE, parse, stop
from support.distributed import all_reduce, chunks, is_main, local_batch, rank_and_world_size
from support.files import load_checkpoint
from support.hardware import autocast, init_distributed, parallel
from support.optimizers import make_optimizers, set_lr, warmup_cosine
from support.pictures import grid, save
from support.seeds import generator
from support.training import (Signals, check_finite, check_training, keep_previous, open_log, progress_bar,
                              replace_suffix, restore_training, run, save_training, stop_by_signal)

MODELS = {  # width, layers, heads of the denoiser
    "digits": (96, 2, 3),
    "emoji": (96, 3, 3),
    "S": (384, 12, 6),   # 36.0 million parameters with the paper's C = 4096, M = 128
    "B": (768, 12, 12),  # 136.7 million
}
HYPERPARAMETERS = [
    # name               digits    emoji    imagenet256    allowed             meaning
    ("tokenizer",        "tokenizer.pt", "tokenizer.pt", "tokenizer.pt", "",   "checkpoint of stage 1"),
    ("data",             "digits", "emoji", "data/imagenet", "",               "digits, emoji, or a folder"),
    ("flip",             False,    False,   True,          "",                 "learn from mirrored images too"),
    # denoiser
    ("model",            "digits", "emoji", "S",           "digits | emoji | S | B", "size of the denoiser (MODELS)"),
    ("width",            0,        0,       0,             "[0, inf)",         "its width, 0 = the model's"),
    ("layers",           0,        0,       0,             "[0, inf)",         "its blocks, 0 = the model's"),
    ("heads",            0,        0,       0,             "[0, inf)",         "its attention heads, 0 = the model's"),
    ("unused_rows",      False,    False,   True,          "",                 "C + 1 rows in the count embedding"),
    ("gelu",             "exact",  "exact", "tanh",        "exact | tanh",     "tanh (DiT), exact: faster on CPUs"),
    ("label_drop",       0.1,      0.1,     0.1,           "[0, 1]",           "share of labels that are dropped"),
    # beyond the paper, see beyond.py; the column imagenet256 is the paper's
    ("prior",            "hidden", "multinomial", "multinomial", "multinomial | distinct | hidden", "the noise"),
    ("training_times",   "uniform", "flips", "uniform",    "uniform | flips",  "t (flips: the paper's noise)"),
    ("code_start",       "codebook", "codebook", "zeros",  "zeros | codebook", "start of the code embedding"),
    ("denoiser",         "sparse", "sparse", "dense",      "dense | sparse",   "codes attend to codes, or tokens"),
    ("loss_codes",       2,        3,       3,             "[2, inf)",         "sparse: times M codes in the loss"),
    # optimization
    ("steps",            4000,     3000,    1000000,       "[1, inf)",         "optimizer steps"),
    ("batch_size",       64,       64,      256,           "[1, inf)",         "images per step, over all processes"),
    ("device_batch",     64,       64,      32,            "[1, inf)",         "images that a process takes at once"),
    ("optimizer",        "muon",   "muon",  "adamw",       "adamw | muon",     "muon: for the blocks' matrices"),
    ("lr",               8e-3,     8e-3,    1e-4,          "(0, inf)",         "peak learning rate of adamw"),
    ("muon_lr",          5e-3,     5e-3,    1e-3,          "(0, inf)",         "peak learning rate of muon"),
    ("lr_end",           0.01,     0.01,    1.0,           "[0, 1]",           "final learning rate / peak (cosine)"),
    ("warmup",           50,       50,      0,             "[0, inf)",         "steps of linear warm-up"),
    ("beta2",            0.99,     0.99,    0.999,         "[0, 1)",           "second beta of adamw"),
    ("weight_decay",     0.01,     0.01,    0.01,          "[0, inf)",         "on all weights (the release)"),
    ("clip",             1.0,      1.0,     0.0,           "[0, inf)",         "largest gradient norm, 0 = any"),
    ("ema",              0.99,     0.99,    0.9999,        "[0, 1)",           "decay of the weights' average"),
    # samples, in the pictures and by default in sample.py
    *GENERATION,
    # what is written
    ("out",              "fsdd.pt", "fsdd.pt", "fsdd.pt",  "",                 "the checkpoint"),
    ("tokens",           "tokens.npy", "tokens.npy", "tokens.npy", "",         "the encoded training set"),
    *HARDWARE,
]
COLUMNS = ["step", "loss", "lr"]  # of the log


def main(argv=None):
    cfg, checkpoint = parse(HYPERPARAMETERS, __doc__, "fsdd", argv)
    stage1 = checkpoint["tokenizer"] if checkpoint else load_checkpoint(
        cfg.tokenizer, "python train_tokenizer.py", "tokenizer")
    device, rank, _ = init_distributed(cfg.device)
    began = time.time()
    try:
        tokenizer, train_set, test_set, model_config, generation = prepare(stage1, device, cfg)
        model = make_model(model_config, tokenizer, device, cfg)
        check_training(cfg, checkpoint, train_set)
        tokens = encode_training_set(tokenizer, train_set, device, cfg)  # (1 or 2, N, M)
    except ValueError as problem:
        stop(str(problem))
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    if rank == 0:
        print(f"sets of {M} tokens out of {C} codes: {set_bits(M, C):.0f} bits an image, "
              f"as sequences they would be {sequence_bits(M, C):.0f}", flush=True)
    if not checkpoint:
        keep_previous(cfg.out)
    header = {"kind": "fsdd", "denoiser": cfg.denoiser, "model_config": model_config,
              "class_names": train_set.class_names, "images": train_set.fingerprint(), "generation": generation,
              "tokenizer": {name: stage1[name] for name in ("model_config", "weights")}}
    with Signals() as signals:
        averaged = train(model, tokenizer, tokens, train_set.labels, checkpoint, header, cfg, signals)
    loss = evaluate(averaged, tokenizer, test_set, device, cfg)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {(time.time() - began) / 60:.1f} min; "
              f"loss {loss:.4f} on the sets of {len(test_set)} test images")


def prepare(stage1, device, cfg):
    """The tokenizer, both datasets, the denoiser's arguments and the settings of generation. ValueError if settings do
    not fit together."""
    tokenizer = load_tokenizer(stage1, device)
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    check_token_file(cfg.tokens, C)
    codebook_size = C + 1 if cfg.prior == "hidden" else C  # with the null code
    noise, _ = PROCESS[cfg.prior]
    noise(1, codebook_size, M, cfg.prior)  # raises ValueError for M > C if the prior does not allow it
    generation = {"prior": cfg.prior} | {name.removeprefix("sample_"): getattr(cfg, name) for name, *_ in GENERATION}
    refine_arguments(generation)  # raises ValueError if the sampler does not fit the prior
    train_set, test_set = open_datasets(cfg, tokenizer.image_size)
    if train_set.channels != tokenizer.channels:
        raise ValueError(f"the images of {cfg.data} have {train_set.channels} channels, those of {cfg.tokenizer} "
                         f"{tokenizer.channels}; give the --data that it was trained on")
    width, layers, heads = MODELS[cfg.model]
    model_config = dict(codebook_size=codebook_size, num_tokens=M, num_classes=len(train_set.class_names),
                        width=cfg.width or width, layers=cfg.layers or layers, heads=cfg.heads or heads,
                        unused_rows=cfg.unused_rows, gelu=cfg.gelu)
    return tokenizer, train_set, test_set, model_config, generation


def make_model(model_config, tokenizer, device, cfg):
    """The denoiser with its initial weights."""
    torch.manual_seed(cfg.seed)
    model = DENOISERS[cfg.denoiser](**model_config).to(device)
    if cfg.code_start == "codebook":
        start_from_codebook(model, tokenizer.quantizer.codes())
    return model


def train(model, tokenizer, tokens, labels, checkpoint, header, cfg, signals):
    """The training loop. tokens (1 or 2, N, M), labels (N,): the training set. Returns the model with averaged
    weights."""
    B, device = cfg.batch_size, model.code_embedding.device
    _, process = PROCESS[cfg.prior]  # what draws X_t
    compute_loss = partial(fsdd_loss, process=process)
    if cfg.denoiser == "sparse":
        compute_loss = partial(sparse_loss, process=process, num_codes=cfg.loss_codes * model.num_tokens)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = make_optimizers(model, cfg, cfg.beta2, decay_all=True)
    start = restore_training(checkpoint, model, ema, optimizers)
    ddp = parallel(model, device, cfg)
    rows, micro_batches = local_batch(B, cfg.device_batch)
    world_size = rank_and_world_size()[1]
    log = open_log(replace_suffix(cfg.out, ".csv"), COLUMNS, start)
    progress = progress_bar(start, cfg.steps, B)
    for step in progress:
        batch = draw_batch(tokens, labels, model, rows, step, cfg)

        # forward and backward: the gradient of the mean loss over the global batch, in micro-batches
        mean = torch.zeros((), device=device)
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]  # DDP.no_sync(): all-reduce once a step
            with autocast(device, cfg.bf16):
                loss = compute_loss(ddp, batch.rows(part))
            loss = loss * ((part.stop - part.start) / B)
            (loss * world_size).backward()  # DDP divides by the world size
            mean += loss.detach()

        # clip, learning rate, step, moving average
        check_finite(clip_grad_norm_(model.parameters(), cfg.clip or math.inf), step, cfg)
        lr_scale = warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr_end)
        set_lr(optimizers, lr_scale)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(model)

        # once in a while: log, save, draw samples
        done, last = step + 1, step + 1 == cfg.steps
        if done % cfg.log_every == 0 or last:
            loss = all_reduce(mean).item()
            log({"step": done, "loss": loss, "lr": lr_scale * cfg.lr})
            progress.set_postfix_str(f"step {done}, loss {loss:.4f}", refresh=False)
        stopped = signals.received()
        if stopped or done % cfg.save_every == 0 or last:
            save_training(header, done, cfg, model, ema, optimizers)
            if stopped:
                stop_by_signal(stopped, cfg.out)
        if done % cfg.picture_every == 0 or last:
            draw_samples(ema.module, tokenizer, header, device, cfg)
    return ema.module


class Batch(NamedTuple):
    """What a training step learns from: B rows of each. C includes the null code if the prior is hidden."""
    x0: torch.Tensor       # (B, C) int64, data: the counts of an image's tokens, every row sums to M
    labels: torch.Tensor   # (B,) int64, classes, some of them dropped for the null class
    t: torch.Tensor        # (B,) in (0, 1], training times
    x1: torch.Tensor       # (B, C) int64, noise (Eq. 4, or all on the null code), every row sums to M
    uniform: torch.Tensor  # (B, C) in [0, 1), decides the draw of X_t
    order: torch.Tensor    # (B, C) in [0, 1), decides which codes the sparse loss looks at

    def rows(self, part):
        """The rows of a slice, such as a micro-batch."""
        return Batch(*(field[part] for field in self))


def draw_batch(tokens, labels, model, rows, step, cfg):
    """This rank's rows of the global batch of a step.

    Every rank draws all random numbers of the global batch, so that they are the same for any number of ranks.
    """
    B, C, M, device = cfg.batch_size, model.codebook_size, model.num_tokens, model.code_embedding.device
    (noise, _), random = PROCESS[cfg.prior], generator(device, "step", cfg.seed, step)
    indices = batch_indices(len(labels), B, cfg.seed, step)[rows]
    u_mirror, u_drop, u_time = torch.rand(3, B, generator=random, device=device)[:, rows]  # each (n,)
    version = (u_mirror * len(tokens)).long().cpu()  # 0: the image; 1, if tokens has it: its mirror image
    x = torch.from_numpy(tokens[version.numpy(), indices.numpy()].astype(np.int64)).to(device)  # (n, M)
    y = torch.where(u_drop < cfg.label_drop, model.num_classes, labels[indices].to(device))
    x1 = noise(B, C, M, cfg.prior, random, device)[rows]
    uniform, order = (torch.rand(B, C, generator=random, device=device)[rows] for _ in range(2))
    t = flip_times(u_time) if cfg.training_times == "flips" else 1 - u_time
    return Batch(tokens_to_counts(x, C), y, t, x1, uniform, order)


@torch.no_grad()
def evaluate(model, tokenizer, dataset, device, cfg):
    """The loss on a dataset, always over all codes and at uniform times, so that runs can be compared. Each image gets
    one time and one noise vector, the same at every call."""
    (rank, world_size), C, M = rank_and_world_size(), model.codebook_size, model.num_tokens
    noise, process = PROCESS[cfg.prior]
    total = torch.zeros((), dtype=torch.float64, device=device)
    parts = chunks(slice(0, len(dataset)), min(250, max(1, 2 ** 18 // C)))[rank::world_size]
    for part, (images, labels) in zip(parts, read_slices(dataset, parts, cfg.workers)):
        random = generator(device, "test", cfg.seed, part.start)
        t = 1 - torch.rand(len(images), generator=random, device=device)
        x1 = noise(len(images), C, M, cfg.prior, random, device)
        uniform = torch.rand(x1.shape, generator=random, device=device)
        with autocast(device, cfg.bf16):
            x0 = tokens_to_counts(tokenizer.encode(images.to(device) / 127.5 - 1), C)
            batch = Batch(x0, labels.to(device), t, x1, uniform, order=None)
            total += fsdd_loss(model, batch, process) * len(images)
    return all_reduce(total).item() / len(dataset)


def draw_samples(model, tokenizer, header, device, cfg):
    """A page of samples, a row for each of up to ten classes."""
    if is_main():
        class_names, settings = header["class_names"], refine_arguments(header["generation"])
        classes = torch.arange(len(class_names))[:: -(-len(class_names) // 10)]
        random = generator(device, "sample", cfg.seed)
        with autocast(device, cfg.bf16):
            counts = torch.cat([generate(model, labels, **settings, generator=random)
                                for labels in classes.repeat_interleave(10).to(device).split(cfg.device_batch)])
        page = grid(decode(tokenizer, counts_to_tokens(counts)), 10, [class_names[i] for i in classes])
        save(page, replace_suffix(cfg.out, ".png"))


if __name__ == "__main__":
    run(main)
