"""Stage 1: train the set tokenizer (Sec. 3.1, 4.1). Images -> tokenizer.pt

    python train_tokenizer.py                          the embedded digits
    torchrun --nproc_per_node=8 train_tokenizer.py     eight processes, the same training
    python train_tokenizer.py --resume                 go on where a run was cut off

Two phases, as in TiTok (arXiv 2406.07550), the second by itself when the first ends:

    proxy codes   the whole tokenizer learns to predict the codes that MaskGIT-VQGAN gives the image
    pixels        encoder and codebook are frozen; the decoders learn the pixels: squared error, perceptual and adversarial loss

With proxy_steps 0 there is no first phase and the whole tokenizer learns the pixels from the first step; the digits do that.

Writes tokenizer.pt (weights, their moving average, all that --resume needs), tokenizer.csv (a log) and tokenizer.png
(test images above their reconstructions). On the digits: 4 minutes on two CPU cores, mean squared error 0.056 (README.md).
"""
import math
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import common
from data.reading import in_order, loader, open_datasets, read_ahead
from dual_transform import tokens_to_counts
from published.convnext import load_convnext
from published.discriminator import Discriminator
from published.maskgit_vqgan import load_vqgan
from tokenizer import SetTokenizer

HYPERPARAMETERS = [
    # name               digits         imagenet256       meaning
    ("data",             "digits",      "data/imagenet",  "digits, or a folder that holds train/CLASS/* and val/CLASS/*"),
    ("image_size",       28,            256,              "side of an image, pixels"),
    # the set
    ("num_tokens",       32,            128,              "M, tokens in a set"),
    ("codebook_size",    96,            4096,             "C, codes in the codebook"),
    ("code_dim",         4,             12,               "dimensions of a code"),
    # the two transformers
    ("patch_size",       7,             16,               "side of a patch, pixels"),
    ("width",            128,           768,              "width of encoder and decoder"),
    ("heads",            4,             12,               "attention heads"),
    ("encoder_layers",   2,             12,               "blocks of the encoder"),
    ("decoder_layers",   3,             12,               "blocks of the decoder"),
    # published networks, files in PyTorch's format; "" = none
    ("vqgan",            "",            "maskgit-vqgan-imagenet-f16-256.bin", "MaskGIT-VQGAN: gives the proxy codes, and draws"),
    ("convnext",         "",            "convnext_small-0c510722.pth", "ConvNeXt-S of torchvision, for the perceptual loss"),
    # phase 1, proxy codes: cross-entropy + quantizer
    ("proxy_steps",      0,             500000,           "steps of this phase, 0 = pixels from the first step"),
    ("proxy_warmup",     0,             10000,            "steps of linear warm-up"),
    ("proxy_beta2",      0.99,          0.99,             "second beta of adamw"),
    # phase 2, pixels: squared error, perceptual, adversarial; after no phase 1 quantizer and uniformity too
    ("squared",          1.0,           0.25,             "weight of the mean squared error; pixels span 2, in TiTok 1, hence 1/4"),
    ("perceptual",       0.0,           0.1,              "weight of the squared difference of ConvNeXt's logits"),
    ("adversarial",      0.0,           0.01,             "weight of the discriminator's judgement"),
    ("adversarial_from", 0,             20000,            "step of this phase at which the discriminator comes in"),
    ("discriminator",    128,           128,              "width of the discriminator's first layer, a multiple of 32"),
    ("lecam",            0.001,         0.001,            "weight of the LeCam regularization of the discriminator"),
    ("lecam_ema",        0.999,         0.999,            "decay of the moving averages it needs"),
    # the set's own losses
    ("commitment",       0.25,          0.25,             "pull of latents to their codes, against that of codes to latents"),
    ("uniformity",       0.25,          0.0,              "weight of a loss that spreads an image's latents (not in the paper)"),
    ("revive_after",     20,            0,                "steps without use after which a code is put on a latent, 0 = never"),
    ("revive_until",     0.8,           0.8,              "share of the training after which codes are left alone"),
    # optimization
    ("steps",            1800,          1000000,          "optimizer steps of both phases together"),
    ("batch_size",       128,           256,              "images a step, over all processes"),
    ("device_batch",     128,           32,               "images a process takes at once; more are accumulated"),
    ("optimizer",        "muon",        "adamw",          "adamw, or muon for the blocks' matrices and adamw for the rest"),
    ("lr",               2e-3,          1e-4,             "peak learning rate of adamw"),
    ("muon_lr",          1e-2,          1e-3,             "peak learning rate of muon"),
    ("lr_end",           0.01,          0.1,              "learning rate at a phase's end, as a share of the peak (cosine)"),
    ("warmup",           50,            5000,             "steps of linear warm-up (phase 2)"),
    ("beta2",            0.99,          0.999,            "second beta of adamw (phase 2)"),
    ("weight_decay",     1e-4,          1e-4,             "on matrices; none on norms, biases and embeddings"),
    ("clip",             1.0,           1.0,              "largest norm of the gradient"),
    ("ema",              0.99,          0.999,            "decay of the moving average of the weights"),
    ("flip",             False,         True,             "mirror images at random"),
    # the machine
    ("seed",             0,             0,                "all random draws hang on it"),
    ("device",           "auto",        "auto",           "auto, cpu, cuda"),
    ("bf16",             "auto",        "auto",           "bfloat16 autocast: on, off, auto = where the processor is fast at it"),
    ("tf32",             True,          True,             "float32 products in TF32, on GPUs that have it"),
    ("compile",          False,         True,             "torch.compile"),
    ("fused_adamw",      True,          True,             "PyTorch's fused AdamW"),
    ("fused_attention",  "auto",        "auto",           "flash attention: on, off, auto = on a GPU or for long sequences"),
    ("recompute",        False,         False,            "activation checkpointing: less memory, a third more time"),
    ("workers",          0,             8,                "processes that read images, for each training process"),
    # what is written
    ("out",              "tokenizer.pt", "tokenizer.pt",  "the checkpoint; the log and the picture stand beside it"),
    ("log_every",        20,            100,              "steps between lines of the log"),
    ("save_every",       500,           5000,             "steps between checkpoints"),
    ("picture_every",    500,           5000,             "steps between pictures"),
]
MODEL = ("image_size", "num_tokens", "codebook_size", "code_dim", "patch_size", "width", "heads", "encoder_layers",
         "decoder_layers", "commitment")  # what SetTokenizer is made from
