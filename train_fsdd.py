"""Stage 2: train Fixed-Sum Discrete Diffusion on the token sets of stage 1 (Sec. 3.3, 4.1). tokenizer.pt -> fsdd.pt

    python train_fsdd.py                          after train_tokenizer.py
    torchrun --nproc_per_node=8 train_fsdd.py     eight processes, the same training
    python train_fsdd.py --resume                 resume a run that was interrupted

Every training image is encoded once (tokens.npy, kept for the next run with the same tokenizer and images); from then
on no training image is read. Writes fsdd.pt (weights, their moving average, the tokenizer: all that sample.py and
--resume need), fsdd.csv (a log) and fsdd.png (samples). On the digits: 3 minutes on two CPU cores (README.md).
"""
import math
import time

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import common
from data import records
from data.pictures import decode, grid, save
from data.reading import batch_indices, in_order, open_datasets
from data.token_sets import check_token_file, encode_training_set
from dual_transform import counts_to_tokens, sequence_bits, set_bits, tokens_to_counts
from fsdd import Denoiser, fsdd_loss, generate, refine, sample_noise, sample_times
from tokenizer import SetTokenizer

MODELS = {  # width, layers, heads of the denoiser
    "digits": (96, 2, 3),
    "S": (384, 12, 6),   # 36.0 million parameters with the paper's C = 4096, M = 128
    "B": (768, 12, 12),  # 136.7 million
}
HYPERPARAMETERS = [
    # name               digits          imagenet256      meaning
    ("tokenizer",        "tokenizer.pt", "tokenizer.pt",  "checkpoint of stage 1"),
    ("data",             "digits",       "data/imagenet", "digits, or a folder with train/CLASS/* and val/CLASS/*"),
    ("flip",             False,          True,            "learn from mirrored images too"),
    # noise and denoiser
    ("prior",            "multinomial",  "multinomial",   "X_1: multinomial (paper) or distinct (authors' release)"),
    ("model",            "digits",       "S",             "size of the denoiser: digits, S or B, see MODELS"),
    ("width",            0,              0,               "its width, 0 = the model's"),
    ("layers",           0,              0,               "its blocks, 0 = the model's"),
    ("heads",            0,              0,               "its attention heads, 0 = the model's"),
    ("denoiser",         "sparse",       "dense",         "dense (paper); sparse: codes attend to the tokens alone"),
    ("loss_codes",       3,              3,               "sparse: M times so many codes a set are trained on"),
    ("unused_rows",      False,          True,            "C + 1 rows in the count embedding (authors' release)"),
    ("code_start",       "codebook",     "zeros",         "start of the code embedding: zeros (release), codebook"),
    ("times",            "flips",        "uniform",       "uniform (the paper) or flips, see fsdd.sample_times()"),
    ("gelu",             "none",         "tanh",          "GELU: tanh (DiT), none: exact, faster on CPUs"),
    ("label_drop",       0.1,            0.1,             "share of labels replaced by the null class, for guidance"),
    # optimization
    ("steps",            2200,           1000000,         "optimizer steps"),
    ("batch_size",       64,             256,             "images per step, over all processes"),
    ("device_batch",     64,             32,              "images a process takes at once; gradients accumulate"),
    ("optimizer",        "muon",         "adamw",         "adamw, or muon (blocks' matrices) and adamw (the rest)"),
    ("lr",               8e-3,           1e-4,            "peak learning rate of adamw"),
    ("muon_lr",          5e-3,           1e-3,            "peak learning rate of muon"),
    ("lr_end",           0.01,           1.0,             "final learning rate / peak (cosine); 1 = constant"),
    ("warmup",           50,             0,               "steps of linear warm-up"),
    ("beta2",            0.99,           0.999,           "second beta of adamw"),
    ("weight_decay",     0.01,           0.01,            "on all weights, as in the authors' release"),
    ("clip",             1.0,            0.0,             "largest norm of the gradient, 0 = any"),
    ("ema",              0.99,           0.9999,          "decay of the moving average of the weights"),
]
# Settings of fsdd.refine(), for the pictures during training and as options of all scripts that generate.
# A new knob of the sampler is a parameter of refine() and a row here.
GENERATION = [
    ("sampler",          "exchange",     "paper",         "paper (Eq. 9-10), exchange (Eq. 8, fsdd.posterior)"),
    ("sample_steps",     12,             25,              "steps from noise to data"),
    ("guidance",         "0.5,12",       "4,50,55",       "weight; two: at noise, at data; three: for the thirds"),
    ("top_p",            1.0,            0.8,             "keep p(x_0 | X_t)'s likeliest counts of this total"),
    ("top_k",            0,              0,               "keep its k likeliest counts, 0 = all"),
]
HYPERPARAMETERS += GENERATION + [
    # what is written
    ("out",              "fsdd.pt",      "fsdd.pt",       "the checkpoint; the log and the picture stand beside it"),
    ("tokens",           "tokens.npy",   "tokens.npy",    "the encoded training set"),
] + common.MACHINE
COLUMNS = ["step", "loss", "lr"]  # of the log


