"""Stage 2: train Fixed-Sum Discrete Diffusion on the token sets of stage 1 (Sec. 3.3, 4.1). tokenizer.pt -> fsdd.pt

    python train_fsdd.py                          after train_tokenizer.py
    torchrun --nproc_per_node=8 train_fsdd.py     eight processes, the same training
    python train_fsdd.py --resume                 resume a run that was interrupted

Every training image is encoded once (tokens.npy, kept for the next run with the same tokenizer and images). After that
no training image is read. Writes fsdd.pt (weights, their moving average, the tokenizer: all that sample.py and --resume
need), fsdd.csv (a log) and fsdd.png (samples). On the digits: 4 to 5 minutes on two CPU cores (README.md).
"""
import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from beyond import flip_times, sparse_loss, start_from_codebook
from data.loader import batch_indices, open_datasets, read_slices
from data.token_sets import check_token_file, encode_training_set
from dual_transform import set_bits, tokens_to_counts
from fsdd import fsdd_loss
from sample import DENOISERS, NOISES, choose_labels, default_settings, draw_images, load_tokenizer, make_sampler
from support.command_line import HARDWARE, parse, stop
from support.distributed import all_reduce, chunks, is_main, local_batch, rank_and_world_size
from support.files import load_checkpoint
from support.hardware import autocast, init_distributed, parallel
from support.optimizers import make_optimizers, set_lr, warmup_cosine
from support.pictures import save_samples
from support.seeds import generator
from support.training import (Signals, check_training, keep_previous, open_log, progress_bar, replace_suffix,
                              restore_training, run, save_training, stop_by_signal)

HYPERPARAMETERS = [
    # name               digits    emoji    imagenet256    allowed             meaning
    ("tokenizer",        "tokenizer.pt", "tokenizer.pt", "tokenizer.pt", "",   "checkpoint of stage 1"),
    ("data",             "digits", "emoji", "data/imagenet", "",               "digits, emoji, or a folder"),
    ("flip",             False,    True,    True,          "",                 "learn from mirrored images too"),
    # denoiser; imagenet256: the paper's S, 36.0 million parameters. B, 136.7 million, has width 768 and 12 heads
    ("width",            96,       96,      384,           "[1, inf)",         "width of the denoiser"),
    ("layers",           2,        3,       12,            "[1, inf)",         "its number of blocks"),
    ("heads",            3,        3,       6,             "[1, inf)",         "attention heads of a block"),
    ("unused_rows",      False,    False,   True,          "",                 "C + 1 rows in the count embedding"),
    ("gelu",             "exact",  "exact", "tanh",        "exact | tanh",     "tanh (DiT), exact: faster on CPUs"),
    ("label_drop",       0.1,      0.1,     0.1,           "(0, 1]",           "share of labels that are dropped"),
    ("noise",            "multinomial", "multinomial", "multinomial", " | ".join(NOISES), "X_1; masked: masked.py"),
    # not in the paper, see beyond.py
    ("training_times",   "flips",  "flips", "uniform",     "uniform | flips",  "how t is drawn; masked: uniform"),
    ("code_start",       "codebook", "codebook", "zeros",  "zeros | codebook", "start of the code embedding"),
    ("denoiser",         "sparse", "sparse", "dense", " | ".join(DENOISERS),    "codes attend to codes, or tokens"),
    ("loss_codes",       2,        2,       3,             "[2, inf)",         "sparse: codes in the loss, times M"),
    # optimization
    ("steps",            3600,     3500,    1000000,       "[1, inf)",         "optimizer steps"),
    ("batch_size",       64,       64,      256,           "[1, inf)",         "images per step, over all processes"),
    ("device_batch",     64,       64,      32,            "[1, inf)",         "images that a process takes at once"),
    ("optimizer",        "muon",   "muon",  "adamw",       "adamw | muon",     "muon: for the blocks' matrices"),
    ("lr",               8e-3,     8e-3,    1e-4,          "(0, inf)",         "peak learning rate of adamw"),
    ("muon_lr",          5e-3,     5e-3,    1e-3,          "(0, inf)",         "peak learning rate of muon"),
    ("lr_end",           0.01,     0.01,    1.0,           "[0, 1]",           "final learning rate / peak (cosine)"),
    ("warmup",           50,       50,      0,             "[0, inf)",         "steps of linear warm-up"),
    ("beta2",            0.99,     0.99,    0.999,         "[0, 1)",           "second beta of adamw"),
    ("weight_decay",     0.01,     0.01,    0.01,          "[0, inf)",         "on all weights (the release)"),
    ("clip",             1.0,      1.0,     0.0,           "[0, inf)",         "largest gradient norm, 0 = off"),
    ("ema",              0.99,     0.99,    0.9999,        "[0, 1)",           "decay of the weights' average"),
    # what is written
    ("out",              "fsdd.pt", "fsdd.pt", "fsdd.pt",  "",                 "the checkpoint"),
    ("tokens",           "tokens.npy", "tokens.npy", "tokens.npy", "",         "the encoded training set"),
    *HARDWARE,
]
MAY_CHANGE = ("steps", "device_batch", "data", "out", "tokens")  # with --resume; the paths, if files have moved
COLUMNS = ["step", "loss", "lr"]  # of the log