LOSSES = ("loss", "mse", "proxy", "perceptual", "adversarial", "discriminator", "quantizer")
COLUMNS = ["step", *LOSSES, "psnr", "codes_in_use", "lr"]  # of the log; empty where a phase does not have it


def main(argv=None, model_class=SetTokenizer, kind="tokenizer"):
    """model_class, kind: another tokenizer, and what its checkpoints are called (paper/layouts.py)."""
    cfg, checkpoint = common.parse(HYPERPARAMETERS, __doc__, kind, argv)
    device, rank, processes = common.start_processes(cfg.device, cfg.tf32)
    began = time.time()
    try:
        networks = load_networks(cfg, checkpoint, device)
        train_set, test_set = open_datasets(cfg, cfg.image_size, crop="random", flip=cfg.flip, seed=cfg.seed)
        model, model_config = make_model(cfg, checkpoint, train_set.channels, networks.vqgan, device, model_class)
        rows = common.share_of_batch(cfg, len(train_set), rank, processes)  # of every global batch, this process's
        start = common.check_resume(checkpoint, train_set)
    except ValueError as problem:
        common.stop(str(problem))
    header = {"kind": kind, "model_config": model_config, "class_names": train_set.class_names,
              "images": train_set.fingerprint()}
    if not checkpoint:
        common.keep_previous(cfg.out)
    log = common.open_log(common.beside(cfg.out, ".csv"), COLUMNS, start)
    with common.SignalsNoted() as signals:
        for proxy, first, last in ((True, 0, cfg.proxy_steps), (False, cfg.proxy_steps, cfg.steps)):
            if max(start, first) < last and not signals.agreed:
                phase = begin_phase(model, checkpoint, cfg, proxy, first, last, device)
                train(phase, networks, train_set, test_set, rows, max(start, first), header, cfg, log, signals)
                model = phase.ema.module  # the pixel phase starts from the averaged weights, and those are evaluated
                networks.vqgan = None  # needed no more
    if signals.agreed:
        return common.leave(signals, cfg)
    mse, in_use, distinct = evaluate(model, test_set, device, rank, processes, cfg.workers)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {common.duration(time.time() - began)}; on {len(test_set)} test images: "
              f"mean squared error {mse:.4f} (PSNR {psnr(mse):.2f} dB), {in_use:.1%} of the {cfg.codebook_size} codes in use, "
              f"{distinct:.1f} distinct codes in a set of {cfg.num_tokens}")