def main(argv=None):
    cfg, checkpoint = common.parse(HYPERPARAMETERS, __doc__, "fsdd", argv)
    stage1 = checkpoint["tokenizer"] if checkpoint else common.load_checkpoint(
        cfg.tokenizer, "python train_tokenizer.py", "tokenizer")
    device, rank, _ = common.init_distributed(cfg.device, cfg.tf32)
    began = time.time()
    try:
        tokenizer, train_set, test_set, model_config, generation = prepare(stage1, device, cfg)
        torch.manual_seed(cfg.seed)
        model = Denoiser(**model_config).to(device)
        if cfg.code_start == "codebook":
            model.start_from_codebook(tokenizer.quantizer.codes())
        common.set_switches(model, cfg)
        claim = records.check_training(cfg, checkpoint, train_set)  # locks cfg.out until the training ends
        tokens = encode_training_set(tokenizer, train_set, device, cfg)  # (1 or 2, N, M)
    except ValueError as problem:
        common.stop(str(problem))
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    if rank == 0:
        print(f"sets of {M} tokens out of {C} codes: {set_bits(M, C):.0f} bits an image, "
              f"as sequences they would be {sequence_bits(M, C):.0f}", flush=True)
    common.set_switches(tokenizer, cfg)
    if not checkpoint:
        records.keep_previous(cfg.out)
    header = {"kind": "fsdd", "model_config": model_config, "class_names": train_set.class_names,
              "images": train_set.fingerprint(), "generation": generation,
              "tokenizer": {name: stage1[name] for name in ("model_config", "weights")}}
    with claim, common.Signals() as signals:
        averaged = train(model, tokenizer, tokens, train_set.labels, checkpoint, header, cfg, signals)
    loss = evaluate(averaged, tokenizer, test_set, device, cfg)
    records.check_result(loss, cfg)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {(time.time() - began) / 60:.1f} min; "
              f"loss {loss:.4f} on the sets of {len(test_set)} test images")


def prepare(stage1, device, cfg):
    """The tokenizer, both datasets, the denoiser's arguments and those of fsdd.refine(). ValueError where settings
    don't fit, all but the number of channels before images are read."""
    tokenizer = SetTokenizer(**stage1["model_config"]).to(device).eval()
    tokenizer.load_state_dict(stage1["weights"])
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    check_token_file(cfg.tokens, C)
    if cfg.model not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {cfg.model!r}")
    width, layers, heads = MODELS[cfg.model]
    if cfg.denoiser not in ("dense", "sparse"):
        raise ValueError(f"--denoiser must be dense or sparse, got {cfg.denoiser!r}")
    if cfg.loss_codes < 3:
        raise ValueError(f"--loss_codes must be at least 3, as X_t and X_0 hold up to 2 M codes, got {cfg.loss_codes}")
    model_config = dict(codebook_size=C, num_tokens=M, width=cfg.width or width, layers=cfg.layers or layers,
                        heads=cfg.heads or heads, num_classes=1, unused_rows=cfg.unused_rows, gelu=cfg.gelu,
                        sparse=cfg.denoiser == "sparse")
    generation = {"prior": cfg.prior} | {name.removeprefix("sample_"): getattr(cfg, name) for name, *_ in GENERATION}
    generation["guidance"] = common.guidance_weights(generation["guidance"])
    with torch.device("meta"):  # without memory for its weights: only the arguments are checked
        next(refine(Denoiser(**model_config), torch.zeros(1, dtype=torch.int64, device="cpu"), **generation))
    sample_times(torch.zeros(1), cfg.times)
    train_set, test_set = open_datasets(cfg, tokenizer.image_size)
    if train_set.channels != stage1["model_config"]["channels"]:
        raise ValueError(f"the images of {cfg.data} have {train_set.channels} channels, those of {cfg.tokenizer} "
                         f"{stage1['model_config']['channels']}; give the --data that it was trained on")
    model_config["num_classes"] = len(train_set.class_names)
    return tokenizer, train_set, test_set, model_config, generation


