"""Stage 1: train the set tokenizer (Sec. 3.1, 4.1). Images -> tokenizer.pt

    python train_tokenizer.py                          the embedded digits
    torchrun --nproc_per_node=8 train_tokenizer.py     eight processes, the same training
    python train_tokenizer.py --resume                 resume a run that was interrupted

Two phases, as in TiTok (arXiv 2406.07550), one after the other:

    proxy codes   the whole tokenizer learns to predict the codes that MaskGIT-VQGAN gives the image
    pixels        encoder and codebook are frozen; the decoders learn the pixels: squared error, perceptual and
                  adversarial loss

With proxy_steps 0 there is no first phase and the whole tokenizer learns the pixels from the first step: the digits.

Writes tokenizer.pt (weights, their moving average, all that --resume needs), tokenizer.csv (a log) and tokenizer.png
(test images above their reconstructions). On the digits: 5 minutes on two CPU cores, mean squared error 0.036
(README.md).
"""
import math
import time

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import common
from data import records
from data.pictures import draw_reconstructions
from data.reading import in_order, loader, open_datasets
from dual_transform import tokens_to_counts
from published.critics import load_networks
from tokenizer import SetTokenizer

HYPERPARAMETERS = [
    # name               digits         imagenet256       meaning
    ("data",             "digits",      "data/imagenet",  "digits, or a folder with train/CLASS/* and val/CLASS/*"),
    ("image_size",       28,            256,              "side of an image, pixels"),
    # the set
    ("num_tokens",       32,            128,              "M, tokens in a set"),
    ("codebook_size",    256,           4096,             "C, codes in the codebook"),
    ("code_dim",         3,             12,               "dimensions of a code"),
    # the two transformers
    ("patch_size",       7,             16,               "side of a patch, pixels"),
    ("width",            128,           768,              "width of encoder and decoder"),
    ("heads",            4,             12,               "attention heads"),
    ("encoder_layers",   2,             12,               "blocks of the encoder"),
    ("decoder_layers",   3,             12,               "blocks of the decoder"),
    # published networks, files in PyTorch's format; "" = none
    ("vqgan",            "",            "maskgit-vqgan-imagenet-f16-256.bin", "MaskGIT-VQGAN"),
    ("convnext",         "",            "convnext_small-0c510722.pth", "torchvision's ConvNeXt-S"),
    # phase 1, proxy codes: cross-entropy + quantizer
    ("proxy_steps",      0,             500000,           "steps of this phase, 0 = pixels from the first step"),
    ("proxy_warmup",     0,             10000,            "steps of linear warm-up"),
    ("proxy_beta2",      0.99,          0.99,             "second beta of adamw"),
    # phase 2, pixels: squared error, perceptual, adversarial; without a phase 1 the losses of the set too
    ("squared",          1.0,           0.25,             "weight of the squared error (pixels span 2, TiTok's 1)"),
    ("perceptual",       0.0,           0.1,              "weight of the squared difference of ConvNeXt's logits"),
    ("adversarial",      0.0,           0.01,             "weight of the adversarial loss"),
    ("adversarial_from", 0,             20000,            "step of this phase at which the discriminator comes in"),
    ("discriminator",    128,           128,              "width of the discriminator's first layer, a multiple of 32"),
    ("lecam",            0.001,         0.001,            "weight of the LeCam regularization of the discriminator"),
    ("lecam_ema",        0.999,         0.999,            "decay of the moving averages it needs"),
    # the set's own losses
    ("commitment",       0.25,          0.25,             "weight of the commitment loss"),
    ("uniformity",       0.25,          0.0,              "weight of uniformity() (not in the paper)"),
    ("unquantized",      0.5,           0.0,              "share of images that skip the quantizer (not in the paper)"),
    ("revive_after",     20,            0,                "steps without use after which a code is reset, 0 = never"),
    ("revive_until",     0.8,           0.8,              "share of the training after which no code is reset"),
    # optimization
    ("steps",            3200,          1000000,          "optimizer steps, of both phases"),
    ("batch_size",       32,            256,              "images per step, over all processes"),
    ("device_batch",     32,            32,               "images a process takes at once; gradients accumulate"),
    ("optimizer",        "muon",        "adamw",          "adamw, or muon (blocks' matrices) and adamw (the rest)"),
    ("lr",               2e-3,          1e-4,             "peak learning rate of adamw"),
    ("muon_lr",          5e-3,          1e-3,             "peak learning rate of muon"),
    ("lr_end",           0.01,          0.1,              "final learning rate of a phase / its peak (cosine)"),
    ("warmup",           50,            5000,             "steps of linear warm-up (phase 2)"),
    ("beta2",            0.99,          0.999,            "second beta of adamw (phase 2)"),
    ("weight_decay",     1e-4,          1e-4,             "on matrices; none on norms, biases and embeddings"),
    ("clip",             1.0,           1.0,              "largest norm of the gradient"),
    ("ema",              0.99,          0.999,            "decay of the moving average of the weights"),
    ("flip",             False,         True,             "mirror images at random"),
    # what is written
    ("out",              "tokenizer.pt", "tokenizer.pt",  "the checkpoint; the log and the picture stand beside it"),
] + common.MACHINE
MODEL = ("image_size", "num_tokens", "codebook_size", "code_dim", "patch_size", "width", "heads", "encoder_layers",
         "decoder_layers", "commitment")  # what SetTokenizer is made from