def load_networks(cfg, checkpoint, device):
    """The published networks that the training needs from here on. ValueError where the settings do not fit."""
    if cfg.proxy_steps > cfg.steps:
        raise ValueError(f"proxy_steps {cfg.proxy_steps} is more than all steps, {cfg.steps}")
    if cfg.proxy_steps and not cfg.vqgan:
        raise ValueError("the proxy codes need MaskGIT-VQGAN: give its file as --vqgan, or --proxy_steps 0 to do without")
    if cfg.perceptual and not cfg.convnext:
        raise ValueError("the perceptual loss needs ConvNeXt-S: give its file as --convnext, or --perceptual 0 to do without")
    if cfg.adversarial and cfg.discriminator % 32:
        raise ValueError(f"discriminator must be a multiple of 32, got {cfg.discriminator}")
    networks = SimpleNamespace(vqgan=None, convnext=None)
    if cfg.vqgan and (not checkpoint or checkpoint["step"] < cfg.proxy_steps):
        networks.vqgan = load_vqgan(cfg.vqgan).to(device)
    if cfg.perceptual and cfg.proxy_steps < cfg.steps:
        networks.convnext = load_convnext(cfg.convnext).to(device)
    return networks


def make_model(cfg, checkpoint, channels, vqgan, device, model_class=SetTokenizer):
    """The tokenizer, with the checkpoint's averaged weights if there is one, and what it is made from. ValueError where that
    does not fit."""
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
    return model.to(device), model_config


def begin_phase(model, checkpoint, cfg, proxy, first, last, device):
    """All that changes in training, for the steps first..last - 1, from the weights of model or a checkpoint of this phase."""
    phase = SimpleNamespace(model=model, proxy=proxy, first=first, last=last)
    model.requires_grad_(True)
    model.pixel_decoder.requires_grad_(not proxy)
    if first:  # the set is learned: what makes the tokens stays as it is
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
    common.set_switches(model, cfg)
    schedule = {"steps": last - first}
    if proxy:
        schedule |= {"warmup": cfg.proxy_warmup, "beta2": cfg.proxy_beta2}
    phase.ema = common.moving_average(model, cfg.ema)
    phase.optimizers = common.make_optimizers(model, SimpleNamespace(**vars(cfg) | schedule))
    phase.idle = torch.zeros(cfg.codebook_size, dtype=torch.int64, device=device)  # steps since each code was last used
    phase.discriminator, phase.lecam, phase.discriminator_optimizers = None, torch.zeros(2, device=device), []
    if cfg.adversarial and not proxy:
        torch.manual_seed(cfg.seed)
        phase.discriminator = Discriminator(cfg.discriminator).to(device)
        schedule["steps"] = max(1, last - first - cfg.adversarial_from)
        phase.discriminator_optimizers = common.make_optimizers(phase.discriminator, SimpleNamespace(**vars(cfg) | schedule))
    if checkpoint and checkpoint["step"] > first:
        training = checkpoint["training"]
        common.restore(checkpoint, model, phase.ema, phase.optimizers + phase.discriminator_optimizers)
        phase.idle.copy_(training["idle"])
        phase.lecam.copy_(training["lecam"])
        if phase.discriminator:
            phase.discriminator.load_state_dict(training["discriminator"])
    return phase