def train(model, tokenizer, tokens, labels, checkpoint, header, cfg, signals):
    """The training loop. Returns the model with averaged weights. tokens (1 or 2, N, M), labels (N,): the training
    set."""
    B, C, device = cfg.batch_size, model.codebook_size, model.code_embedding.device
    num_codes = cfg.loss_codes * model.num_tokens if model.sparse else 0
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = common.make_optimizers(model, cfg, cfg.steps, cfg.warmup, cfg.beta2, decay_all=True)
    start = records.restore_training(checkpoint, model, ema, optimizers)
    ddp = common.parallel(model, device, cfg)
    rows, micro_batches, world_size = common.shares(B, cfg.device_batch)
    log = records.open_log(records.beside(cfg.out, ".csv"), COLUMNS, start)
    progress = records.progress_bar(start, cfg.steps, B)
    for step in progress:
        # the batch: sets, labels, times, noise, and what the draws of X_t and of the loss's codes depend on
        random = common.generator(device, "step", cfg.seed, step)
        x, y, t, x1, uniform, order = get_batch(tokens, labels, rows, header["model_config"], random, step, cfg)
        x0 = tokens_to_counts(x, C)  # (rows, C), every row sums to M
        # forward and backward: the gradient of the mean loss over the global batch, in micro-batches
        mean = torch.zeros((), device=device)
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]  # DDP.no_sync(): all-reduce once a step
            with common.autocast(device, cfg.bf16):
                loss = fsdd_loss(ddp, x0[part], y[part], t[part], x1[part], uniform[part], num_codes, order[part])
            loss = loss * (len(x0[part]) / B)
            (loss * world_size).backward()  # DDP divides by the world size
            mean += loss.detach()
        # clip, step, learning rate, moving average
        records.check_finite(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf), step, cfg)
        lr = optimizers[0][1].get_last_lr()[0]
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.update_parameters(model)
        # once in a while: log, save, draw samples
        if records.due(step, cfg.log_every, cfg.steps):
            loss = common.all_reduce(mean).item()
            log({"step": step + 1, "loss": loss, "lr": lr})
            progress.set_postfix_str(f"step {step + 1}, loss {loss:.4f}", refresh=False)
        if signals.received() or records.due(step, cfg.save_every, cfg.steps):
            records.save_training(header, step + 1, cfg, model, ema, optimizers)
            signals.exit_if_received(cfg.out)
        if records.due(step, cfg.picture_every, cfg.steps):
            draw_samples(ema.module, tokenizer, header, device, cfg)
    return ema.module


def get_batch(tokens, labels, rows, model_config, random, step, cfg):
    """This rank's rows of the global batch of a step: tokens x (rows, M) int64, labels y (rows,), some of them dropped
    for the null class, times t (rows,) in (0, 1], noise x1 (rows, C) (Eq. 4), uniform and order (rows, C) in [0, 1).

    Every rank draws all random numbers of the global batch, so that they are the same for any number of ranks.
    """
    B, C, M, null = cfg.batch_size, *(model_config[name] for name in ("codebook_size", "num_tokens", "num_classes"))
    device, indices = random.device, batch_indices(len(labels), B, cfg.seed, step)[rows]
    mirrored, dropped, t = torch.rand(3, B, generator=random, device=device)[:, rows]  # each (rows,)
    versions = (mirrored * len(tokens)).long().cpu()  # 0: the image; 1, where tokens has it: its mirror image
    x = torch.from_numpy(tokens[versions.numpy(), indices.numpy()].astype(np.int64)).to(device)
    y = torch.where(dropped < cfg.label_drop, null, labels[indices].to(device))
    x1 = sample_noise(B, C, M, cfg.prior, random, device)[rows]
    uniform, order = (torch.rand(B, C, generator=random, device=device)[rows] for _ in range(2))
    return x, y, sample_times(t, cfg.times), x1, uniform, order


@torch.no_grad()
def evaluate(model, tokenizer, dataset, device, cfg):
    """The loss on a dataset, of all codes and at uniform times whatever cfg.times is, so that runs can be compared; one
    time t and one noise vector an image, the same at every call."""
    (rank, world_size), C, M = common.rank_and_world_size(), model.codebook_size, model.num_tokens
    total = torch.zeros((), dtype=torch.float64, device=device)
    parts = common.chunks(slice(0, len(dataset)), min(250, max(1, 2 ** 18 // C)))[rank::world_size]
    for part, (images, labels) in zip(parts, in_order(dataset, parts, cfg.workers)):
        random = common.generator(device, "test", cfg.seed, part.start)
        t = 1 - torch.rand(len(images), generator=random, device=device)
        x1 = sample_noise(len(images), C, M, cfg.prior, random, device)
        uniform = torch.rand(x1.shape, generator=random, device=device)
        with common.autocast(device, cfg.bf16):
            x0 = tokens_to_counts(tokenizer.encode(images.to(device) / 127.5 - 1), C)
            total += fsdd_loss(model, x0, labels.to(device), t, x1, uniform) * len(images)
    return common.all_reduce(total).item() / len(dataset)


def draw_samples(model, tokenizer, header, device, cfg):
    """A page of samples, a row for each of up to ten classes."""
    if common.is_main():
        class_names = header["class_names"]
        classes = torch.arange(len(class_names))[:: -(-len(class_names) // 10)]
        random = common.generator(device, "sample", cfg.seed)
        with common.autocast(device, cfg.bf16):
            counts = torch.cat([generate(model, labels, **header["generation"], generator=random)
                                for labels in classes.repeat_interleave(10).to(device).split(cfg.device_batch)])
        page = grid(decode(tokenizer, counts_to_tokens(counts)), 10, [class_names[i] for i in classes])
        save(page, records.beside(cfg.out, ".png"))


if __name__ == "__main__":
    common.run(main)