def main(argv=None):
    cfg, checkpoint = parse(HYPERPARAMETERS, __doc__, "fsdd", argv, may_change=MAY_CHANGE)
    stage1 = checkpoint["tokenizer"] if checkpoint else load_checkpoint(
        cfg.tokenizer, "python train_tokenizer.py", "tokenizer")
    device, rank, _ = init_distributed(cfg.device)
    began = time.monotonic()
    try:
        tokenizer, train_set, test_set, model_config, generation = prepare(stage1, device, cfg)
        model = make_model(model_config, tokenizer, device, cfg)
        check_training(cfg, checkpoint, train_set)
        tokens = encode_training_set(tokenizer, train_set, device, cfg)  # (1 or 2, N, M)
    except ValueError as problem:
        stop(str(problem))
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    if rank == 0:
        print(f"sets of {M} tokens out of {C} codes: {set_bits(M, C):.0f} bits per image; "
              f"as sequences, {M * math.log2(C):.0f}", flush=True)
    if not checkpoint:
        keep_previous(cfg.out)
    header = {"kind": "fsdd", "denoiser": cfg.denoiser, "model_config": model_config,
              "class_names": train_set.class_names, "images": train_set.fingerprint(), "generation": generation,
              "tokenizer": {name: stage1[name] for name in ("model_config", "weights")}}
    with Signals() as signals:
        averaged = train(model, tokenizer, tokens, train_set.labels, checkpoint, header, cfg, signals)
    loss = evaluate(averaged, tokenizer, test_set, device, cfg)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {(time.monotonic() - began) / 60:.1f} min; "
              f"loss {loss:.4f} on the sets of {len(test_set)} test images")


def prepare(stage1, device, cfg):
    """The tokenizer, both datasets, the denoiser's arguments and the settings of generation. ValueError if settings do
    not fit together."""
    tokenizer = load_tokenizer(stage1, device)
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    check_token_file(cfg.tokens, C)
    codebook_size = C + 1 if cfg.noise == "masked" else C  # with the mask code
    NOISES[cfg.noise].sample_noise(1, codebook_size, M, cfg.noise)  # raises ValueError for distinct codes and M > C
    generation = default_settings("masked" if cfg.noise == "masked" else cfg.recipe, cfg.noise)
    train_set, test_set = open_datasets(cfg, tokenizer.image_size)
    if train_set.channels != tokenizer.channels:
        raise ValueError(f"the images of {cfg.data} have {train_set.channels} channels, those of {cfg.tokenizer} "
                         f"{tokenizer.channels}; give the --data that it was trained on")
    if stage1.get("class_names", train_set.class_names) != train_set.class_names and is_main():
        print(f"{cfg.tokenizer} was trained on images of other classes than {cfg.data}; --data names other images")
    model_config = dict(codebook_size=codebook_size, num_tokens=M, num_classes=len(train_set.class_names),
                        width=cfg.width, layers=cfg.layers, heads=cfg.heads, unused_rows=cfg.unused_rows,
                        gelu=cfg.gelu)
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
    B, device, model_config = cfg.batch_size, model.code_embedding.device, header["model_config"]
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = make_optimizers(model, cfg, cfg.beta2, decay_all=True)
    start = restore_training(checkpoint, model, ema, optimizers)
    ddp, mixed_precision = parallel(model, device, cfg), autocast(device, cfg.bf16)
    rows, micro_batches = local_batch(B, cfg.device_batch)
    world_size = rank_and_world_size()[1]
    log = open_log(replace_suffix(cfg.out, ".csv"), COLUMNS, start)
    progress = progress_bar(start, cfg.steps, B)
    for step in progress:
        batch = draw_batch(tokens, labels, model_config, rows, step, device, cfg)

        # forward and backward: the gradient of the mean loss over the global batch, in micro-batches
        mean = torch.zeros((), device=device)
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]  # DDP.no_sync(): all-reduce once a step
            some = Batch(*(field[part] for field in batch))
            with mixed_precision:
                if cfg.denoiser == "sparse":
                    loss = sparse_loss(ddp, some, cfg.loss_codes * model.num_tokens)
                else:
                    loss = fsdd_loss(ddp, some)
            loss = loss * ((part.stop - part.start) / B)
            (loss * world_size).backward()  # DDP divides by the world size
            mean += loss.detach()

        # clip (the norm is that of the global batch, the same on all ranks), learning rate, step, moving average
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf, error_if_nonfinite=True)
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
        if cfg.picture_every and (done % cfg.picture_every == 0 or last):
            draw_samples(ema.module, tokenizer, header, cfg)
    return ema.module


