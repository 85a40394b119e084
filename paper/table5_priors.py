"""Table 5 (Sec. 4.3.1): ways to model the token sets of one tokenizer of the digits, with the same data and steps, and
parameters that differ by less than 6 %. FSDD has three rows: with the paper's training times, with those of beyond.py,
and with the masked tokens of masked.py. All have the dense denoiser and code embeddings that start at zero.

    python train_tokenizer.py --codebook_size 128 --uniformity 0.25 --absolute 0 --out t128.pt
    python -m paper.table5_priors --ckpt t128.pt

Every method is tuned in the same way, on its first seed, by the digits FID of --num_search samples: learning rates out
of LEARNING_RATES, each trained for --search_steps; then SAMPLING and TRUNCATIONS together; then GUIDANCE. There is one
exception. In so few steps no learning rate makes "FSDD (paper)" draw digits, so it has those of the digits' recipe. The
best setting is trained with every seed and measured with --num_images other samples.

Trainings that are complete and measurements are kept in paper/cache. Prints a Markdown table: digits FID, mean and
deviation over seeds, and how many samples have a wrong sum, and by how many tokens. The set decoder takes any number of
tokens, so these are decoded as they are.
"""
import os
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import evaluate_fid
import sample
import train_fsdd
from data.evaluation_inputs import Images
from data.loader import batch_indices, open_datasets
from data.token_sets import encode_training_set
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import Denoiser, fsdd_loss
from paper import baselines, variants
from paper.inputs import DEVICE, open_tokenizer, read_options
from support.command_line import stop
from support.files import load_checkpoint, save_checkpoint
from support.hardware import autocast, init_distributed
from support.optimizers import make_optimizers, set_lr, warmup_cosine
from support.pictures import grid, save
from support.seeds import generator
from support.training import progress_bar, run

METHODS = {  # which properties the paper ascribes to it: set, discrete, fixed sum; its gFID in the paper; its loss
    "AR-order1": (" ", "x", " ", 6.55, baselines.autoregressive_loss),
    "AR-order2": (" ", "x", " ", 6.62, baselines.autoregressive_loss),
    "AR-random": ("x", "x", " ", 8.99, baselines.autoregressive_loss),
    "AR-sorted": ("x", "x", " ", "", baselines.autoregressive_loss),  # codes sorted along the codebook's first axis
    "SetAR": ("x", "x", " ", 6.92, baselines.autoregressive_loss),
    "Discrete Diffusion": ("x", "x", " ", 6.23, baselines.flow_loss),
    "Continuous Diffusion": ("x", " ", "x", 75.45, baselines.continuous_loss),
    "FSDD (paper)": ("x", "x", "x", 5.56, fsdd_loss),  # uniform training times
    "FSDD": ("x", "x", "x", "", fsdd_loss),            # training times uniform in flips
    "masked tokens": ("x", "x", "x", "", fsdd_loss),
}
# The digits' recipe, but a narrower denoiser, as most of the methods have a dense one, and another unit for lr
SETTINGS = {name: digits for name, digits, *_ in train_fsdd.HYPERPARAMETERS} | {
    "width": 64, "layers": 2, "heads": 2, "lr": 2e-3}
