"""Fig. 6 (Sec. 4.2.4): images whose sets hold k or more of one code look alike. How pure are such clusters?

    python -m paper.fig6_clusters                             the test digits, tokenizer.pt
    python -m paper.fig6_clusters --ckpt tokenizer.pt --data data/imagenet

Of every code, the images that hold it k or more times are a cluster; its purity is the share of its most frequent
class. Prints the purest clusters as a Markdown table, the mean over all clusters, and chance: the same sizes, filled
with images drawn at random. Writes figure6.png, a row of images for each of the purest codes.
"""
import time

import torch

import common
from data import pictures
from data.reading import in_order
from dual_transform import tokens_to_counts
from evaluate_fid import open_tokenizer

CKPT = "tokenizer.pt"
OUT = "figure6.png"
K = 2            # times that an image must hold the code
LEAST = 20       # images that make a cluster
SHOWN = 10       # purest codes in the table and the picture
WORKERS = 0      # processes that read images
SEED = 0         # of the images drawn at random
DEVICE = "auto"  # auto, cpu, cuda


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, _, processes = common.init_distributed(args.device)
    if processes > 1:
        common.stop("one process is enough for this; leave out torchrun")
    checkpoint = common.load_checkpoint(args.ckpt, "python train_tokenizer.py", "tokenizer")
    try:
        data = args.data or checkpoint.get("config", {}).get("data")
        tokenizer, dataset = open_tokenizer(args.ckpt, checkpoint, data, device)
    except ValueError as problem:
        common.stop(str(problem))
    counts, labels = count_codes(tokenizer, dataset, device, args.workers)  # (N, C), (N,)
    holds = counts >= args.k
    sizes = holds.sum(0)  # (C,)
    codes = (sizes >= args.least).nonzero()[:, 0]
    if not len(codes):
        common.stop(f"no code is in {args.least} images {args.k} times or more; try a smaller --k or --least")
    purities, classes = purity(holds[:, codes], labels)
    order = torch.rand(holds[:, codes].shape, generator=common.generator("cpu", "figure 6", args.seed)).argsort(0)
    chance, _ = purity(order < sizes[codes], labels)  # clusters of the same sizes, drawn at random

    best = purities.argsort(descending=True, stable=True)[:args.shown]
    print("| code | images | most frequent class | purity | chance |\n|---|---|---|---|---|")
    for i in best.tolist():
        print(f"| {codes[i]} | {sizes[codes[i]]} | {dataset.class_names[classes[i]]} | {purities[i]:.1%} "
              f"| {chance[i]:.1%} |")
    print(f"mean purity of the {len(codes)} clusters (codes that {args.least} or more of {len(dataset)} images hold "
          f"{args.k} times or more): {purities.mean():.1%}, by chance {chance.mean():.1%}")
    members = [holds[:, codes[i]].nonzero()[:10, 0].tolist() for i in best]
    columns = max(map(len, members))
    rows = [torch.nn.functional.pad(dataset.__getitems__([(i, 0) for i in row])[0], (0,) * 7 + (columns - len(row),),
                                    value=255)
            for row in members]
    pictures.save(pictures.grid(torch.cat(rows), columns, [f"code {codes[i]}" for i in best]), args.out)
    print(f"{args.out}: the first images of each; {(time.time() - began) / 60:.1f} min")


def count_codes(tokenizer, dataset, device, workers=0):
    """(the counts of every image's tokens (N, C), its label (N,))."""
    at_once = min(250, max(1, 2 ** 20 // tokenizer.image_size ** 2))  # a million pixels, for the memory's sake
    parts = common.chunks(slice(0, len(dataset)), at_once)
    found = [(tokens_to_counts(tokenizer.encode(images.to(device) / 127.5 - 1), tokenizer.codebook_size).cpu(), labels)
             for images, labels in in_order(dataset, parts, workers)]
    counts, labels = zip(*found)
    return torch.cat(counts), torch.cat(labels)


def purity(holds, labels):
    """holds: (N, n) bool, which images are in each of n clusters.  labels: (N,) int64.

    Returns the share of the most frequent class in each, (n,) float64, and that class, (n,).
    """
    in_class = torch.nn.functional.one_hot(labels).double().T @ holds.double()  # (classes, n)
    largest, classes = in_class.max(0)
    return largest / holds.sum(0), classes


def parse(argv):
    parser = common.Parser(prog="python -m paper.fig6_clusters", description=__doc__)
    parser.add_argument("--ckpt", default=CKPT,
                        help=f"checkpoint of train_tokenizer.py or import_released_weights ({CKPT})")
    parser.add_argument("--data", help="digits, or a folder that holds val/ (what the checkpoint was trained on)")
    parser.add_argument("--k", type=int, default=K, help=f"times that an image must hold the code ({K})")
    parser.add_argument("--least", type=int, default=LEAST, help=f"images that make a cluster ({LEAST})")
    parser.add_argument("--shown", type=int, default=SHOWN, help=f"codes in the table and the picture ({SHOWN})")
    parser.add_argument("--out", default=OUT, help=f"the picture, .png ({OUT})")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes that read images ({WORKERS})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the images drawn at random ({SEED})")
    parser.add_argument("--device", default=DEVICE, help=f"auto, cpu or cuda ({DEVICE})")
    args = parser.parse_args(argv)
    for name, least in (("k", 1), ("least", 1), ("shown", 1), ("workers", 0), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    pictures.check_picture(parser, args.out)
    return args


if __name__ == "__main__":
    common.run(main)
