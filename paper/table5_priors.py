"""Table 5 (Sec. 4.3.1): seven ways to model the token sets of one tokenizer, with the same data and steps, and
parameters that differ by less than 6 %. FSDD has two rows: with the times and the sampler of the digits' recipe, and
with the paper's, both with the dense denoiser.

    python -m paper.table5_priors --recipe digits                      the digits, tokenizer.pt
    torchrun --nproc_per_node=8 -m paper.table5_priors --recipe imagenet256 --ckpt tokenizer.pt     the paper's own

Every method is tuned in the same way, on its first seed: learning rates out of LEARNING_RATES, each trained for
--search_steps, then guidance out of GUIDANCE and a cut of the distributions out of CUTS, by the FID of --num_search
samples. The best setting is trained with every seed and measured with --num_images other samples. Trainings and
measurements are kept in paper/cache: an interrupted run resumes.
Prints a Markdown table: FID (on the digits digits FID), mean and spread over seeds, and how many samples break the
fixed sum and by how many tokens. The set decoder takes any number of tokens, so these are decoded as they are.

On ImageNet the learning rates are the recipe's, without a search. SetAR then draws C = 4096 counts one after the other,
without a cache of keys and values: its samples cost far more than all others.
"""
import math
import os
import time
from types import SimpleNamespace

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import common
import evaluate_fid
import sample
import train_fsdd
from data import pictures, records, sides
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import Denoiser, fsdd_loss, generate
from paper import baselines, variants

