"""Stage 1: train the set tokenizer (Sec. 3.1, 4.1). Images -> tokenizer.pt

    python train_tokenizer.py                          the embedded digits
    torchrun --nproc_per_node=8 train_tokenizer.py     eight processes, the same training
    python train_tokenizer.py --resume                 go on where a run was cut off

Writes tokenizer.pt (weights, their moving average, all that --resume needs), tokenizer.csv (a log) and tokenizer.png
(test images above their reconstructions). On the digits: 4 minutes on two CPU cores, mean squared error 0.056 (README.md).
"""
import math
import time

import torch
import torch.nn.functional as F

import common
from dual_transform import tokens_to_counts
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
    # the loss: mean squared error of the pixels in [-1, 1] + quantizer + uniformity
    ("commitment",       0.25,          0.25,             "pull of latents to their codes, against that of codes to latents"),
    ("uniformity",       0.25,          0.0,              "weight of the loss that spreads an image's latents out (not in the paper)"),
    ("revive_after",     20,            0,                "steps without use after which a code is put on a latent, 0 = never"),
    ("revive_until",     0.8,           0.8,              "share of the training after which codes are left alone"),
    # optimization
    ("steps",            1800,          1000000,          "optimizer steps"),
    ("batch_size",       128,           256,              "images a step, over all processes"),
    ("device_batch",     128,           32,               "images a process takes at once; more are accumulated"),
    ("optimizer",        "muon",        "adamw",          "adamw, or muon for the blocks' matrices and adamw for the rest"),
    ("lr",               2e-3,          1e-4,             "peak learning rate of adamw"),
    ("muon_lr",          1e-2,           1e-3,             "peak learning rate of muon"),
    ("lr_end",           0.01,          0.1,              "learning rate at the end, as a share of the peak (cosine)"),
    ("warmup",           50,            10000,            "steps of linear warm-up"),
    ("beta2",            0.99,          0.99,             "second beta of adamw"),
    ("weight_decay",     1e-4,          1e-4,             "on matrices; none on norms, biases and embeddings"),
    ("clip",             1.0,           1.0,              "largest norm of the gradient"),
    ("ema",              0.99,          0.999,            "decay of the moving average of the weights"),
    ("flip",             False,         True,             "mirror images at random"),
    # the machine
    ("seed",             0,             0,                "all random draws hang on it"),
    ("device",           "auto",        "auto",           "auto, cpu, cuda"),
    ("bf16",             "auto",        "auto",           "bfloat16 autocast: on, off, auto = where the processor is fast at it"),
    ("compile",          False,         True,             "torch.compile"),
    ("workers",          0,             8,                "processes that read images, for each training process"),
    # what is written
    ("out",              "tokenizer.pt", "tokenizer.pt",  "the checkpoint; the log and the picture stand beside it"),
    ("log_every",        20,            100,              "steps between lines of the log"),
    ("save_every",       500,           5000,             "steps between checkpoints"),
    ("picture_every",    500,           5000,             "steps between pictures"),
]
MODEL = ("image_size", "num_tokens", "codebook_size", "code_dim", "patch_size", "width", "heads", "encoder_layers",
         "decoder_layers", "commitment")  # what SetTokenizer is made from
COLUMNS = ["step", "loss", "mse", "psnr", "quantizer", "codes_in_use", "lr"]  # of the log


