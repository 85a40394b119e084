"""Stage 1: train the set tokenizer (Sec. 3.1, 4.1). Images -> tokenizer.pt

    python train_tokenizer.py                          the embedded digits
    python train_tokenizer.py --recipe emoji           the embedded emoji, or small pictures (--data FOLDER)
    torchrun --nproc_per_node=8 train_tokenizer.py     eight processes, the same training
    python train_tokenizer.py --resume                 resume a run that was interrupted

Two phases, as in TiTok (arXiv 2406.07550), one after the other:

    proxy codes   the whole tokenizer learns to predict the codes that MaskGIT-VQGAN gives the image
    pixels        encoder and codebook are frozen; the decoders learn the pixels: squared error, perceptual and
                  adversarial loss

With proxy_steps 0 there is no first phase and the whole tokenizer learns the pixels from the first step: digits, emoji.

Writes tokenizer.pt (weights, their moving average, all that --resume needs), tokenizer.csv (a log) and tokenizer.png
(test images above their reconstructions). On the digits: 4 to 7 minutes on two CPU cores, mean squared
error 0.033 to 0.039 depending on the seed (README.md).
"""
import math
import time

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.loader import open_datasets, read_ahead, read_slices, training_batches
from dual_transform import tokens_to_counts
from published.losses import load_networks
from support.command_line import HARDWARE, parse, stop
from support.distributed import all_reduce, chunks, is_main, local_batch, rank_and_world_size, shard
from support.hardware import autocast, init_distributed, parallel
from support.optimizers import make_optimizers, set_lr, warmup_cosine
from support.pictures import grid, save, to_uint8
from support.seeds import generator
from support.training import (Signals, check_training, keep_previous, open_log, progress_bar, replace_suffix,
                              restore_training, run, save_training, stop_by_signal)
from tokenizer import SetTokenizer

HYPERPARAMETERS = [
    # name               digits    emoji    imagenet256     allowed         meaning
    ("data",             "digits", "emoji", "data/imagenet", "",            "digits, emoji, or a folder"),
    ("image_size",       28,       32,      256,            "[1, inf)",     "side of an image, pixels"),
    # the set
    ("num_tokens",       32,       64,      128,            "[1, inf)",     "M, tokens in a set"),
    ("codebook_size",    256,      2048,    4096,           "[1, inf)",     "C, codes in the codebook"),
    ("code_dim",         3,        4,       12,             "[1, inf)",     "dimensions of a code"),
    # the two transformers
    ("patch_size",       7,        8,       16,             "[1, inf)",     "side of a patch, pixels"),
    ("width",            128,      128,     768,            "[1, inf)",     "width of encoder and decoder"),
    ("heads",            4,        4,       12,             "[1, inf)",     "attention heads"),
    ("encoder_layers",   2,        2,       12,             "[1, inf)",     "blocks of the encoder"),
    ("decoder_layers",   3,        3,       12,             "[1, inf)",     "blocks of the decoder"),
    # published networks, files in PyTorch's format; "" = none
    ("vqgan",            "",       "",      "maskgit-vqgan-imagenet-f16-256.bin", "", "MaskGIT-VQGAN"),
    ("convnext",         "",       "",      "convnext_small-0c510722.pth", "", "torchvision's ConvNeXt-S"),
    # phase 1, proxy codes: cross-entropy, and the losses of the set
    ("proxy_steps",      0,        0,       500000,         "[0, inf)",     "steps of phase 1, 0 = no phase 1"),
    ("proxy_warmup",     0,        0,       10000,          "[0, inf)",     "steps of linear warm-up"),
    ("proxy_beta2",      0.99,     0.99,    0.99,           "[0, 1)",       "second beta of adamw"),
    # phase 2, pixels: the weighted sum of these losses and, without a phase 1, the losses of the set
    ("squared",          1.0,      1.0,     0.25,           "[0, inf)",     "weight of the squared error of pixels"),
    ("absolute",         1.0,      0.0,     0.0,            "[0, inf)",     "weight of the absolute error (ours)"),
    ("perceptual",       0.0,      0.0,     0.1,            "[0, inf)",     "weight of the perceptual loss"),
    ("adversarial",      0.0,      0.0,     0.01,           "[0, inf)",     "weight of the adversarial loss"),
    ("adversarial_from", 0,        0,       20000,          "[0, inf)",     "step of phase 2 that switches it on"),
    ("discriminator",    128,      128,     128,            "[32, inf)",    "width of the discriminator's first layer"),
    ("lecam",            0.001,    0.001,   0.001,          "[0, inf)",     "weight of the LeCam regularization"),
    ("lecam_ema",        0.999,    0.999,   0.999,          "[0, 1)",       "decay of LeCam's moving averages"),
    # the set's own losses
    ("commitment",       0.25,     0.25,    0.25,           "[0, inf)",     "weight of the commitment loss"),
    ("uniformity",       0.1,      0.1,     0.0,            "[0, inf)",     "weight of uniformity() (ours)"),
    ("unquantized",      0.5,      0.5,     0.0,            "[0, 1]",       "share of images that skip the quantizer"),
    # optimization
    ("steps",            3200,     5000,    1000000,        "[1, inf)",     "optimizer steps, of both phases"),
    ("batch_size",       32,       32,      256,            "[1, inf)",     "images per step, over all processes"),
    ("device_batch",     32,       32,      32,             "[1, inf)",     "images that a process takes at once"),
    ("optimizer",        "muon",   "muon",  "adamw",        "adamw | muon", "muon: for the blocks' matrices"),
    ("lr",               2e-3,     2e-3,    1e-4,           "(0, inf)",     "peak learning rate of adamw"),
    ("muon_lr",          5e-3,     5e-3,    1e-3,           "(0, inf)",     "peak learning rate of muon"),
    ("lr_end",           0.01,     0.01,    0.1,            "[0, 1]",       "final learning rate of a phase / peak"),
    ("warmup",           50,       50,      5000,           "[0, inf)",     "steps of linear warm-up (phase 2)"),
    ("beta2",            0.99,     0.99,    0.999,          "[0, 1)",       "second beta of adamw (phase 2)"),
    ("weight_decay",     1e-4,     1e-4,    1e-4,           "[0, inf)",     "on matrices only"),
    ("clip",             1.0,      1.0,     1.0,            "[0, inf)",     "largest norm of the gradient, 0 = off"),
    ("ema",              0.99,     0.99,    0.999,          "[0, 1)",       "decay of the weights' moving average"),
    # images
    ("flip",             False,    True,    True,           "",             "mirror images at random"),
    # what is written
    ("out",              "tokenizer.pt", "tokenizer.pt", "tokenizer.pt", "", "the checkpoint"),
    *HARDWARE,
]
MODEL = ("image_size", "num_tokens", "codebook_size", "code_dim", "patch_size", "width", "heads", "encoder_layers",
         "decoder_layers", "commitment")  # the arguments of SetTokenizer that are settings