# What lr and muon_lr are multiplied by; compared by samples with the setting FIRST. The last is the digits' recipe
LEARNING_RATES = ((0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (4.0, 1.0))
SAMPLING = ({"steps": 25, "times": "even"}, {"steps": 50, "times": "even"}, {"steps": 36, "times": "middle"})
TRUNCATIONS = ({"top_p": 1.0, "top_k": 0}, {"top_p": 0.8, "top_k": 0}, {"top_p": 1.0, "top_k": 2})
GUIDANCE = ("4", "1", "2", "4,8,8", "1.2,7")  # see sample.parse_guidance()
FIRST = {**SAMPLING[1], **TRUNCATIONS[1], "guidance": GUIDANCE[0]}
BATCH = 250  # samples at once
OPTIONS = [
    ("--ckpt", "tokenizer.pt", "", "checkpoint of train_tokenizer.py"),
    ("--methods", ",".join(METHODS), "", "which, separated by commas"),
    ("--seeds", 3, "[1, inf)", "trainings of every method with its best setting"),
    ("--steps", 2820, "[1, inf)", "optimizer steps, three passes over the data"),
    ("--search_steps", 470, "[1, inf)", "steps of the trainings that search learning rates"),
    ("--num_search", 500, "[2, inf)", "samples that measure a setting in the search"),
    ("--num_images", 1000, "[2, inf)", "samples of the table"),
    ("--out", "table5.png", "", "a picture, samples of each method"),
    DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table5_priors", __doc__, argv)
    began = time.time()
    methods = args.methods.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        stop(f"--methods must be some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    task = prepare(args)
    found = {method: tune_and_measure(method, task, args) for method in methods}
    print(f"{task.C} codes, sets of {task.M} tokens; {args.steps} steps of {SETTINGS['batch_size']}; "
          f"{args.num_images} samples")
    print_table(found)
    save(grid(torch.cat([row.images for row in found.values()]), 20, list(found)), args.out)
    print(f"{args.out}: samples of each; {(time.time() - began) / 60:.1f} min")


def prepare(args):
    """What all methods have in common: tokenizer, tokens, labels, and what digits FID is measured with."""
    device, *_ = init_distributed(args.device, tf32=False)
    tokenizer, *_ = open_tokenizer(args.ckpt, "digits", device)
    cfg = SimpleNamespace(**SETTINGS | {"tokens": variants.tokens_of(args.ckpt)})
    os.makedirs(variants.FOLDER, exist_ok=True)
    train_set, _ = open_datasets(cfg, tokenizer.image_size)
    net = evaluate_fid.network(SimpleNamespace(inception="", classifier=variants.CLASSIFIER), "digits", device, rank=0)
    digits = Images("the training digits", len(train_set), lambda part: train_set.images[part])
    return SimpleNamespace(
        device=device, tokenizer=tokenizer, M=tokenizer.num_tokens, C=tokenizer.codebook_size, net=net,
        reference=evaluate_fid.measure(net, digits, BATCH, False, device),
        tokens=encode_training_set(tokenizer, train_set, device, cfg),  # (1, N, M)
        labels=train_set.labels, class_names=train_set.class_names, tokens_file=cfg.tokens,
        first_axis=tokenizer.quantizer.codes()[:, 0].detach().cpu())


def tune_and_measure(method, task, args):
    """A row of the table: the setting that was chosen, and the measurements of its trainings."""
    def search_fid(factors, steps, setting):
        return measure(method, factors, 0, steps, setting, "search", args.num_search, task)["fid"]

    factors = LEARNING_RATES[-1]
    if method != "FSDD (paper)":
        factors = min(LEARNING_RATES, key=lambda factors: search_fid(factors, args.search_steps, FIRST))
    sampling = SAMPLING[:1] if is_autoregressive(method) else SAMPLING  # autoregression has no such steps
    truncations = TRUNCATIONS[:1] if method == "Continuous Diffusion" else TRUNCATIONS  # it draws from no distribution
    setting = min((FIRST | steps | truncation for steps in sampling for truncation in truncations),
                  key=lambda setting: search_fid(factors, args.steps, setting))
    setting = min((setting | {"guidance": guidance} for guidance in GUIDANCE),
                  key=lambda setting: search_fid(factors, args.steps, setting))
    results = [measure(method, factors, seed, args.steps, setting, "table", args.num_images, task)
               for seed in range(args.seeds)]
    model = trained(method, factors, 0, args.steps, task)
    labels = sample.choose_labels(None, 20, task.class_names, 10)
    images = decode(task.tokenizer, generate_counts(method, model, labels, setting, ("picture",), task))
    return SimpleNamespace(factors=factors, setting=setting, results=results, images=images,
                           parameters=sum(parameter.numel() for parameter in model.parameters()))


def measure(method, factors, seed, steps, setting, purpose, num, task):
    """What measure_samples() returns for a training. It is kept."""
    def measure_now():
        model = trained(method, factors, seed, steps, task)
        return measure_samples(method, model, setting, (purpose, seed), num, task)

    key = str([purpose, num, setting, task.net.name])
    return variants.keep(checkpoint_path(method, factors, seed, steps, task) + ".json", key, measure_now)


def measure_samples(method, model, setting, key, num, task):
    """Of num samples: {"fid": digits FID, "classified_as_label": the share that the classifier classifies as their
    label, "wrong_sum": the share whose sum is not M, "tokens_off": by how many, on average over these}.

    setting, key: see generate_counts().
    """
    labels, sums = sample.choose_labels(None, num, task.class_names, len(task.class_names)), []

    def read(part):
        counts = generate_counts(method, model, labels[part], setting, (*key, part.start), task)
        sums.append(counts.sum(1).cpu())
        return decode(task.tokenizer, counts)

    found = evaluate_fid.measure(task.net, Images(method, num, read, labels), BATCH, False, task.device)
    fid = evaluate_fid.frechet_distance(found.mu, found.sigma, task.reference.mu, task.reference.sigma)
    off = (torch.cat(sums) - task.M).abs().double()
    return {"fid": fid, "classified_as_label": found.classified_as_label, "wrong_sum": (off > 0).double().mean().item(),
            "tokens_off": (off.sum() / (off > 0).sum().clamp(min=1)).item()}


# ---------------------------------------------------------------------------------------------------------------------
# The methods: a model, its samples


def is_autoregressive(method):
    return method.startswith("AR-") or method == "SetAR"


def build(method, task):
    """The untrained model of a method."""
    size = {name: SETTINGS[name] for name in ("width", "layers", "heads", "gelu")}
    size["num_classes"] = len(task.class_names)
    if method.startswith("AR-"):
        return baselines.CausalDenoiser(task.M, task.C, **size)
    if method == "SetAR":
        return baselines.CausalDenoiser(task.C, task.M + 1, **size)
    if method == "Continuous Diffusion":
        return baselines.ContinuousDenoiser(task.C, task.M, **size)
    return Denoiser(task.C + 1 if method == "masked tokens" else task.C, task.M, **size)  # with the mask code


def generate_counts(method, model, labels, setting, key, task):
    """Counts (B, C) for labels (B,), of sum M or not. setting: steps, times, top_p, top_k and guidance.  key: what the
    noise depends on, a word and numbers."""
    labels, random = labels.to(task.device), generator(task.device, *key)
    setting = setting | {"guidance": sample.parse_guidance(setting["guidance"]), "generator": random}
    truncation = {name: setting[name] for name in ("guidance", "top_p", "top_k", "generator")}
    with autocast(task.device, SETTINGS["bf16"]):
        if method == "SetAR":
            return baselines.autoregressive_generate(model, labels, **truncation)
        if method.startswith("AR-"):
            return tokens_to_counts(baselines.autoregressive_generate(model, labels, **truncation), task.C)
        if method == "Discrete Diffusion":
            return baselines.flow_generate(model, labels, **setting)
        if method == "Continuous Diffusion":
            return baselines.continuous_generate(model, labels, setting["steps"], setting["times"],
                                                 setting["guidance"], random)
        refine = sample.SAMPLERS["masked" if method == "masked tokens" else "paper"]
        *_, counts = refine(model, labels, **setting)
    return counts[:, :task.C]  # without the mask code


def decode(tokenizer, counts):
    """Counts (B, C) of any sums -> images (B, ch, H, W) uint8 on the CPU."""
    sums, size = counts.sum(1), tokenizer.image_size
    images = torch.empty(len(counts), tokenizer.channels, size, size, dtype=torch.uint8)
    for total in sums.unique():
        rows = (sums == total).nonzero()[:, 0]
        images[rows.cpu()] = sample.decode(tokenizer, counts_to_tokens(counts[rows]))
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Training


def checkpoint_path(method, factors, seed, steps, task):
    """The path of a training's checkpoint: its name depends on all settings of the training."""
    digest = variants.settings_digest(SETTINGS | {"of": os.path.basename(task.tokens_file), "steps": steps})
    name = f"{method.replace(' ', '')}-lr{multiples(factors, '-')}-seed{seed}-{digest}"
    return f"{variants.FOLDER}/{name}.pt"


def multiples(factors, between):
    """Factors of the two learning rates as text; one number if they are the same."""
    return between.join(f"{factor:g}" for factor in dict.fromkeys(factors))


def trained(method, factors, seed, steps, task):
    """The model of a method with its averaged weights, trained unless it is kept."""
    path = checkpoint_path(method, factors, seed, steps, task)
    torch.manual_seed(seed)
    model = build(method, task).to(task.device)
    if os.path.isfile(path):
        model.load_state_dict(load_checkpoint(path, "the same command, with the file removed", "table5")["weights"])
        return model.eval()
    lr, muon_lr = factors[0] * SETTINGS["lr"], factors[1] * SETTINGS["muon_lr"]
    print(f"training {method}, learning rates {lr:g} and {muon_lr:g}, seed {seed}", flush=True)
    cfg = SimpleNamespace(**SETTINGS | {
        "lr": lr, "muon_lr": muon_lr, "seed": seed, "steps": steps,
        "training_times": "flips" if method == "FSDD" else "uniform",
        "noise": "masked" if method == "masked tokens" else "multinomial"})
    model = train(method, model, task, cfg)
    save_checkpoint({"kind": "table5", "weights": model.state_dict()}, path)
    return model


def train(method, model, task, cfg):
    """The training loop. Returns the model with averaged weights."""
    compute_loss = METHODS[method][-1]
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = make_optimizers(model, cfg, cfg.beta2, decay_all=True)
    for step in progress_bar(0, cfg.steps, cfg.batch_size):
        batch = draw_batch(method, task, step, cfg)
        with autocast(task.device, cfg.bf16):
            loss = compute_loss(model, batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), cfg.clip)
        set_lr(optimizers, warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr_end))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(model)
    return ema.module.eval()


def draw_batch(method, task, step, cfg):
    """The batch of train_fsdd.py at a step. For autoregression over tokens, x0 is not the counts of an image's tokens
    but the tokens (B, M) themselves, in the order that is learned."""
    config = {"codebook_size": task.C + (cfg.noise == "masked"), "num_tokens": task.M,
              "num_classes": len(task.class_names)}
    rows = slice(0, cfg.batch_size)
    batch = train_fsdd.draw_batch(task.tokens, task.labels, config, rows, step, task.device, cfg)
    if not method.startswith("AR-"):
        return batch
    images = batch_indices(len(task.labels), cfg.batch_size, cfg.seed, step)
    tokens = torch.from_numpy(task.tokens[0, images.numpy()].astype(np.int64))  # (B, M)
    if method == "AR-sorted":
        order = task.first_axis[tokens].argsort(1)
    elif method == "AR-random":
        order = torch.rand(tokens.shape).argsort(1)
    else:
        order = torch.randperm(task.M, generator=generator("cpu", method)).expand_as(tokens)
    return batch._replace(x0=tokens.gather(1, order).to(task.device))


def print_table(found):
    """The table in Markdown."""
    print("| method | set | discrete | fixed sum | gFID, paper | digits FID | classified as their label | wrong sum "
          "| error, tokens | parameters | learning rates | steps, times | top-p; top-k; guidance |\n|" + "---|" * 13)
    for method, row in found.items():
        *properties, paper, _ = METHODS[method]
        fids = torch.tensor([result["fid"] for result in row.results])
        deviation = f" ± {fids.std():.1f}" if len(fids) > 1 else ""
        wrong_sum, tokens_off, classified = (sum(result[name] for result in row.results) / len(row.results)
                                             for name in ("wrong_sum", "tokens_off", "classified_as_label"))
        steps, times, *rest = row.setting.values()
        cells = [method, *properties, paper, f"{fids.mean():.1f}{deviation}", f"{classified:.1%}", f"{wrong_sum:.1%}",
                 f"{tokens_off:.1f}" if wrong_sum else "", f"{row.parameters / 1e6:.3f} M",
                 f"x {multiples(row.factors, ' and ')}", "" if is_autoregressive(method) else f"{steps}, {times}",
                 "; ".join(map(str, rest))]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    run(main)