COLUMNS = ["step", "loss", "mse", "proxy", "perceptual", "adversarial", "discriminator", "quantizer", "psnr",
           "codes_in_use", "lr"]  # of the log; empty where a phase does not have it


def main(argv=None, model_class=SetTokenizer, kind="tokenizer"):
    """model_class, kind: another tokenizer, and what its checkpoints are called (paper/layouts.py)."""
    cfg, checkpoint = common.parse(HYPERPARAMETERS, __doc__, kind, argv)
    device, rank, _ = common.init_distributed(cfg.device, cfg.tf32)
    began, start = time.time(), checkpoint["step"] if checkpoint else 0
    try:
        vqgan, critics = load_networks(cfg, checkpoint, device)
        train_set, test_set = open_datasets(cfg, cfg.image_size, crop="random", flip=cfg.flip, seed=cfg.seed)
        model, model_config = make_model(cfg, checkpoint, train_set.channels, vqgan, device, model_class)
        claim = records.check_training(cfg, checkpoint, train_set)  # locks cfg.out until the training ends
    except ValueError as problem:
        common.stop(str(problem))
    header = {"kind": kind, "model_config": model_config, "class_names": train_set.class_names,
              "images": train_set.fingerprint()}
    if not checkpoint:
        records.keep_previous(cfg.out)
    log = records.open_log(records.beside(cfg.out, ".csv"), COLUMNS, start)
    with claim, common.Signals() as signals:
        if start < cfg.proxy_steps:
            model = train_proxy_codes(model, vqgan, train_set, test_set, checkpoint, header, cfg, log, signals)
            del vqgan
        if cfg.proxy_steps < cfg.steps:
            model = train_pixels(model, critics, train_set, test_set, checkpoint, header, cfg, log, signals)
    mse, in_use, distinct = evaluate(model, test_set, device, cfg.workers)
    records.check_result(mse, cfg)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {(time.time() - began) / 60:.1f} min; on {len(test_set)} test images: "
              f"mean squared error {mse:.4f} (PSNR {psnr(mse):.2f} dB), {in_use:.1%} of the {cfg.codebook_size} codes "
              f"in use, {distinct:.1f} distinct codes in a set of {cfg.num_tokens}")


def make_model(cfg, checkpoint, channels, vqgan, device, model_class=SetTokenizer):
    """The tokenizer, with the averaged weights of a checkpoint if there is one, and its arguments. ValueError where
    they don't fit."""
    if checkpoint:
        model_config = checkpoint["model_config"]
    else:
        model_config = {"channels": channels} | {name: getattr(cfg, name) for name in MODEL}
        if vqgan:
            model_config |= {"vqgan_width": vqgan.width, "vqgan_dim": vqgan.dim}
    torch.manual_seed(cfg.seed)
    model = model_class(**model_config)
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
    elif vqgan:
        model.pixel_decoder.load_state_dict(vqgan.decoder.state_dict())
    common.set_switches(model, cfg)
    return model.to(device), model_config