MAY_CHANGE = ("steps", "device_batch", "data", "vqgan", "convnext", "out")  # with --resume; the paths, if files moved
COLUMNS = ["step", "loss", "mse", "proxy", "perceptual", "adversarial", "discriminator", "quantizer", "psnr",
           "codes_in_use", "lr"]  # of the log; empty where a phase does not have it


def main(argv=None, model_class=SetTokenizer, kind="tokenizer"):
    """model_class, kind: another tokenizer, and the kind of its checkpoints (paper/layouts.py)."""
    cfg, checkpoint = parse(HYPERPARAMETERS, __doc__, kind, argv, may_change=MAY_CHANGE)
    device, rank, _ = init_distributed(cfg.device)
    began, start = time.monotonic(), checkpoint["step"] if checkpoint else 0
    try:
        vqgan, pixel_losses = load_networks(cfg, checkpoint, device)
        train_set, test_set = open_datasets(cfg, cfg.image_size, crop="random", flip=cfg.flip, seed=cfg.seed)
        model, model_config = make_model(cfg, checkpoint, train_set.channels, vqgan, device, model_class)
        check_training(cfg, checkpoint, train_set)
    except ValueError as problem:
        stop(str(problem))
    header = {"kind": kind, "model_config": model_config, "class_names": train_set.class_names,
              "images": train_set.fingerprint()}
    if not checkpoint:
        keep_previous(cfg.out)
    log = open_log(replace_suffix(cfg.out, ".csv"), COLUMNS, start)
    with Signals() as signals:
        if start < cfg.proxy_steps:
            model = train_phase(model, vqgan, None, train_set, test_set, checkpoint, header, cfg, log, signals)
        if cfg.proxy_steps < cfg.steps:
            model = train_phase(model, None, pixel_losses, train_set, test_set, checkpoint, header, cfg, log, signals)
    mse, in_use, distinct = evaluate(model, test_set, device, cfg.workers)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {(time.monotonic() - began) / 60:.1f} min; on {len(test_set)} test "
              f"images: mean squared error {mse:.4f} (PSNR {psnr(mse):.2f} dB), {in_use:.1%} of the "
              f"{cfg.codebook_size} codes in use, {distinct:.1f} distinct codes in a set of {cfg.num_tokens}")