def train(phase, networks, train_set, test_set, rows, start, header, cfg, log, signals):
    """The training loop of a phase, from step start to its last or to a signal."""
    model, device, ema = phase.model, phase.idle.device, phase.ema
    parallel = common.wrap(model, device, cfg)
    judge = common.wrap(phase.discriminator, device, cfg) if phase.discriminator else None
    batches = loader(train_set, cfg.batch_size, rows, cfg.seed, start, phase.last, cfg.workers)
    progress = common.progress_bar(start, phase.last)

    for step, (images, _) in zip(range(start, phase.last), batches):
        images = images.to(device, non_blocking=True) / 127.5 - 1  # (rows, ch, H, W) in [-1, 1]
        random = common.generator(device, "step", cfg.seed, step)
        adversary = phase.discriminator if step - phase.first >= cfg.adversarial_from else None
        losses, tokens, latents, drawn = forward_backward(parallel, images, rows, random, cfg, networks, phase.proxy, adversary)
        lr = phase.optimizers[0][1].get_last_lr()[0]
        common.optimizer_step(model, ema, phase.optimizers, cfg.clip)
        if adversary:
            losses["discriminator"] = judge_backward(judge, images, drawn, phase.lecam, rows, cfg)
            common.optimizer_step(adversary, None, phase.discriminator_optimizers, cfg.clip)
        in_use = count_use(phase.idle, tokens)
        if cfg.revive_after and not phase.first and step < cfg.revive_until * cfg.steps:
            revive([model.quantizer.codebook, ema.module.quantizer.codebook], phase.idle, latents, rows, random, cfg)

        done = step + 1
        progress.update()
        if common.due(done, cfg.log_every, phase.last):
            losses = {name: common.sum_over_processes(value).item() for name, value in losses.items()}
            quality = psnr(losses["mse"]) if "mse" in losses else ""
            in_use = in_use.item()
            log([done, *(losses.get(name, "") for name in LOSSES), quality, in_use, lr])
            text = f"proxy codes: cross-entropy {losses['proxy']:.3f}" if phase.proxy else f"PSNR {quality:.2f} dB"
            common.show(progress, cfg, f"loss {losses['loss']:.4f}, {text}, codes in use {in_use:.0%}")
        if signals.arrived() or common.due(done, cfg.save_every, phase.last):
            judged = phase.discriminator.state_dict() if phase.discriminator else None
            common.save_training(header, done, cfg, model, ema, phase.optimizers + phase.discriminator_optimizers,
                                 idle=phase.idle, lecam=phase.lecam, discriminator=judged)
        if signals.agreed:
            break
        if common.due(done, cfg.picture_every, phase.last):
            draw_reconstructions(ema.module, test_set, device, common.beside(cfg.out, ".png"))
    progress.close()


def forward_backward(model, images, rows, random, cfg, networks, proxy, adversary):
    """Gradients of the loss over the global batch, of which this process holds images (rows, ch, H, W) in [-1, 1].

    Returns this process's part of the mean of each loss, its tokens, latents and reconstructions (in the proxy phase None).
    """
    uniform = torch.rand(cfg.batch_size, cfg.num_tokens, generator=random, device=images.device)[rows]  # the shuffle
    weights = {"mse": cfg.squared, "proxy": 1, "perceptual": cfg.perceptual, "adversarial": cfg.adversarial, "quantizer": 1}
    losses, all_tokens, all_latents, all_drawn = {}, [], [], []

    def loss_of(part):
        with common.autocast(images.device, cfg.bf16):
            drawn, tokens, latents, quantizer = model(images[part], uniform[part], proxy)
        if proxy:  # the VQGAN's codes of the image against the map that the decoder would have it draw
            parts = {"proxy": F.cross_entropy(networks.vqgan.logits(drawn), networks.vqgan.encode(images[part]))}
        else:
            parts = pixel_losses(drawn.float(), images[part], networks.convnext, adversary)
            if adversary:
                all_drawn.append(drawn.detach().float())
        parts["quantizer"] = quantizer
        loss = sum(weights[name] * value for name, value in parts.items()) + cfg.uniformity * uniformity(latents)
        for name, value in ({"loss": loss} | parts).items():
            losses[name] = losses.get(name, 0) + value.detach() * len(tokens) / cfg.batch_size
        all_tokens.append(tokens)
        all_latents.append(latents.detach())
        return loss

    common.backward(model, loss_of, rows, cfg.device_batch, cfg.batch_size)
    return losses, torch.cat(all_tokens), torch.cat(all_latents), torch.cat(all_drawn) if all_drawn else None


def pixel_losses(drawn, images, convnext, adversary):
    """How far reconstructions (B, ch, H, W) are from images, as pixels, as a classifier and as a discriminator sees it."""
    losses = {"mse": F.mse_loss(drawn, images)}
    if convnext:
        losses["perceptual"] = F.mse_loss(convnext.see(drawn), convnext.see(images))
    if adversary:  # its weights are detached: this loss trains the tokenizer, judge_backward() the discriminator
        weights = {name: weight.detach() for name, weight in adversary.named_parameters()}
        losses["adversarial"] = -torch.func.functional_call(adversary, weights, (drawn,)).mean()
    return losses