# ---------------------------------------------------------------------------------------------------------------------
# The loops. Digits are trained by the second one alone.


def train_proxy_codes(model, vqgan, train_set, test_set, checkpoint, header, cfg, log, signals):
    """Phase 1: the tokenizer learns to predict the codes that MaskGIT-VQGAN gives the image. Returns the model with
    averaged weights."""
    B, device = cfg.batch_size, model.quantizer.codebook.device
    ddp, ema, optimizers, codes, start = start_phase(model, checkpoint, cfg, proxy=True)
    rows, micro_batches, world_size = common.shares(B, cfg.device_batch)
    batches = loader(train_set, B, rows, cfg.seed, start, cfg.proxy_steps, cfg.workers)
    progress = records.progress_bar(start, cfg.proxy_steps, B)
    for step, (images, _) in zip(progress, batches):
        # the batch: images, random numbers for the order of the tokens, and which images skip the quantizer
        images = images.to(device, non_blocking=True) / 127.5 - 1  # (rows, ch, H, W) in [-1, 1]
        random = common.generator(device, "step", cfg.seed, step)
        shuffle = torch.rand(B, cfg.num_tokens, generator=random, device=device)[rows]
        skips = torch.rand(B, generator=random, device=device)[rows] < cfg.unquantized if cfg.unquantized else None
        # forward and backward: the gradient of the mean loss over the global batch, in micro-batches
        means = torch.zeros(3, device=device)
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]  # DDP.no_sync(): all-reduce once a step
            skip = skips[part] if cfg.unquantized else None
            with common.autocast(device, cfg.bf16):
                code_map, tokens, latents, quantizer_loss = ddp(images[part], shuffle[part], True, skip)
            proxy = F.cross_entropy(vqgan.logits(code_map), vqgan.encode(images[part]))
            loss = proxy + quantizer_loss + cfg.uniformity * uniformity(latents)
            (loss * (len(tokens) / B) * world_size).backward()  # DDP divides by the world size
            means += torch.stack([loss, proxy, quantizer_loss]).detach() * (len(tokens) / B)
            codes.see(tokens, latents)
        # clip, step, learning rate, moving average, dead codes
        records.check_finite(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf), step, cfg)
        lr = optimizers[0][1].get_last_lr()[0]
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.update_parameters(model)
        codes.update(step, rows, random)
        # once in a while: log, save, reconstruct test images
        if records.due(step, cfg.log_every, cfg.proxy_steps):
            report(log, progress, step, dict(zip(("loss", "proxy", "quantizer"), means)), codes.in_use, lr)
        if signals.received() or records.due(step, cfg.save_every, cfg.proxy_steps):
            records.save_training(header, step + 1, cfg, model, ema, optimizers, idle=codes.idle)
            signals.exit_if_received(cfg.out)
        if records.due(step, cfg.picture_every, cfg.proxy_steps):
            draw_reconstructions(ema.module, test_set, device, records.beside(cfg.out, ".png"))
    return ema.module


