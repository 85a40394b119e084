"""Table 3 (Sec. 4.2.4): linear probing. How well does one linear layer read the class of an image off its set?

    python -m paper.table3_linear_probe                   the tokenizers of Table 6 on the digits, trained if not there
    python -m paper.table3_linear_probe --ckpt a/tokenizer.pt b/tokenizer.pt --data data/imagenet --workers 8

Prints a Markdown table, a row for each tokenizer: which share of the validation images multinomial logistic regression,
trained on the training images, reads right off the counts (the set itself, C numbers) and off the latents (the mean
over the M latents of the encoder, as many numbers as it is wide); below it, off the raw pixels, and by chance. The
paper does not say what it probed. We take the latents as the encoder's last norm leaves them, which is where a ViT is
probed, and not behind the linear map to code_dim: a mean over 12 numbers, of the digits 3, would leave a linear layer
too few. The paper: 43 to 66 %, more with a larger codebook, less with more tokens.
"""
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from data import open_dataset
from data.reading import batch_indices, check_classes, read_ahead, without_unreadable
from dual_transform import tokens_to_counts
from evaluate_fid import evenly, open_tokenizer
from paper import table6_sweep, variants

NUM_TRAIN = 20000     # training digits that the probes see; with --ckpt all images of the training set
EPOCHS = 40           # times that a probe sees them
BATCH = 256           # images a step of a probe
LR = 1e-2             # learning rate of AdamW at the first step, falling to 0 (cosine)
WEIGHT_DECAY = 0.1    # of AdamW, the same for all probes
AT_ONCE = 100         # images encoded together
PIXELS = 32           # larger images are averaged down to so many pixels a side for the probe of raw pixels
WORKERS = 0           # processes that read images
SEED = 0              # of the order in which a probe sees the images
DEVICE = "auto"       # auto, cpu, cuda


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, _, processes = common.init_distributed(args.device, tf32=False)
    if processes > 1:
        common.stop("the probes are trained by one process; leave out torchrun")
    rows, pixels = [], None
    try:
        for path in args.ckpt or trained(args):
            tokenizer, train, test, classes = features(path, args, device)
            counts, latents = (probe(getattr(train, kind), train.labels, getattr(test, kind), test.labels, classes,
                                     args, device)
                               for kind in ("counts", "latents"))
            rows.append((tokenizer.num_tokens, tokenizer.codebook_size, counts, latents))
            if pixels is None:  # the same for all tokenizers
                pixels = probe(train.pixels, train.labels, test.pixels, test.labels, classes, args, device)
    except ValueError as problem:
        common.stop(str(problem))
    chance = (test.labels == train.labels.mode().values).double().mean().item()
    print("| M | C | counts | latents |\n|---|---|---|---|")
    for M, C, counts, latents in rows:
        print(f"| {M} | {C} | {counts:.1%} | {latents:.1%} |")
    print(f"of {len(test.labels)} validation images, after {args.epochs} epochs of {len(train.labels)} "
          f"training images; {train.pixels.shape[1]} raw pixels: {pixels:.1%}; "
          f"by chance, always the most frequent class: {chance:.1%}")
    print(f"{(time.time() - began) / 60:.1f} min")


def trained(args):
    """The paths of the tokenizers of Table 6 on the digits, trained as they are asked for."""
    for M, C in table6_sweep.pairs(args.num_tokens, args.codebook_sizes):
        yield variants.tokenizer(num_tokens=M, codebook_size=C, device=args.device, **table6_sweep.TOKENIZER)


def features(path, args, device):
    """(a tokenizer, what read() gives of the training and of the validation images, the number of classes)."""
    checkpoint = common.load_checkpoint(path, "python train_tokenizer.py", "tokenizer")
    data = args.data or checkpoint.get("config", {}).get("data")
    tokenizer, test_set = open_tokenizer(path, checkpoint, data, device)
    train_set = without_unreadable(open_dataset(data, "train", tokenizer.image_size))
    check_classes(train_set, test_set)
    num = args.num_train or (None if args.ckpt else NUM_TRAIN)
    train, test = (read(tokenizer, dataset, evenly(len(dataset), number), device, args.workers)
                   for dataset, number in ((train_set, num), (test_set, None)))
    return tokenizer, train, test, len(test_set.class_names)


@torch.no_grad()
def read(tokenizer, dataset, chosen, device, workers=0):
    """Of the images chosen, indices (N,): counts (N, C) int16, latents (N, width) float32, pixels (N, ch * side^2)
    uint8 and labels (N,), on the CPU. ImageNet's training set takes 18 GB with C = 4096 and width 768, twice that while
    it is joined."""
    found = []
    parts = chosen.split(AT_ONCE)
    batches = read_ahead(dataset, ([(i, 0) for i in part.tolist()] for part in parts), workers)
    for images, labels in tqdm(batches, desc="encoding", total=len(parts), mininterval=5):
        x = tokenizer.encoder.features(images.to(device) / 127.5 - 1)  # (n, M, width)
        tokens = tokenizer.quantizer(F.normalize(tokenizer.encoder.project(x).float(), dim=-1))[1]
        small = F.adaptive_avg_pool2d(images.float(), min(PIXELS, images.shape[2])).round().to(torch.uint8)
        found.append((tokens_to_counts(tokens, tokenizer.codebook_size).short().cpu(), x.mean(1).float().cpu(),
                      small.flatten(1),
                      labels))
    return SimpleNamespace(**dict(zip(("counts", "latents", "pixels", "labels"), map(torch.cat, zip(*found)))))


def probe(train, labels, test, test_labels, classes, args, device):
    """The share of test that a linear classifier reads as its labels after training on train: multinomial logistic
    regression, every feature at mean 0 and deviation 1 over train.

    train, test: (N, D) and (N', D) numbers of any type.  labels, test_labels: (N,) and (N',) in 0..classes - 1.
    args: epochs and seed.
    """
    N, D = train.shape
    batch = min(BATCH, N)
    mean = sum(part.double().sum(0) for part in train.split(BATCH)) / N  # (D,)
    variance = sum((part.double() - mean).square().sum(0) for part in train.split(BATCH)) / N
    scale = (variance + 1e-6).rsqrt()  # as in a batch norm: a feature that never changes is left at 0
    mean, scale = mean.float().to(device), scale.float().to(device)
    layer = torch.nn.Linear(D, classes, device=device)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
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
        read = torch.cat([layer((part.to(device) - mean) * scale).argmax(1).cpu() for part in test.split(BATCH)])
    return (read == test_labels).double().mean().item()


def parse(argv):
    parser = common.Parser(prog="python -m paper.table3_linear_probe", description=__doc__)
    parser.add_argument("--ckpt", nargs="+", help="checkpoints of train_tokenizer.py (the digits' are trained)")
    parser.add_argument("--data",
                        help="digits, or a folder that holds train/ and val/ (what the checkpoint was trained on)")
    table6_sweep.add_pairs(parser)
    parser.add_argument("--num_train", type=int,
                        help=f"training images that the probes see ({NUM_TRAIN}, with --ckpt all)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"times that a probe sees them ({EPOCHS})")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes that read images ({WORKERS})")
    parser.add_argument("--seed", type=int, default=SEED,
                        help=f"of the order in which a probe sees the images ({SEED})")
    parser.add_argument("--device", default=DEVICE, help=f"auto, cpu or cuda ({DEVICE})")
    args = parser.parse_args(argv)
    for name, least in (("num_train", 1), ("epochs", 1), ("workers", 0), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    common.run(main)
