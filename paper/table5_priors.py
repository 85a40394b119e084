"""Table 5 (Sec. 4.3.1): ways to model the token sets of one tokenizer, with the same data and steps, and parameters
that differ by less than 6 %. FSDD has three rows, all with the dense denoiser: with the paper's training times and
sampler, with those of beyond.py for the same noise, and with the hidden tokens of beyond.py.

    python -m paper.table5_priors --recipe digits                      the digits, tokenizer.pt
    torchrun --nproc_per_node=8 -m paper.table5_priors --recipe imagenet256 --ckpt tokenizer.pt     the paper's own

Every method is tuned in the same way, on its first seed: learning rates out of LEARNING_RATES, each trained for
--search_steps, then guidance out of GUIDANCE and top-p and top-k out of TRUNCATIONS, by the FID of --num_search
samples. The best setting is trained with every seed and measured with --num_images other samples. Trainings and
measurements are kept in paper/cache: an interrupted run resumes.
Prints a Markdown table: FID (for the digits digits FID), mean and deviation over seeds, bits (see bits()), and how many
samples do not sum to M and by how many tokens. The set decoder takes any number of tokens, so these are decoded as they
are.

On ImageNet the learning rates are the recipe's, without a search. SetAR then draws C = 4096 counts one after the other,
without a cache of keys and values: its samples cost far more than all others.
"""
import math
import os
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import evaluate_fid
import generation
import train_fsdd
from beyond import hide_tokens
from data import EMBEDDED
from data.evaluation_inputs import Images, open_images
from data.loader import batch_indices, read_slices
from data.token_sets import encode_training_set
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import Denoiser, fsdd_loss, generate
from paper import baselines, variants
from support.command_line import parse, stop
from support.distributed import all_gather, all_reduce, chunks, is_main, local_batch, rank_and_world_size
from support.files import load_checkpoint
from support.hardware import autocast, init_distributed, parallel, set_tf32
from support.optimizers import make_optimizers, set_lr, warmup_cosine
from support.pictures import grid, save
from support.seeds import generator
from support.training import (Signals, check_finite, check_training, progress_bar, restore_training, run, save_training,
                              stop_by_signal)