def train_pixels(model, critics, train_set, test_set, checkpoint, header, cfg, log, signals):
    """Phase 2, the digits' only one: the decoder (without phase 1 the whole tokenizer) learns pixels. As above."""
    B, device = cfg.batch_size, model.quantizer.codebook.device
    ddp, ema, optimizers, codes, start = start_phase(model, checkpoint, cfg, proxy=False)
    rows, micro_batches, world_size = common.shares(B, cfg.device_batch)
    progress = records.progress_bar(start, cfg.steps, B)
    for step, (images, _) in zip(progress, loader(train_set, B, rows, cfg.seed, start, cfg.steps, cfg.workers)):
        # the batch: images, random numbers for the order of the tokens, and which images skip the quantizer
        images = images.to(device, non_blocking=True) / 127.5 - 1  # (rows, ch, H, W) in [-1, 1]
        random = common.generator(device, "step", cfg.seed, step)
        shuffle = torch.rand(B, cfg.num_tokens, generator=random, device=device)[rows]
        skips = torch.rand(B, generator=random, device=device)[rows] < cfg.unquantized if cfg.unquantized else None
        # forward and backward: the gradient of the mean loss over the global batch, in micro-batches
        means = torch.zeros(3, device=device)
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]  # DDP.no_sync(): all-reduce once a step
            skip = skips[part] if cfg.unquantized else None
            with common.autocast(device, cfg.bf16):
                recon, tokens, latents, quantizer_loss = ddp(images[part], shuffle[part], False, skip)
            mse = F.mse_loss(recon.float(), images[part])
            loss = cfg.squared * mse + quantizer_loss + cfg.uniformity * uniformity(latents)
            if critics:  # the paper's recipe: perceptual and adversarial loss
                loss = loss + critics.loss(recon.float(), images[part], step)
            (loss * (len(tokens) / B) * world_size).backward()  # DDP divides by the world size
            means += torch.stack([loss, mse, quantizer_loss]).detach() * (len(tokens) / B)
            codes.see(tokens, latents)
        # clip, step, learning rate, moving average, dead codes
        records.check_finite(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf), step, cfg)
        lr = optimizers[0][1].get_last_lr()[0]
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.update_parameters(model)
        codes.update(step, rows, random)
        more = critics.step(images, step) if critics else {}  # trains the discriminator
        # once in a while: log, save, reconstruct test images
        if records.due(step, cfg.log_every, cfg.steps):
            report(log, progress, step, dict(zip(("loss", "mse", "quantizer"), means)) | more, codes.in_use, lr)
        if signals.received() or records.due(step, cfg.save_every, cfg.steps):
            save_pixels(header, step + 1, cfg, model, ema, optimizers, codes, critics)
            signals.exit_if_received(cfg.out)
        if records.due(step, cfg.picture_every, cfg.steps):
            draw_reconstructions(ema.module, test_set, device, records.beside(cfg.out, ".png"))
    return ema.module