# What --lr and --muon_lr are multiplied by; compared by FIRST's samples. The last is the digits' recipe's own.
LEARNING_RATES = ((0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (4.0, 1.0))
GUIDANCE = ("1", "2", "4", "4,30,30", "1.2,7")  # see fsdd.guidance_weight()
CUTS = ({"top_p": 1.0, "top_k": 0}, {"top_p": 0.8, "top_k": 0}, {"top_p": 1.0, "top_k": 2})
FIRST = {"guidance": "4", **CUTS[0]}
METHODS = {  # the priors it has: set, discrete, fixed sum; the paper's gFID
    "AR-order1": (" ", "x", " ", 6.55),
    "AR-order2": (" ", "x", " ", 6.62),
    "AR-random": ("x", "x", " ", 8.99),
    "SetAR": ("x", "x", " ", 6.92),
    "Discrete Diffusion": ("x", "x", " ", 6.23),
    "Continuous Diffusion": ("x", " ", "x", 75.45),
    "FSDD (paper)": ("x", "x", "x", 5.56),  # uniform times, the paper's sampler
    "FSDD": ("x", "x", "x", ""),            # times uniform in flips, the exchange sampler
}
# Rows of train_fsdd.py that are others here on the digits: a denoiser less wide, as most of the methods have a dense
# one; 3 passes over the data; the search tries the recipe's lr too
CHANGED = {"width": 64, "heads": 2, "steps": 2820, "lr": 2e-3, "sample_steps": 25}
HYPERPARAMETERS = [
    ("ckpt",             "tokenizer.pt", "tokenizer.pt", "checkpoint of train_tokenizer.py"),
    ("methods",          ",".join(METHODS), ",".join(METHODS), "which, with commas between"),
    ("seeds",            3,              1,              "trainings of every method with its best setting"),
    ("search_lr",        True,           False,          "search the learning rate; else it is --lr"),
    ("search_steps",     470,            1000000,        "steps of the trainings that search the learning rate"),
    ("num_search",       500,            10000,          "samples that measure a setting in the search"),
    ("num_images",       1000,           50000,          "samples of the table"),
    ("batch",            250,            100,            "samples at once"),
    ("ref",              "",             "VIRTUAL_imagenet256_labeled.npz", "reference, see evaluate_fid.py"),
    ("inception",        "",             "",             "file of Inception's weights (downloaded to torch's cache)"),
    *[(name, CHANGED.get(name, digits), *rest) for name, digits, *rest in train_fsdd.HYPERPARAMETERS
      if name not in ("tokenizer", "tokens", "out", "seed", "times", "sampler", "guidance", "top_p", "top_k",
                      "denoiser", "loss_codes", "code_start", "picture_every")],
    ("out",              "table5.png",   "table5.png",   "a picture, samples of each method"),
]


def main(argv=None):
    began = time.time()
    cfg, _ = common.parse(HYPERPARAMETERS, __doc__, None, argv, "python -m paper.table5_priors")
    stage1 = common.load_checkpoint(cfg.ckpt, "python train_tokenizer.py", "tokenizer")
    device, rank, processes = common.init_distributed(cfg.device, cfg.tf32)
    try:
        world = prepare(stage1, device, rank, processes, cfg)
        found = {method: tune_and_measure(method, world, cfg) for method in cfg.methods.split(",")}
    except ValueError as problem:
        common.stop(str(problem))
    if rank > 0:
        return
    print(f"{world.C} codes, sets of {world.M} tokens; {cfg.steps} steps of {cfg.batch_size}; {cfg.num_images} samples")
    print_table(found, cfg)
    picture = pictures.grid(torch.cat([result.images for result in found.values()]), 20, list(found))
    pictures.save(picture, cfg.out)
    print(f"{cfg.out}: samples of each; {(time.time() - began) / 60:.1f} min")


def prepare(stage1, device, rank, processes, cfg):
    """All that the seven have in common: tokens, labels, tokenizer, what FID is measured by. ValueError where
    something lacks."""
    unknown = [method for method in cfg.methods.split(",") if method not in METHODS]
    if unknown:
        raise ValueError(f"--methods must be some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    if min(cfg.num_images, cfg.num_search) < 2:
        raise ValueError("--num_images and --num_search must be at least 2, as a covariance needs")
    if not cfg.out.endswith(".png"):
        raise ValueError(f"--out must end in .png, got {cfg.out}")
    variants.make_folder()
    cfg.tokenizer, cfg.tokens, cfg.seed, cfg.picture_every = cfg.ckpt, variants.tokens_of(cfg.ckpt), 0, cfg.steps
    cfg.guidance, cfg.top_p, cfg.top_k = FIRST.values()  # the search finds each method's
    cfg.times, cfg.sampler, cfg.denoiser, cfg.loss_codes = "uniform", "paper", "dense", 3
    tokenizer, train_set, _, model_config, _ = train_fsdd.prepare(stage1, device, cfg)
    world = SimpleNamespace(device=device, rank=rank, processes=processes, tokenizer=tokenizer, train_set=train_set,
                            M=tokenizer.num_tokens, C=tokenizer.codebook_size)
    world.size = {name: model_config[name] for name in ("num_classes", "width", "layers", "heads", "gelu")}
    records.check_training(cfg, None, train_set)
    args = SimpleNamespace(ckpt=cfg.ckpt, inception=cfg.inception, classifier=variants.CLASSIFIER)
    world.net = evaluate_fid.network(args, cfg.data, device, rank)
    world.reference = reference(world, cfg)
    world.tokens = train_fsdd.encode_training_set(tokenizer, train_set, device, cfg)  # (1 or 2, N, M)
    return world


def reference(world, cfg):
    """(mu, sigma) of the images that samples are compared with, known to rank 0."""
    if not cfg.ref and cfg.data != "digits":
        raise ValueError(f"--ref must say what samples are compared with; {evaluate_fid.NEEDS}")
    images = sides.open_images(cfg.ref, None) if cfg.ref else evaluate_fid.training_digits()
    if images.statistics:
        evaluate_fid.check_features(images, None, world.net)
        return images.statistics
    seen = evaluate_fid.measure(world.net, images, cfg.batch, False, world.device, world.rank, world.processes)
    return seen and (seen.mu, seen.sigma)


def tune_and_measure(method, world, cfg):
    """The result of one row of the table: the setting that was chosen, and what its trainings were measured to be."""
    shorter = SimpleNamespace(**vars(cfg) | {"steps": cfg.search_steps})

    def search_fid(factors, setting, cfg):
        return measure(method, factors, 0, setting, "search", cfg.num_search, world, cfg)["fid"]

    factors = (1.0, 1.0)
    if cfg.search_lr:
        factors = min(LEARNING_RATES, key=lambda factors: search_fid(factors, FIRST, shorter))
    cuts = CUTS if method != "Continuous Diffusion" else CUTS[:1]  # there is no distribution to cut
    setting = min(({"guidance": guidance, **cut} for guidance in GUIDANCE for cut in cuts),
                  key=lambda setting: search_fid(factors, setting, cfg))
    results = [measure(method, factors, seed, setting, "table", cfg.num_images, world, cfg)
               for seed in range(cfg.seeds)]
    model = trained(method, factors, 0, world, cfg)
    labels = sample.choose_labels(None, 20, world.train_set.class_names, 10)
    images = decode(world.tokenizer, generated(method, model, labels, setting, ("picture",), world, cfg))
    return SimpleNamespace(factors=factors, setting=setting, results=results, images=images,
                           parameters=sum(parameter.numel() for parameter in model.parameters()))


def measure(method, factors, seed, setting, purpose, num, world, cfg):
    """{"fid", "broken": the share of samples whose sum is not M, "by": how many tokens those are off, on average,
    "read": the share that the digits' classifier reads as asked for, or None}.

    num samples of the training with a seed and learning rate, drawn from noise that depends on seed and purpose, a
    word. What was measured before is kept.
    """
    path = path_of(method, factors, seed, cfg)
    kept = path + ".json"
    key = str([purpose, num, setting, cfg.sample_steps, cfg.batch, cfg.ref, world.net.name])
    result = common.all_gather(records.read_json(kept).get(key))[0]
    if result:
        return result
    model = trained(method, factors, seed, world, cfg)
    common.set_tf32(False)
    names, sums = world.train_set.class_names, [torch.zeros(0, dtype=torch.int64)]
    labels = sample.choose_labels(None, num, names, len(names))

    def read(part):
        counts = generated(method, model, labels[part], setting, (purpose, seed, part.start), world, cfg)
        sums.append(counts.sum(1).cpu())
        return decode(world.tokenizer, counts)

    samples = sides.side(f"{method}, seed {seed}", num, read, labels)
    found = evaluate_fid.measure(world.net, samples, cfg.batch, False, world.device, world.rank, world.processes)
    off = [(part - world.M).abs() for part in common.all_gather(torch.cat(sums))]
    if world.rank == 0:
        off = torch.cat(off).double()
        result = {"fid": evaluate_fid.frechet_distance(found.mu, found.sigma, *world.reference),
                  "read": found.read_as_label,
                  "broken": (off > 0).double().mean().item(), "by": (off.sum() / (off > 0).sum().clamp(min=1)).item()}
        records.write_json(records.read_json(kept) | {key: result}, kept)
    return common.all_gather(result)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The seven: a model, its loss, its samples


def build(method, world, cfg):
    """The untrained model of a method."""
    if method.startswith("AR-"):
        return baselines.autoregressive(world.M, world.C, **world.size)
    if method == "SetAR":
        return baselines.autoregressive(world.C, world.M + 1, **world.size)
    if method == "Continuous Diffusion":
        return baselines.continuous(world.C, world.M, **world.size)
    return Denoiser(world.C, world.M, **world.size, unused_rows=cfg.unused_rows)


def loss(method, model, x, labels, t, x1, uniform, order, world):
    """The loss of a micro-batch; every method takes of the draws, the same for all, what it needs.

    x: tokens (B, M).  t: (B,) in (0, 1].  x1: noise (B, C).  uniform: (B, C) in [0, 1).  order: permutations (B, M).
    """
    x0 = tokens_to_counts(x, world.C)
    if method.startswith("AR-"):
        return baselines.autoregressive_loss(model, x.gather(1, order), labels, world.C)
    if method == "SetAR":
        return baselines.autoregressive_loss(model, x0, labels, world.M + 1)
    if method == "Continuous Diffusion":
        normal = torch.special.ndtri(uniform.clamp(1e-7, 1 - 1e-7))
        return baselines.continuous_loss(model, x0, labels, t, normal, world.M)
    if method == "Discrete Diffusion":
        return baselines.flow_loss(model, x0, labels, t, x1, uniform)
    return fsdd_loss(model, x0, labels, t, x1, uniform)


def generated(method, model, labels, setting, key, world, cfg):
    """Counts (B, C) for labels (B,), of sum M or not. setting: guidance, top_p, top_k.  key: what the noise depends on,
    a word and numbers."""
    labels, random = labels.to(world.device), common.generator(world.device, *key)
    setting = setting | {"guidance": common.guidance_weights(setting["guidance"]), "generator": random}
    with common.autocast(world.device, cfg.bf16):
        if method.startswith("AR-"):
            return tokens_to_counts(baselines.autoregressive_generate(model, labels, **setting), world.C)
        if method == "SetAR":
            return baselines.autoregressive_generate(model, labels, **setting)
        setting |= {"steps": cfg.sample_steps}
        if method == "Continuous Diffusion":
            return baselines.continuous_generate(model, labels, setting["steps"], setting["guidance"], random)
        setting |= {"prior": cfg.prior}
        if method == "Discrete Diffusion":
            return baselines.flow_generate(model, labels, **setting)
        return generate(model, labels, **setting, sampler="paper" if method == "FSDD (paper)" else "exchange")


def decode(tokenizer, counts):
    """Counts (B, C) of any sums -> images (B, ch, H, W) uint8 on the CPU."""
    sums = counts.sum(1)
    images = None
    for total in sums.unique():
        rows = (sums == total).nonzero()[:, 0]
        drawn = sample.decode(tokenizer, counts_to_tokens(counts[rows]))
        images = torch.empty(len(counts), *drawn.shape[1:], dtype=torch.uint8) if images is None else images
        images[rows.cpu()] = drawn
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Training, by the loop of train_fsdd.py


def path_of(method, factors, seed, cfg):
    """Where a training's checkpoint stands: a name that all its settings are in."""
    no_matter = variants.NO_MATTER | {"ckpt", "methods", "seeds", "search_lr", "search_steps", "num_search",
                                      "num_images", "batch", "ref", "inception", "times", "sampler", "sample_steps",
                                      "guidance", "top_p", "top_k", "denoiser", "loss_codes"}
    settings = {name: value for name, value in vars(cfg).items() if name not in no_matter}
    mark = variants.mark(settings | {"tokens": os.path.basename(cfg.tokens), "seed": seed})
    return f"{variants.FOLDER}/{method.replace(' ', '')}-lr{multiples(factors, '-')}-seed{seed}-{mark}.pt"


def multiples(factors, between):
    """Factors of the two learning rates as text; one number where they are the same."""
    return between.join(f"{factor:g}" for factor in dict.fromkeys(factors))


def trained(method, factors, seed, world, cfg):
    """The model of a method with its averaged weights, trained now as far as it is not."""
    lr, muon_lr = factors[0] * cfg.lr, factors[1] * cfg.muon_lr
    run = SimpleNamespace(**vars(cfg) | {"lr": lr, "muon_lr": muon_lr, "seed": seed,
                                         "out": path_of(method, factors, seed, cfg)})
    run.times = "flips" if method == "FSDD" else "uniform"
    torch.manual_seed(seed)
    model = build(method, world, cfg).to(world.device)
    checkpoint = None
    if os.path.isfile(run.out):
        checkpoint = common.load_checkpoint(run.out, "the same command, with the file removed", "prior")
    claim = records.check_training(run, checkpoint, world.train_set)
    if checkpoint and checkpoint["step"] == run.steps:
        model.load_state_dict(checkpoint["weights"])
        return model.eval()
    if world.rank == 0:
        print(f"training {method}, learning rates {lr:g} and {muon_lr:g}, seed {seed}", flush=True)
    common.set_tf32(cfg.tf32)
    with claim, common.Signals() as signals:
        return train(method, model, checkpoint, world, run, signals).eval()


def train(method, model, checkpoint, world, cfg, signals):
    """The training loop of train_fsdd.py with another model and loss. Returns the model with averaged weights."""
    B, C, M, device, labels = cfg.batch_size, world.C, world.M, world.device, world.train_set.labels
    sizes = {"codebook_size": C, "num_tokens": M, "num_classes": world.size["num_classes"]}
    header = {"kind": "prior", "method": method, "images": world.train_set.fingerprint(), "model_config": world.size}
    fixed = torch.randperm(M, generator=common.generator("cpu", method)).to(device)
    common.set_switches(model, cfg)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizers = common.make_optimizers(model, cfg, cfg.steps, cfg.warmup, cfg.beta2, decay_all=True)
    start = records.restore_training(checkpoint, model, ema, optimizers)
    ddp = common.parallel(model, device, cfg)
    rows, micro_batches, world_size = common.shares(B, cfg.device_batch)
    log = records.open_log(records.beside(cfg.out, ".csv"), train_fsdd.COLUMNS, start)
    for step in records.progress_bar(start, cfg.steps, B):
        random = common.generator(device, "step", cfg.seed, step)
        x, y, t, x1, uniform, _ = train_fsdd.get_batch(world.tokens, labels, rows, sizes, random, step, cfg)
        order = torch.rand(B, M, generator=random, device=device)[rows].argsort(1)
        order = order if method == "AR-random" else fixed.expand_as(order)
        mean = torch.zeros((), device=device)
        for part in micro_batches:
            ddp.require_backward_grad_sync = part is micro_batches[-1]
            with common.autocast(device, cfg.bf16):
                of_part = loss(method, ddp, x[part], y[part], t[part], x1[part], uniform[part], order[part], world)
            of_part = of_part * (len(x[part]) / B)
            (of_part * world_size).backward()
            mean += of_part.detach()
        records.check_finite(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf), step, cfg)
        lr = optimizers[0][1].get_last_lr()[0]
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.update_parameters(model)
        if records.due(step, cfg.log_every, cfg.steps):
            log({"step": step + 1, "loss": common.all_reduce(mean).item(), "lr": lr})
        if signals.received() or records.due(step, cfg.save_every, cfg.steps):
            records.save_training(header, step + 1, cfg, model, ema, optimizers)
            signals.exit_if_received(cfg.out, "the same command")
    return ema.module


def print_table(found, cfg):
    """The table in Markdown."""
    fid = "gFID" if cfg.data != "digits" or cfg.inception else "digits FID"
    print(f"| method | set | discrete | fixed sum | gFID, paper | {fid} | classified as requested | break the sum "
          "| by, tokens | parameters | learning rates; guidance; top-p; top-k |\n|" + "---|" * 11)
    for method, row in found.items():
        *priors, paper = METHODS[method]
        fids = torch.tensor([result["fid"] for result in row.results])
        spread = f" ± {fids.std():.1f}" if len(fids) > 1 else ""
        broken, by, read = (sum(result[name] or 0 for result in row.results) / len(row.results)
                            for name in ("broken", "by", "read"))
        cells = [method, *priors, paper, f"{fids.mean():.1f}{spread}", f"{read:.1%}" if read else "", f"{broken:.1%}",
                 f"{by:.1f}" if broken else "", f"{row.parameters / 1e6:.3f} M",
                 f"x {multiples(row.factors, ' and ')}; " + "; ".join(map(str, row.setting.values()))]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    common.run(main)