class Batch(NamedTuple):
    """What a training step learns from: B rows of each. C includes the mask code if the noise is masked."""
    x0: torch.Tensor       # (B, C) int64, data: the counts of an image's tokens, every row sums to M
    x_t: torch.Tensor      # (B, C) int64, between data and noise (Eq. 5-6, Algorithm 1), every row sums to M
    t: torch.Tensor        # (B,) in (0, 1], training times
    labels: torch.Tensor   # (B,) int64, classes, some of them dropped for the null class
    u_codes: torch.Tensor  # (B, C) in [0, 1), decides which codes the sparse loss looks at


def draw_batch(tokens, labels, model_config, rows, step, device, cfg):
    """This rank's rows of the global batch of a step.

    tokens (1 or 2, N, M), labels (N,): the training set, its mirror images second.  model_config: the denoiser's.
    Every rank draws all random numbers of the global batch, so that they are the same for any number of ranks.
    """
    B, C, M = cfg.batch_size, model_config["codebook_size"], model_config["num_tokens"]
    noise, random = NOISES[cfg.noise], generator(device, "step", cfg.seed, step)
    indices = batch_indices(len(labels), B, cfg.seed, step)[rows]
    mirrored = torch.randint(len(tokens), (B,), generator=generator("cpu", "mirror", cfg.seed, step))[rows]
    x = torch.from_numpy(tokens[mirrored.numpy(), indices.numpy()].astype(np.int64)).to(device)  # (n, M)
    u_drop, u_time = torch.rand(2, B, generator=random, device=device)[:, rows]  # each (n,)
    x0 = tokens_to_counts(x, C)
    x1 = noise.sample_noise(B, C, M, cfg.noise, random, device)[rows]
    u_noise, u_codes = (torch.rand(B, C, generator=random, device=device)[rows] for _ in range(2))
    flips = cfg.training_times == "flips" and cfg.noise != "masked"
    t = flip_times(u_time) if flips else 1 - u_time
    x_t = noise.forward_process(x0, x1, t, u_noise)
    y = torch.where(u_drop < cfg.label_drop, model_config["num_classes"], labels[indices].to(device))
    return Batch(x0, x_t, t, y, u_codes)


@torch.no_grad()
def evaluate(model, tokenizer, dataset, device, cfg):
    """The loss on a dataset, always over all codes and at uniform times, so that runs can be compared. Each image gets
    one time and one noise vector, the same at every call."""
    (rank, world_size), C, M = rank_and_world_size(), model.codebook_size, model.num_tokens
    noise = NOISES[cfg.noise]
    total = torch.zeros((), dtype=torch.float64, device=device)
    parts = chunks(slice(0, len(dataset)), min(250, max(1, 2 ** 18 // C)))[rank::world_size]
    for part, (images, labels) in zip(parts, read_slices(dataset, parts, cfg.workers)):
        random = generator(device, "test", cfg.seed, part.start)
        t = 1 - torch.rand(len(images), generator=random, device=device)
        x1 = noise.sample_noise(len(images), C, M, cfg.noise, random, device)
        u_noise = torch.rand(x1.shape, generator=random, device=device)
        with autocast(device, cfg.bf16):
            x0 = tokens_to_counts(tokenizer.encode(images.to(device) / 127.5 - 1), C)
            batch = Batch(x0, noise.forward_process(x0, x1, t, u_noise), t, labels.to(device), u_codes=None)
            total += fsdd_loss(model, batch) * len(images)
    return all_reduce(total).item() / len(dataset)


def draw_samples(model, tokenizer, header, cfg):
    """A page of samples, a row for each of up to ten classes."""
    if is_main():
        class_names, refine = header["class_names"], make_sampler(header["generation"])
        labels = choose_labels(None, 100, class_names, at_most=10)
        images = [draw_images(model, tokenizer, part, refine, chunk, cfg)[-1]
                  for chunk, part in enumerate(labels.split(cfg.device_batch))]
        save_samples(replace_suffix(cfg.out, ".png"), torch.cat(images)[None], labels, class_names)


if __name__ == "__main__":
    run(main)