def start_phase(model, checkpoint, cfg, proxy):
    """What a phase starts with: the model in DDP, the moving average of its weights, optimizers, use of the codes, and
    the step to start at, all from a checkpoint if that is of this phase."""
    model.requires_grad_(True)
    model.pixel_decoder.requires_grad_(not proxy)
    for module in (model.encoder, model.quantizer):  # after phase 1 the tokens stay as they are
        module.requires_grad_(proxy or not cfg.proxy_steps)
    first, last = (0, cfg.proxy_steps) if proxy else (cfg.proxy_steps, cfg.steps)
    warmup, beta2 = (cfg.proxy_warmup, cfg.proxy_beta2) if proxy else (cfg.warmup, cfg.beta2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = common.make_optimizers(model, cfg, last - first, warmup, beta2)
    codes = CodeUse([model.quantizer.codebook, ema.module.quantizer.codebook], cfg)
    start = records.restore_training(checkpoint, model, ema, optimizers, first)
    if start > first:
        codes.idle.copy_(checkpoint["training"]["idle"])
    return common.parallel(model, codes.idle.device, cfg), ema, optimizers, codes, start


def save_pixels(header, done, cfg, model, ema, optimizers, codes, critics):
    """records.save_training() after a step of phase 2."""
    optimizers, state = (optimizers + critics.optimizers, critics.state()) if critics else (optimizers, {})
    records.save_training(header, done, cfg, model, ema, optimizers, idle=codes.idle, **state)


def report(log, progress, step, means, in_use, lr):
    """A row of the log and the text of the progress bar. means: this rank's part of the mean of each loss, by name."""
    means = {name: common.all_reduce(value).item() for name, value in means.items()}
    text = f"step {step + 1}, loss {means['loss']:.4f}"
    if "mse" in means:
        means["psnr"] = psnr(means["mse"])
        text += f", PSNR {means['psnr']:.2f} dB"
    log({"step": step + 1, **means, "codes_in_use": in_use.item(), "lr": lr})
    progress.set_postfix_str(f"{text}, codes in use {in_use:.0%}", refresh=False)


def uniformity(latents):
    """How crowded an image's latents (B, M, code_dim) of length 1 are: mean of exp(2 (cos - 1)) over pairs, in (0, 1].

    Without it, small tokenizers give many of an image's tokens the same few codes (Wang and Isola, arXiv 2005.10242).
    """
    cosines = latents @ latents.transpose(1, 2)  # (B, M, M)
    return (2 * (cosines - 1)).exp().mean()


class CodeUse:
    """Counts how long each code has not been used, and resets dead codes: after revive_after steps without use, a code
    is put on a latent drawn at random from the global batch, the same on every rank."""

    def __init__(self, codebooks, cfg):
        """codebooks: the model's and its moving average's, (C, code_dim) each."""
        self.codebooks, self.cfg, self.tokens, self.latents = codebooks, cfg, [], []
        self.idle = torch.zeros(len(codebooks[0]), dtype=torch.int64, device=codebooks[0].device)  # (C,) steps

    def see(self, tokens, latents):
        """Tokens (B, M) and latents (B, M, code_dim) of a micro-batch."""
        self.tokens.append(tokens.flatten())
        self.latents.append(latents.detach().flatten(0, 1))

    def update(self, step, rows, random):
        """After a step: set in_use, the share of codes that the global batch uses, and reset dead codes."""
        used = common.all_reduce(torch.cat(self.tokens).bincount(minlength=len(self.idle))) > 0  # (C,)
        self.idle = torch.where(used, 0, self.idle + 1)
        self.in_use = used.float().mean()
        if self.cfg.revive_after and self.codebooks[0].requires_grad and step < self.cfg.revive_until * self.cfg.steps:
            self.revive(torch.cat(self.latents), rows, random)
        self.tokens, self.latents = [], []

    def revive(self, latents, rows, random):
        dead = self.idle >= self.cfg.revive_after  # (C,)
        if not dead.any():
            return
        M = self.cfg.num_tokens
        pick = torch.randint(self.cfg.batch_size * M, dead.shape, generator=random, device=dead.device)  # one for each
        here = (pick >= rows.start * M) & (pick < rows.stop * M)
        chosen = torch.zeros_like(self.codebooks[0].data)
        chosen[here] = latents[pick[here] - rows.start * M]
        common.all_reduce(chosen)
        for codebook in self.codebooks:
            codebook.data[dead] = chosen[dead]
        self.idle[dead] = 0


def psnr(mse):
    """Peak signal-to-noise ratio in decibels; pixels in [-1, 1] span 2, and 2^2 = 4."""
    return 10 * math.log10(4 / mse) if 0 < mse < math.inf else math.nan


@torch.no_grad()
def evaluate(model, dataset, device, workers=0):
    """Mean squared error over a dataset, the share of codes in use, and the mean number of distinct codes in a set."""
    squared, distinct, use = (torch.zeros(n, dtype=torch.float64, device=device) for n in (1, 1, model.codebook_size))
    at_once = min(250, max(1, 2 ** 20 // model.image_size ** 2))  # a million pixels, for the memory's sake
    parts = common.chunks(common.shard(len(dataset), *common.rank_and_world_size()), at_once)
    for images, _ in in_order(dataset, parts, workers):
        images = images.to(device) / 127.5 - 1
        tokens = model.encode(images)
        squared += (model.decode(tokens) - images).square().mean((1, 2, 3)).sum()
        counts = tokens_to_counts(tokens, model.codebook_size)
        distinct += (counts > 0).sum()
        use += counts.sum(0)
    squared, distinct, use = map(common.all_reduce, (squared, distinct, use))
    return squared.item() / len(dataset), (use > 0).double().mean().item(), distinct.item() / len(dataset)


if __name__ == "__main__":
    common.run(main)
