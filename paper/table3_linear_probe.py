"""Table 3 (Sec. 4.2.4): linear probing. How well does a linear classifier of token sets recognize an image's class?

    python -m paper.table3_linear_probe                   the tokenizers of Table 6 on the digits, trained if needed
    python -m paper.table3_linear_probe --ckpt a/tokenizer.pt b/tokenizer.pt --data data/imagenet --workers 8

Prints a Markdown table, a row for each tokenizer: the accuracy on the validation images of multinomial logistic
regression, trained on the training images, from the counts (the set itself, C numbers) and from the latents (the mean
over the M latents of the encoder, as many numbers as its width); below it, from the raw pixels, and by chance. The
paper does not say what it probed. We take the latents after the encoder's last norm, where a ViT is usually probed, and
not after the linear map to code_dim: a mean over 12 numbers, 3 for the digits, would give a linear layer too little.
The paper: 43 to 66 %, more with a larger codebook, less with more tokens.
"""
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import open_dataset
from data.loader import batch_indices, check_classes, read_ahead
from dual_transform import tokens_to_counts
from evaluate_fid import evenly
from paper import table6_sweep
from paper.inputs import DATA, DEVICE, SEED, WORKERS, open_tokenizer, read_options
from support.command_line import stop
from support.hardware import init_distributed
from support.training import run

NUM_TRAIN = 20000     # training digits that the probes see; with --ckpt all images of the training set
BATCH = 256           # images in a step of a probe
LR = 1e-2             # learning rate of AdamW at the first step, decays to 0 (cosine)
WEIGHT_DECAY = 0.1    # of AdamW, the same for all probes
AT_ONCE = 100         # images encoded together
PIXELS = 32           # larger images are averaged down to this size for the probe of raw pixels
OPTIONS = [
    ("--ckpt", (), "", "checkpoints of train_tokenizer.py (those of the digits are trained)"),
    *table6_sweep.PAIRS,
    ("--num_train", None, "[1, inf)", f"training images that the probes see ({NUM_TRAIN}, with --ckpt all)"),
    ("--epochs", 40, "[1, inf)", "how often a probe sees them"),
    DATA, WORKERS, SEED, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table3_linear_probe", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)
    rows, pixels = [], None
    try:
        for path in args.ckpt or (table6_sweep.trained_tokenizer(*pair, args) for pair in table6_sweep.pairs(args)):
            tokenizer, train, test, classes = features(path, args, device)
            counts, latents = (probe(x, train.labels, test_x, test.labels, classes, args, device)
                               for x, test_x in ((train.counts, test.counts), (train.latents, test.latents)))
            rows.append((tokenizer.num_tokens, tokenizer.codebook_size, counts, latents))
            if pixels is None:  # the same for all tokenizers
                pixels = probe(train.pixels, train.labels, test.pixels, test.labels, classes, args, device)
    except ValueError as problem:
        stop(str(problem))
    chance = (test.labels == train.labels.mode().values).double().mean().item()
    print("| M | C | counts | latents |\n|---|---|---|---|")
    for M, C, counts, latents in rows:
        print(f"| {M} | {C} | {counts:.1%} | {latents:.1%} |")
    print(f"of {len(test.labels)} validation images, after {args.epochs} epochs of {len(train.labels)} "
          f"training images; {train.pixels.shape[1]} raw pixels: {pixels:.1%}; "
          f"by chance, always the most frequent class: {chance:.1%}")
    print(f"{(time.time() - began) / 60:.1f} min")


def features(path, args, device):
    """(a tokenizer, the Features of the training and of the validation images, the number of classes)."""
    tokenizer, test_set, data = open_tokenizer(path, args.data, device)
    train_set = open_dataset(data, "train", tokenizer.image_size)
    check_classes(train_set, test_set)
    num = args.num_train or (None if args.ckpt else NUM_TRAIN)
    train, test = (read(tokenizer, dataset, evenly(len(dataset), number), device, args.workers)
                   for dataset, number in ((train_set, num), (test_set, None)))
    return tokenizer, train, test, len(test_set.class_names)


class Features(NamedTuple):
    """Of N images, on the CPU. ImageNet's training set takes 18 GB with C = 4096 and width 768, twice that while the
    batches are joined."""
    counts: torch.Tensor   # (N, C) int16
    latents: torch.Tensor  # (N, width) float32
    pixels: torch.Tensor   # (N, ch * side^2) uint8
    labels: torch.Tensor   # (N,) int64


@torch.no_grad()
def read(tokenizer, dataset, chosen, device, workers=0):
    """The Features of the images of a dataset with the indices chosen, (N,)."""
    found = []
    parts = chosen.split(AT_ONCE)
    batches = read_ahead(dataset, ([(i, 0) for i in part.tolist()] for part in parts), workers)
    for images, labels in tqdm(batches, desc="encoding", total=len(parts), mininterval=5):
        x = tokenizer.encoder.features(images.to(device) / 127.5 - 1)  # (n, M, width)
        tokens = tokenizer.quantizer(F.normalize(tokenizer.encoder.project(x).float(), dim=-1))[1]
        counts = tokens_to_counts(tokens, tokenizer.codebook_size).short().cpu()
        pixels = F.adaptive_avg_pool2d(images.float(), min(PIXELS, images.shape[2])).round().to(torch.uint8)
        found.append((counts, x.mean(1).float().cpu(), pixels.flatten(1), labels))
    return Features(*map(torch.cat, zip(*found)))


def probe(train, labels, test, test_labels, classes, args, device):
    """The share of test that a linear classifier classifies correctly after training on train: multinomial logistic
    regression, every feature standardized to mean 0 and deviation 1 over train.

    train, test: (N, D) and (N', D) numbers of any type.  labels, test_labels: (N,) and (N',) in 0..classes - 1.
    args: epochs and seed.
    """
    N, D = train.shape
    batch = min(BATCH, N)
    mean = sum(part.double().sum(0) for part in train.split(BATCH)) / N  # (D,)
    variance = sum((part.double() - mean).square().sum(0) for part in train.split(BATCH)) / N
    scale = (variance + 1e-6).rsqrt()  # as in a batch norm: a constant feature becomes 0
    mean, scale = mean.float().to(device), scale.float().to(device)
    layer = torch.nn.Linear(D, classes, device=device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), LR, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * (N // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        i = batch_indices(N, batch, args.seed, step)
        loss = F.cross_entropy(layer((train[i].to(device) - mean) * scale), labels[i].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = torch.cat([layer((part.to(device) - mean) * scale).argmax(1).cpu() for part in test.split(BATCH)])
    return (found == test_labels).double().mean().item()


if __name__ == "__main__":
    run(main)