# What --lr and --muon_lr are multiplied by; compared by samples with the setting FIRST. The last is the digits' recipe.
LEARNING_RATES = ((0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (4.0, 1.0))
GUIDANCE = ("1", "2", "4", "4,30,30", "1.2:7")  # see generation.parse_guidance()
TRUNCATIONS = ({"top_p": 1.0, "top_k": 0}, {"top_p": 0.8, "top_k": 0}, {"top_p": 1.0, "top_k": 2})
FIRST = {"guidance": "4", **TRUNCATIONS[0]}
METHODS = {  # which properties the paper ascribes to it: set, discrete, fixed sum; its gFID in the paper; its loss
    "AR-order1": (" ", "x", " ", 6.55, baselines.autoregressive_loss),
    "AR-order2": (" ", "x", " ", 6.62, baselines.autoregressive_loss),
    "AR-random": ("x", "x", " ", 8.99, baselines.autoregressive_loss),
    "AR-sorted": ("x", "x", " ", "", baselines.autoregressive_loss),  # codes sorted along the codebook's first axis
    "SetAR": ("x", "x", " ", 6.92, baselines.autoregressive_loss),
    "Discrete Diffusion": ("x", "x", " ", 6.23, partial(fsdd_loss, process=baselines.flow_process)),
    "Continuous Diffusion": ("x", " ", "x", 75.45, baselines.continuous_loss),
    "FSDD (paper)": ("x", "x", "x", 5.56, fsdd_loss),  # uniform training times, the paper's sampler
    "FSDD": ("x", "x", "x", "", fsdd_loss),            # times uniform in flips, the exchange sampler
    "FSDD (hidden)": ("x", "x", "x", "", partial(fsdd_loss, process=hide_tokens)),  # hidden tokens
}
# Rows of train_fsdd.py with other values for the digits: a narrower denoiser, as most of the methods have a dense one;
# 3 passes over the data; the search includes the recipe's lr
CHANGED = {"width": 64, "heads": 2, "steps": 2820, "lr": 2e-3, "sample_steps": 25}
FIXED = {"training_times": "uniform", "sampler": "paper", "denoiser": "dense", "code_start": "zeros", "loss_codes": 3,
         "prior": "multinomial", "seed": 0, **FIRST}  # and rows that are no options here
TRAINING = [(name, CHANGED.get(name, digits), *rest) for name, digits, *rest in train_fsdd.HYPERPARAMETERS
            if name not in ("tokenizer", "tokens", "out", "picture_every", *FIXED)]
HYPERPARAMETERS = [
    # name               digits    emoji    imagenet256     allowed     meaning
    ("ckpt",             *["tokenizer.pt"] * 3,             "",         "checkpoint of train_tokenizer.py"),
    ("methods",          *[",".join(METHODS)] * 3,          "",         "which, separated by commas"),
    ("seeds",            3,        3,       1,              "[1, inf)", "trainings of a method with its best setting"),
    ("search_lr",        True,     True,    False,          "",         "search the learning rate; else it is --lr"),
    ("search_steps",     470,      470,     1000000,        "[1, inf)", "steps of trainings that search the rate"),
    ("num_search",       500,      500,     10000,          "[2, inf)", "samples that measure a setting in the search"),
    ("num_images",       1000,     1000,    50000,          "[2, inf)", "samples of the table"),
    ("batch",            250,      250,     100,            "[1, inf)", "samples at once"),
    ("ref",              "",       "",      "VIRTUAL_imagenet256_labeled.npz", "", "reference, see evaluate_fid.py"),
    ("inception",        "",       "",      "",             "",         "Inception's weights (downloaded)"),
    *TRAINING,
    ("out",              *["table5.png"] * 3,               "",         "a picture, samples of each method"),
]


def main(argv=None):
    began = time.time()
    cfg, _ = parse(HYPERPARAMETERS, __doc__, None, argv, "python -m paper.table5_priors")
    stage1 = load_checkpoint(cfg.ckpt, "python train_tokenizer.py", "tokenizer")
    device, rank, _ = init_distributed(cfg.device)
    try:
        task = prepare(stage1, device, cfg)
        found = {method: tune_and_measure(method, task, cfg) for method in cfg.methods.split(",")}
    except ValueError as problem:
        stop(str(problem))
    if rank > 0:
        return
    print(f"{task.C} codes, sets of {task.M} tokens; {cfg.steps} steps of {cfg.batch_size}; {cfg.num_images} samples")
    print_table(found, cfg)
    save(grid(torch.cat([result.images for result in found.values()]), 20, list(found)), cfg.out)
    print(f"{cfg.out}: samples of each; {(time.time() - began) / 60:.1f} min")


def prepare(stage1, device, cfg):
    """What all methods have in common: tokens, labels, tokenizer, and what the FID is measured with. ValueError if
    settings do not fit together."""
    unknown = [method for method in cfg.methods.split(",") if method not in METHODS]
    if unknown:
        raise ValueError(f"--methods must be some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    if not cfg.out.endswith(".png"):
        raise ValueError(f"--out must end in .png, got {cfg.out}")
    os.makedirs(variants.FOLDER, exist_ok=True)
    vars(cfg).update(FIXED, tokenizer=cfg.ckpt, tokens=variants.tokens_of(cfg.ckpt), picture_every=cfg.steps)
    tokenizer, train_set, test_set, model_config, _ = train_fsdd.prepare(stage1, device, cfg)
    check_training(cfg, None, train_set)
    args = SimpleNamespace(ckpt=cfg.ckpt, inception=cfg.inception, classifier=variants.CLASSIFIER)
    net = evaluate_fid.network(args, cfg.data, device, rank_and_world_size()[0])
    size = {name: model_config[name] for name in ("num_classes", "width", "layers", "heads", "gelu")}
    task = SimpleNamespace(device=device, tokenizer=tokenizer, train_set=train_set, test_set=test_set, net=net,
                           size=size, M=tokenizer.num_tokens, C=tokenizer.codebook_size,
                           first_axis=tokenizer.quantizer.codes()[:, 0].detach())
    task.reference = reference(task, cfg)
    task.tokens = encode_training_set(tokenizer, train_set, device, cfg)  # (1 or 2, N, M)
    return task


def reference(task, cfg):
    """(mu, sigma) of the images that samples are compared with, known to rank 0."""
    if not cfg.ref and cfg.data not in EMBEDDED:
        raise ValueError(f"--ref must say what samples are compared with; {evaluate_fid.NEEDS}")
    images = open_images(cfg.ref, None) if cfg.ref else evaluate_fid.training_images(cfg.data)
    if images.statistics:
        evaluate_fid.check_features(images, None, task.net)
        return images.statistics
    found = evaluate_fid.measure(task.net, images, cfg.batch, False, task.device, *rank_and_world_size())
    return found and (found.mu, found.sigma)


def tune_and_measure(method, task, cfg):
    """A row of the table: the setting that was chosen, and the measurements of its trainings."""
    shorter = SimpleNamespace(**vars(cfg) | {"steps": cfg.search_steps})

    def search_fid(factors, setting, cfg):
        return measure(method, factors, 0, setting, "search", cfg.num_search, task, cfg)["fid"]

    factors = (1.0, 1.0)
    if cfg.search_lr:
        factors = min(LEARNING_RATES, key=lambda factors: search_fid(factors, FIRST, shorter))
    # Continuous Diffusion has no distribution to truncate
    truncations = TRUNCATIONS if method != "Continuous Diffusion" else TRUNCATIONS[:1]
    setting = min(({"guidance": guidance, **truncation} for guidance in GUIDANCE for truncation in truncations),
                  key=lambda setting: search_fid(factors, setting, cfg))
    results = [measure(method, factors, seed, setting, "table", cfg.num_images, task, cfg)
               for seed in range(cfg.seeds)]
    model = trained(method, factors, 0, task, cfg)
    labels = generation.choose_labels(None, 20, task.train_set.class_names, 10)
    images = decode(task.tokenizer, generate_counts(method, model, labels, setting, ("picture",), task, cfg))
    return SimpleNamespace(factors=factors, setting=setting, results=results, images=images,
                           parameters=sum(parameter.numel() for parameter in model.parameters()))


def measure(method, factors, seed, setting, purpose, num, task, cfg):
    """What measure_samples() gives for the training with a seed and learning rates. It is kept."""
    def measure_now():
        model = trained(method, factors, seed, task, cfg)
        found = measure_samples(method, model, setting, (purpose, seed), num, task, cfg)
        in_bits = bits(method, model, task, cfg) if purpose == "table" else None
        return found and found | {"bits": in_bits}

    key = str([purpose, num, setting, cfg.sample_steps, cfg.batch, cfg.ref, task.net.name])
    return variants.keep(checkpoint_path(method, factors, seed, cfg) + ".json", key, measure_now)


def measure_samples(method, model, setting, key, num, task, cfg):
    """Of num samples, on rank 0: {"fid", "classified_as_label": the share that the digits' classifier classifies as
    their label, or None, "wrong_sum": the share whose sum is not M, "tokens_off": by how many, on average over these}.

    setting, key: see generate_counts().
    """
    set_tf32(False)
    names, sums = task.train_set.class_names, [torch.zeros(0, dtype=torch.int64)]
    labels = generation.choose_labels(None, num, names, len(names))

    def read(part):
        counts = generate_counts(method, model, labels[part], setting, (*key, part.start), task, cfg)
        sums.append(counts.sum(1).cpu())
        return decode(task.tokenizer, counts)

    samples = Images(f"{method}, seed {key[1]}", num, read, labels)
    found = evaluate_fid.measure(task.net, samples, cfg.batch, False, task.device, *rank_and_world_size())
    off = (torch.cat(all_gather(torch.cat(sums))) - task.M).abs().double()
    return found and {
        "fid": evaluate_fid.frechet_distance(found.mu, found.sigma, *task.reference),
        "classified_as_label": found.classified_as_label, "wrong_sum": (off > 0).double().mean().item(),
        "tokens_off": (off.sum() / (off > 0).sum().clamp(min=1)).item()}


# ---------------------------------------------------------------------------------------------------------------------
# The methods: a model, its samples


def build(method, task, cfg):
    """The untrained model of a method."""
    if method.startswith("AR-"):
        return baselines.CausalDenoiser(task.M, task.C, **task.size)
    if method == "SetAR":
        return baselines.CausalDenoiser(task.C, task.M + 1, **task.size)
    if method == "Continuous Diffusion":
        return baselines.ContinuousDenoiser(task.C, task.M, **task.size)
    codebook_size = task.C + 1 if method == "FSDD (hidden)" else task.C  # with the null code
    return Denoiser(codebook_size, task.M, **task.size, unused_rows=cfg.unused_rows)


def generate_counts(method, model, labels, setting, key, task, cfg):
    """Counts (B, C) for labels (B,), of sum M or not. setting: guidance, top_p, top_k.  key: what the noise depends on,
    a word and numbers."""
    labels, random = labels.to(task.device), generator(task.device, *key)
    setting = setting | {"guidance": generation.parse_guidance(setting["guidance"]), "generator": random}
    with autocast(task.device, cfg.bf16):
        if method.startswith("AR-"):
            return tokens_to_counts(baselines.autoregressive_generate(model, labels, **setting), task.C)
        if method == "SetAR":
            return baselines.autoregressive_generate(model, labels, **setting)
        if method == "Continuous Diffusion":
            return baselines.continuous_generate(model, labels, cfg.sample_steps, setting["guidance"], random)
        setting |= {"steps": cfg.sample_steps, "prior": cfg.prior}
        if method == "Discrete Diffusion":
            return baselines.flow_generate(model, labels, **setting)
        if method == "FSDD (hidden)":
            sampler = generation.SAMPLERS["reveal"]
            return generate(model, labels, **setting | {"prior": "hidden"}, **sampler)[:, :task.C]
        sampler = generation.SAMPLERS["paper" if method == "FSDD (paper)" else "exchange"]
        return generate(model, labels, **setting, **sampler)


@torch.no_grad()
def bits(method, model, task, cfg):
    """-log2 p(set | class), mean over the test images; None for methods that do not have it.

    For AR-order1 and AR-order2 it is that of sequences. For AR-random and FSDD (hidden) it is an upper bound.
    """
    rank, world_size = rank_and_world_size()
    total = torch.zeros((), dtype=torch.float64, device=task.device)
    parts = chunks(slice(0, len(task.test_set)), 250)[rank::world_size]
    if not (method.startswith("AR-") or method in ("SetAR", "FSDD (hidden)")):
        return None
    for part, (images, labels) in zip(parts, read_slices(task.test_set, parts, cfg.workers)):
        tokens, labels = task.tokenizer.encode(images.to(task.device) / 127.5 - 1), labels.to(task.device)
        with autocast(task.device, cfg.bf16):
            if method == "FSDD (hidden)":
                random = generator(task.device, "bits", part.start)
                total -= baselines.hidden_log_likelihood(model, tokens, labels, random).sum()
                continue
            x = tokens_to_counts(tokens, task.C)
            if method != "SetAR":
                x = in_order(method, tokens, generator("cpu", "bits", part.start), task)
            total += baselines.autoregressive_loss(model, SimpleNamespace(x0=x, labels=labels)) * x.numel()
        if method == "AR-random":  # each order of the set has this probability on average
            total -= len(tokens) * math.lgamma(task.M + 1) - (tokens_to_counts(tokens, task.C) + 1.0).lgamma().sum()
    return all_reduce(total).item() / len(task.test_set) / math.log(2)


def decode(tokenizer, counts):
    """Counts (B, C) of any sums -> images (B, ch, H, W) uint8 on the CPU."""
    sums, size = counts.sum(1), tokenizer.image_size
    images = torch.empty(len(counts), tokenizer.channels, size, size, dtype=torch.uint8)
    for total in sums.unique():
        rows = (sums == total).nonzero()[:, 0]
        images[rows.cpu()] = generation.decode(tokenizer, counts_to_tokens(counts[rows]))
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Training


def checkpoint_path(method, factors, seed, cfg):
    """The path of a training's checkpoint: its name depends on all settings of the training."""
    settings = {name: getattr(cfg, name) for name, *_ in TRAINING if name != "sample_steps"}
    digest = variants.settings_digest(settings | {"of": os.path.basename(cfg.tokens), "seed": seed})
    return f"{variants.FOLDER}/{method.replace(' ', '')}-lr{multiples(factors, '-')}-seed{seed}-{digest}.pt"


def multiples(factors, between):
    """Factors of the two learning rates as text; one number if they are the same."""
    return between.join(f"{factor:g}" for factor in dict.fromkeys(factors))


def trained(method, factors, seed, task, cfg):
    """The model of a method with its averaged weights, trained unless its checkpoint is complete."""
    out, lr, muon_lr = checkpoint_path(method, factors, seed, cfg), factors[0] * cfg.lr, factors[1] * cfg.muon_lr
    changed = {"lr": lr, "muon_lr": muon_lr, "seed": seed, "out": out,
               "training_times": "flips" if method == "FSDD" else "uniform",
               "prior": "hidden" if method == "FSDD (hidden)" else cfg.prior}
    cfg = SimpleNamespace(**vars(cfg) | changed)
    torch.manual_seed(seed)
    model = build(method, task, cfg).to(task.device)
    checkpoint = None
    if os.path.isfile(out):
        checkpoint = load_checkpoint(out, "the same command, with the file removed", "table5")
        check_training(cfg, checkpoint, task.train_set)
        if checkpoint["step"] == cfg.steps:
            model.load_state_dict(checkpoint["weights"])
            return model.eval()
    if is_main():
        print(f"training {method}, learning rates {lr:g} and {muon_lr:g}, seed {seed}", flush=True)
    set_tf32(True)
    with Signals() as signals:
        return train(method, model, checkpoint, task, cfg, signals).eval()


def train(method, model, checkpoint, task, cfg, signals):
    """The training loop of train_fsdd.py with another model and loss. Returns the model with averaged weights."""
    B, device, compute_loss = cfg.batch_size, task.device, METHODS[method][-1]
    header = {"kind": "table5", "method": method, "images": task.train_set.fingerprint(), "model_config": task.size}
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = make_optimizers(model, cfg, cfg.beta2, decay_all=True)
    start = restore_training(checkpoint, model, ema, optimizers)
    ddp = parallel(model, device, cfg)
    rows, micro_batches = local_batch(B, cfg.device_batch)
    world_size = rank_and_world_size()[1]
    for step in progress_bar(start, cfg.steps, B):
        batch = draw_batch(method, task, rows, step, cfg)

        # forward and backward: the gradient of the mean loss over the global batch, in micro-batches
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]  # DDP.no_sync(): all-reduce once a step
            with autocast(device, cfg.bf16):
                loss = compute_loss(ddp, batch.rows(part))
            (loss * ((part.stop - part.start) / B) * world_size).backward()  # DDP divides by the world size

        # clip, learning rate, step, moving average
        check_finite(clip_grad_norm_(model.parameters(), cfg.clip or math.inf), step, cfg)
        lr_scale = warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr_end)
        set_lr(optimizers, lr_scale)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(model)

        # once in a while: save
        done = step + 1
        stopped = signals.received()
        if stopped or done % cfg.save_every == 0 or done == cfg.steps:
            save_training(header, done, cfg, model, ema, optimizers)
            if stopped:
                stop_by_signal(stopped, cfg.out)
    return ema.module