def make_model(cfg, checkpoint, channels, vqgan, device, model_class=SetTokenizer):
    """The tokenizer, with the averaged weights of a checkpoint if there is one, and its arguments. ValueError if the
    settings do not fit together."""
    model_config = {"channels": channels} | {name: getattr(cfg, name) for name in MODEL}
    if vqgan:
        model_config |= {"vqgan_width": vqgan.width, "vqgan_dim": vqgan.dim}
    if checkpoint:
        model_config = checkpoint["model_config"]
    torch.manual_seed(cfg.seed)
    model = model_class(**model_config)
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
    elif vqgan:
        model.pixel_decoder.load_state_dict(vqgan.decoder.state_dict())
    return model.to(device), model_config


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_phase(model, vqgan, pixel_losses, train_set, test_set, checkpoint, header, cfg, log, signals):
    """The training loop of one phase. Returns the model with averaged weights.

    Phase 1, if vqgan is given: the tokenizer learns to predict the codes that MaskGIT-VQGAN gives the image.
    Phase 2, with None: the decoder learns the pixels; without a phase 1, as for the digits, the whole tokenizer does.
    """
    B, C, device, proxy = cfg.batch_size, cfg.codebook_size, model.quantizer.codebook.device, vqgan is not None
    first, end, warmup = (0, cfg.proxy_steps, cfg.proxy_warmup) if proxy else (cfg.proxy_steps, cfg.steps, cfg.warmup)
    ddp, ema, optimizers, start = start_phase(model, checkpoint, cfg, proxy)
    rows, micro_batches = local_batch(B, cfg.device_batch)
    world_size = rank_and_world_size()[1]
    batches = training_batches(train_set, B, rows, cfg.seed, start, end, cfg.workers)
    progress = progress_bar(start, end, B)
    for step, (images, _) in zip(progress, batches):
        images, shuffle, unquantized = prepare_batch(images, rows, step, device, cfg)

        # forward and backward: the gradient of the mean loss over the global batch, in micro-batches
        means, use = torch.zeros(3, device=device), torch.zeros(C, dtype=torch.int64, device=device)
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]  # DDP.no_sync(): all-reduce once a step
            with autocast(device, cfg.bf16):
                decoded, tokens, latents, quantizer_loss = ddp(images[part], shuffle[part], proxy, unquantized[part])
            if proxy:
                error = F.cross_entropy(vqgan.logits(decoded), vqgan.encode(images[part]))
                loss = error
            else:
                decoded = decoded.float()
                error = F.mse_loss(decoded, images[part])
                loss = cfg.squared * error + cfg.absolute * F.l1_loss(decoded, images[part])
                loss = loss + pixel_losses(decoded, images[part], step)  # perceptual, adversarial; digits, emoji: 0
            loss = loss + quantizer_loss + cfg.uniformity * uniformity(latents)
            (loss * (len(tokens) / B) * world_size).backward()  # DDP divides by the world size
            means += torch.stack([loss, error, quantizer_loss]).detach() * (len(tokens) / B)
            use += tokens_to_counts(tokens, C).sum(0)

        # clip (the norm is that of the global batch, the same on all ranks), learning rate, step, moving average,
        # discriminator
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf, error_if_nonfinite=True)
        lr_scale = warmup_cosine(step - first, end - first, warmup, cfg.lr_end)
        set_lr(optimizers, lr_scale)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(model)
        more = {} if proxy else pixel_losses.train_discriminator(images, step)

        # once in a while: log, save, reconstruct test images
        done, last = step + 1, step + 1 == end
        if done % cfg.log_every == 0 or last:
            losses = dict(zip(("loss", "proxy" if proxy else "mse", "quantizer"), means)) | more
            report(log, progress, done, losses, use, lr_scale * cfg.lr)
        stopped = signals.received()
        if stopped or done % cfg.save_every == 0 or last:
            others, state = ([], {}) if proxy else (pixel_losses.optimizers, pixel_losses.state())
            save_training(header, done, cfg, model, ema, optimizers + others, **state)
            if stopped:
                stop_by_signal(stopped, cfg.out)
        if cfg.picture_every and (done % cfg.picture_every == 0 or last):
            draw_reconstructions(ema.module, test_set, device, replace_suffix(cfg.out, ".png"))
    return ema.module