def main(argv=None):
    cfg, checkpoint = common.parse(HYPERPARAMETERS, __doc__, "tokenizer", argv)
    device, rank, processes = common.start_processes(cfg.device)
    began = time.time()
    try:
        train_set, test_set = common.open_datasets(cfg, cfg.image_size, crop="random", flip=cfg.flip, seed=cfg.seed)
        torch.manual_seed(cfg.seed)
        model_config = {"channels": train_set.channels} | {name: getattr(cfg, name) for name in MODEL}
        model = SetTokenizer(**model_config).to(device)
        rows = common.share_of_batch(cfg, len(train_set), rank, processes)  # of every global batch, this process's
    except ValueError as problem:
        common.stop(str(problem))
    ema = common.moving_average(model, cfg.ema)
    optimizers = common.make_optimizers(model, cfg)
    idle = torch.zeros(cfg.codebook_size, dtype=torch.int64, device=device)  # steps since each code was last used
    start = common.start_or_resume(checkpoint, cfg, model, ema, optimizers)
    if checkpoint:
        idle.copy_(checkpoint["training"]["idle"])
    parallel = common.wrap(model, device, cfg.compile)
    log = common.open_log(common.beside(cfg.out, ".csv"), COLUMNS, start)
    batches = common.loader(train_set, cfg.batch_size, rows, cfg.seed, start, cfg.steps, cfg.workers)
    progress = common.progress_bar(start, cfg.steps)

    for step, (images, _) in zip(range(start, cfg.steps), batches):
        images = images.to(device, non_blocking=True) / 127.5 - 1  # (rows, ch, H, W) in [-1, 1]
        random = common.generator(device, "step", cfg.seed, step)
        losses, tokens, latents = forward_backward(parallel, images, rows, random, cfg)
        lr = optimizers[0][1].get_last_lr()[0]
        common.optimizer_step(model, ema, optimizers, cfg.clip)
        in_use = count_use(idle, tokens)
        if cfg.revive_after and step < cfg.revive_until * cfg.steps:
            revive([model.quantizer.codebook, ema.module.quantizer.codebook], idle, latents, rows, random, cfg)

        done = step + 1
        progress.update()
        if common.due(done, cfg.log_every, cfg):
            loss, mse, quantizer = common.sum_over_processes(losses).tolist()
            log([done, loss, mse, psnr(mse), quantizer, in_use, lr])
            common.show(progress, cfg, f"loss {loss:.4f}, PSNR {psnr(mse):.2f} dB, codes in use {in_use:.0%}")
        if common.due(done, cfg.picture_every, cfg):
            draw_reconstructions(ema.module, test_set, device, common.beside(cfg.out, ".png"))
        if common.due(done, cfg.save_every, cfg):
            common.save_training({"kind": "tokenizer", "model_config": model_config, "class_names": train_set.class_names},
                                 done, cfg, model, ema, optimizers, idle=idle)
    progress.close()
    mse, in_use, distinct = evaluate(ema.module, test_set, device, rank, processes, cfg.workers)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {common.duration(time.time() - began)}; on {len(test_set)} test images: "
              f"mean squared error {mse:.4f} (PSNR {psnr(mse):.2f} dB), {in_use:.1%} of the {cfg.codebook_size} codes in use, "
              f"{distinct:.1f} distinct codes in a set of {cfg.num_tokens}")


def forward_backward(model, images, rows, random, cfg):
    """Gradients of the loss over the global batch, of which this process holds images (rows, ch, H, W) in [-1, 1].

    Returns this process's part of the mean loss, squared error and quantizer loss (3,), its tokens and latents.
    """
    uniform = torch.rand(cfg.batch_size, cfg.num_tokens, generator=random, device=images.device)[rows]  # the shuffle
    losses, all_tokens, all_latents = torch.zeros(3, device=images.device), [], []

    def loss_of(part):
        with common.autocast(images.device, cfg.bf16):
            reconstructions, tokens, latents, quantizer = model(images[part], uniform[part])
        mse = F.mse_loss(reconstructions.float(), images[part])
        loss = mse + quantizer + cfg.uniformity * uniformity(latents)
        losses.add_(torch.stack([loss, mse, quantizer]).detach() * len(tokens) / cfg.batch_size)
        all_tokens.append(tokens)
        all_latents.append(latents.detach())
        return loss

    common.backward(model, loss_of, rows, cfg.device_batch, cfg.batch_size)
    return losses, torch.cat(all_tokens), torch.cat(all_latents)


def uniformity(latents):
    """How crowded an image's latents (B, M, code_dim) of length 1 are: mean of exp(2 (cos - 1)) over all pairs, in (0, 1].

    Without it, small tokenizers put many of an image's tokens on the same few codes (Wang and Isola, arXiv 2005.10242).
    """
    cosines = latents @ latents.transpose(1, 2)  # (B, M, M)
    return (2 * (cosines - 1)).exp().mean()


def count_use(idle, tokens):
    """Update idle (C,), the steps since each code was last used, with the global batch's tokens.

    Returns the share of codes that the global batch uses.
    """
    used = common.sum_over_processes(tokens.flatten().bincount(minlength=len(idle)))
    idle += 1
    idle[used > 0] = 0
    return (used > 0).float().mean().item()


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
def evaluate(model, dataset, device, rank=0, processes=1, workers=0, batch_size=250):
    """Mean squared error over a dataset, the share of codes in use, and the mean number of distinct codes in a set."""
    C = model.codebook_size
    squared, distinct, use = (torch.zeros(n, dtype=torch.float64, device=device) for n in (1, 1, C))
    parts = common.chunks(common.share(len(dataset), rank, processes), batch_size)
    for images, _ in common.in_order(dataset, parts, workers):
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
        spread = range(0, len(dataset), max(1, len(dataset) // number))
        images = dataset.__getitems__([(i, 0) for i in spread][:number])[0].to(device)
        pairs = torch.stack([images, common.to_uint8(model.decode(model.encode(images / 127.5 - 1)))])
        pairs = pairs.unflatten(1, (-1, 10)).transpose(0, 1).flatten(0, 2)  # rows of 10: images, reconstructions, images, ...
        common.grid(pairs, 10, ["image", "decoded"] * (len(pairs) // 20)).save(path)


if __name__ == "__main__":
    main()
    common.end_processes()