def draw_batch(method, task, rows, step, cfg):
    """This rank's rows of the batch of train_fsdd.py at a step. For autoregression over tokens, x0 is not the counts of
    an image's tokens but the tokens (rows, M) themselves, in the order that is learned."""
    B, C, M, device, labels = cfg.batch_size, task.C, task.M, task.device, task.train_set.labels
    sizes = SimpleNamespace(codebook_size=C + 1 if cfg.prior == "hidden" else C, num_tokens=M,
                            num_classes=task.size["num_classes"], code_embedding=torch.empty(0, device=device))
    batch = train_fsdd.draw_batch(task.tokens, labels, sizes, rows, step, cfg)
    if not method.startswith("AR-"):
        return batch
    random = generator("cpu", "order", cfg.seed, step)
    indices = batch_indices(len(labels), B, cfg.seed, step)[rows]  # the images of the batch
    version = torch.randint(len(task.tokens), (B,), generator=random)[rows]  # an image, or its mirror image
    tokens = torch.from_numpy(task.tokens[version.numpy(), indices.numpy()].astype(np.int64))  # (rows, M)
    return batch._replace(x0=in_order(method, tokens, random, task, B, rows).to(device))


def in_order(method, tokens, random, task, B=None, rows=slice(None)):
    """Tokens (n, M) in the order that a method learns. Random orders are drawn for B sets, of which these are rows."""
    if method == "AR-sorted":
        return tokens.gather(1, task.first_axis[tokens].argsort(1))
    if method == "AR-random":
        order = torch.rand(B or len(tokens), task.M, generator=random)[rows].argsort(1)
        return tokens.gather(1, order.to(tokens.device))
    return tokens[:, torch.randperm(task.M, generator=generator("cpu", method)).to(tokens.device)]