def start_phase(model, checkpoint, cfg, proxy):
    """What a phase starts with: the model in DDP, the moving average of its weights, optimizers, and the step to start
    at, all restored from a checkpoint if that is of this phase."""
    model.pixel_decoder.requires_grad_(not proxy)
    for module in (model.encoder, model.quantizer):  # after phase 1 the tokens stay as they are
        module.requires_grad_(proxy or not cfg.proxy_steps)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = make_optimizers(model, cfg, cfg.proxy_beta2 if proxy else cfg.beta2)
    start = restore_training(checkpoint, model, ema, optimizers, 0 if proxy else cfg.proxy_steps)
    return parallel(model, model.quantizer.codebook.device, cfg), ema, optimizers, start


def prepare_batch(images, rows, step, device, cfg):
    """This rank's images (n, ch, H, W) in [-1, 1], random numbers (n, M) for the order of their tokens, and which of
    them skip the quantizer, (n,) bool. Every rank draws the random numbers of the global batch, so that they are the
    same for any number of ranks."""
    images = images.to(device, non_blocking=True) / 127.5 - 1
    random = generator(device, "step", cfg.seed, step)
    shuffle = torch.rand(cfg.batch_size, cfg.num_tokens, generator=random, device=device)[rows]
    unquantized = torch.rand(cfg.batch_size, generator=random, device=device)[rows] < cfg.unquantized
    return images, shuffle, unquantized


def report(log, progress, done, means, use, lr):
    """A row of the log and the text of the progress bar. means: this rank's part of the mean of each loss, by name.
    use: how often the codes occur in this rank's part of the batch, (C,)."""
    means = {name: all_reduce(value).item() for name, value in means.items()}
    in_use = (all_reduce(use) > 0).double().mean().item()
    text = f"step {done}, loss {means['loss']:.4f}"
    if "mse" in means:
        means["psnr"] = psnr(means["mse"])
        text += f", PSNR {means['psnr']:.2f} dB"
    log({"step": done, **means, "codes_in_use": in_use, "lr": lr})
    progress.set_postfix_str(f"{text}, codes in use {in_use:.0%}", refresh=False)


def uniformity(latents):
    """How crowded an image's latents (B, M, code_dim) of length 1 are: the mean of exp(-|a - b|^2) over all pairs, in
    (0, 1]. This is the uniformity of Wang and Isola (arXiv 2005.10242), with t = 1 and without the logarithm.

    Without it, small tokenizers give many of an image's tokens the same few codes.
    """
    cosines = latents @ latents.transpose(1, 2)  # (B, M, M)
    return (2 * (cosines - 1)).exp().mean()  # |a - b|^2 = 2 - 2 cos


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def psnr(mse):
    """Peak signal-to-noise ratio in decibels; pixels in [-1, 1] span 2, and 2^2 = 4."""
    return 10 * math.log10(4 / mse) if 0 < mse < math.inf else math.nan


@torch.no_grad()
def evaluate(model, dataset, device, workers=0):
    """Mean squared error over a dataset, the share of codes in use, and the mean number of distinct codes in a set."""
    squared, distinct, use = (torch.zeros(n, dtype=torch.float64, device=device) for n in (1, 1, model.codebook_size))
    at_once = min(250, max(1, 2 ** 20 // model.image_size ** 2))  # a million pixels, to bound memory
    parts = chunks(shard(len(dataset), *rank_and_world_size()), at_once)
    for images, _ in read_slices(dataset, parts, workers):
        images = images.to(device) / 127.5 - 1
        tokens = model.encode(images)
        squared += (model.decode(tokens) - images).square().mean((1, 2, 3)).sum()
        counts = tokens_to_counts(tokens, model.codebook_size)
        distinct += (counts > 0).sum()
        use += counts.sum(0)
    squared, distinct, use = map(all_reduce, (squared, distinct, use))
    return squared.item() / len(dataset), (use > 0).double().mean().item(), distinct.item() / len(dataset)


def draw_reconstructions(model, dataset, device, path):
    """A page of up to 10 test images, and below them their reconstructions from the tokens."""
    if is_main():
        columns = min(10, len(dataset))
        spread = [(i * len(dataset) // columns, 0) for i in range(columns)]
        images = next(read_ahead(dataset, [spread], workers=0))[0].to(device)
        decoded = to_uint8(model.decode(model.encode(images / 127.5 - 1)))
        save(grid(torch.cat([images, decoded]), columns, ["image", "decoded"]), path)


if __name__ == "__main__":
    run(main)