def judge_backward(judge, images, drawn, lecam, rows, cfg):
    """Gradients of the discriminator's loss over the global batch: hinge loss and LeCam regularization (arXiv 2104.03310).

    images, drawn: this process's real images and their reconstructions.  lecam: (2,), the moving averages of the logits of
    real and drawn images, updated here. Returns this process's part of the mean loss.
    """
    total, means = torch.zeros((), device=images.device), torch.zeros(2, device=images.device)

    def loss_of(part):
        real, fake = judge(torch.cat([images[part], drawn[part]])).flatten(1).chunk(2)  # (B, 256) each
        hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        # TiTok takes the mean of a device's logits before it squares; an image's does not hang on the number of devices
        reach = F.relu(real.mean(1) - lecam[1]).square().mean() + F.relu(lecam[0] - fake.mean(1)).square().mean()
        loss = hinge + cfg.lecam * reach
        share = len(real) / cfg.batch_size
        total.add_(loss.detach() * share)
        means.add_(torch.stack([real.mean(), fake.mean()]).detach() * share)
        return loss

    common.backward(judge, loss_of, rows, cfg.device_batch, cfg.batch_size)
    lecam.lerp_(common.sum_over_processes(means), 1 - cfg.lecam_ema)
    return total


def uniformity(latents):
    """How crowded an image's latents (B, M, code_dim) of length 1 are: mean of exp(2 (cos - 1)) over all pairs, in (0, 1].

    Without it, small tokenizers put many of an image's tokens on the same few codes (Wang and Isola, arXiv 2005.10242).
    """
    cosines = latents @ latents.transpose(1, 2)  # (B, M, M)
    return (2 * (cosines - 1)).exp().mean()


def count_use(idle, tokens):
    """Update idle (C,), the steps since each code was last used, with the global batch's tokens.

    Returns the share of codes that the global batch uses, a tensor.
    """
    used = common.sum_over_processes(tokens.flatten().bincount(minlength=len(idle)))
    idle += 1
    idle[used > 0] = 0
    return (used > 0).float().mean()


def revive(codebooks, idle, latents, rows, random, cfg):
    """Put codes that went without use for too long on latents drawn from the global batch, the same in every process.

    latents: this process's (rows, M, code_dim).  codebooks: the model's and its moving average's, (C, code_dim) each.
    """
    dead = idle >= cfg.revive_after  # (C,)
    if not dead.any():
        return
    M = cfg.num_tokens
    pick = torch.randint(cfg.batch_size * M, (len(idle),), generator=random, device=idle.device)  # a latent for every code
    here = (pick >= rows.start * M) & (pick < rows.stop * M)
    chosen = torch.zeros_like(codebooks[0])
    chosen[here] = latents.flatten(0, 1)[pick[here] - rows.start * M]
    chosen = common.sum_over_processes(chosen)
    for codebook in codebooks:
        codebook.data[dead] = chosen[dead]
    idle[dead] = 0


def psnr(mse):
    """Peak signal-to-noise ratio in decibels; pixels in [-1, 1] span 2, and 2^2 = 4."""
    return 10 * math.log10(4 / mse) if 0 < mse < math.inf else math.nan


@torch.no_grad()
def evaluate(model, dataset, device, rank=0, processes=1, workers=0):
    """Mean squared error over a dataset, the share of codes in use, and the mean number of distinct codes in a set."""
    C = model.codebook_size
    squared, distinct, use = (torch.zeros(n, dtype=torch.float64, device=device) for n in (1, 1, C))
    at_once = min(250, max(1, 2 ** 20 // model.image_size ** 2))  # a million pixels, for the memory's sake
    parts = common.chunks(common.share(len(dataset), rank, processes), at_once)
    for images, _ in in_order(dataset, parts, workers):
        images = images.to(device) / 127.5 - 1
        tokens = model.encode(images)
        squared += (model.decode(tokens) - images).square().mean((1, 2, 3)).sum()
        counts = tokens_to_counts(tokens, C)
        distinct += (counts > 0).sum()
        use += counts.sum(0)
    for total in (squared, distinct, use):
        common.sum_over_processes(total)
    return squared.item() / len(dataset), (use > 0).double().mean().item(), distinct.item() / len(dataset)


def draw_reconstructions(model, dataset, device, path, number=20):
    """Test images, every second row their reconstructions from the tokens."""
    if common.is_main():
        columns = min(10, len(dataset))
        number = min(number, len(dataset)) // columns * columns
        spread = range(0, len(dataset), max(1, len(dataset) // number))
        images = next(read_ahead(dataset, [[(i, 0) for i in spread][:number]], workers=0))[0].to(device)
        pairs = torch.stack([images, common.to_uint8(model.decode(model.encode(images / 127.5 - 1)))])
        pairs = pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)  # rows: images, reconstructions, images, ...
        common.grid(pairs, columns, ["image", "decoded"] * (number // columns)).save(path)


if __name__ == "__main__":
    common.run(main)