def print_table(found, cfg):
    """The table in Markdown."""
    fid = "gFID" if cfg.data not in EMBEDDED or cfg.inception else "digits FID"
    print(f"| method | set | discrete | fixed sum | gFID, paper | {fid} | classified as their label | bits an image "
          "| break the sum | by, tokens | parameters | learning rates; guidance; top-p; top-k |\n|" + "---|" * 12)
    for method, row in found.items():
        *properties, paper, _ = METHODS[method]
        fids = torch.tensor([result["fid"] for result in row.results])
        deviation = f" ± {fids.std():.1f}" if len(fids) > 1 else ""
        wrong_sum, tokens_off, classified, in_bits = (
            sum(result[name] or 0 for result in row.results) / len(row.results)
            for name in ("wrong_sum", "tokens_off", "classified_as_label", "bits"))
        cells = [method, *properties, paper, f"{fids.mean():.1f}{deviation}", f"{classified:.1%}" if classified else "",
                 f"{in_bits:.1f}" if in_bits else "", f"{wrong_sum:.1%}", f"{tokens_off:.1f}" if wrong_sum else "",
                 f"{row.parameters / 1e6:.3f} M",
                 f"x {multiples(row.factors, ' and ')}; " + "; ".join(map(str, row.setting.values()))]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    run(main)
