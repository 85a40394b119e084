"""Fig. 6 (Sec. 4.2.4): images whose sets contain k or more of one code look alike. How pure are such clusters?

    python -m paper.fig6_clusters                             the test digits, tokenizer.pt
    python -m paper.fig6_clusters --ckpt tokenizer.pt --data data/imagenet

For every code, the images that contain it k or more times are a cluster; its purity is the share of its most frequent
class. Prints the purest clusters as a Markdown table, the mean over all clusters, and chance: clusters of the same
sizes of images drawn at random. Writes figure6.png, a row of images for each of the purest clusters.
"""
import torch
import torch.nn.functional as F

from dual_transform import tokens_to_counts
from paper.inputs import DATA, DEVICE, SEED, WORKERS, open_tokenizer, read_batches, read_options
from support.command_line import stop
from support.hardware import init_distributed
from support.pictures import grid, save
from support.seeds import generator
from support.training import run

OPTIONS = [
    ("--ckpt", "tokenizer.pt", "", "checkpoint of train_tokenizer.py or import_released_weights"),
    ("--k", 2, "[1, inf)", "times that an image must contain the code"),
    ("--least", 20, "[1, inf)", "images that make a cluster"),
    ("--shown", 10, "[1, inf)", "clusters in the table and the picture"),
    ("--out", "figure6.png", "", "the picture"),
    DATA, WORKERS, SEED, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "fig6_clusters", __doc__, argv)
    device, *_ = init_distributed(args.device)
    tokenizer, dataset, _ = open_tokenizer(args.ckpt, args.data, device)
    N, C = len(dataset), tokenizer.codebook_size
    counts = torch.cat([tokens_to_counts(tokenizer.encode(images / 127.5 - 1), C).cpu() for _, images
                        in read_batches(dataset, N, tokenizer.image_size, device, args.workers)])  # (N, C)
    contains = counts >= args.k
    sizes = contains.sum(0)  # (C,)
    codes = (sizes >= args.least).nonzero()[:, 0]
    if not len(codes):
        stop(f"no code is in {args.least} images {args.k} times or more; try a smaller --k or --least")
    purities, classes = purity(contains[:, codes], dataset.labels)
    order = torch.rand(N, len(codes), generator=generator("cpu", "figure 6", args.seed)).argsort(0)
    chance, _ = purity(order < sizes[codes], dataset.labels)  # clusters of the same sizes, drawn at random

    best = purities.argsort(descending=True, stable=True)[:args.shown]
    print("| code | images | most frequent class | purity | chance |\n|---|---|---|---|---|")
    for i in best.tolist():
        print(f"| {codes[i]} | {sizes[codes[i]]} | {dataset.class_names[classes[i]]} | {purities[i]:.1%} "
              f"| {chance[i]:.1%} |")
    print(f"mean purity of the {len(codes)} clusters (codes that {args.least} or more of {N} images contain "
          f"{args.k} times or more): {purities.mean():.1%}, by chance {chance.mean():.1%}")
    members = [contains[:, codes[i]].nonzero()[:10, 0].tolist() for i in best]
    columns = max(map(len, members))
    rows = [F.pad(dataset.__getitems__([(i, 0) for i in row])[0], (0,) * 7 + (columns - len(row),), value=255)
            for row in members]  # filled with white images
    save(grid(torch.cat(rows), columns, [f"code {codes[i]}" for i in best]), args.out)
    print(f"{args.out}: the first images of each")


def purity(contains, labels):
    """contains: (N, n) bool, which images are in each of n clusters.  labels: (N,) int64.

    Returns the share of the most frequent class in each, (n,) float64, and that class, (n,).
    """
    in_class = F.one_hot(labels).double().T @ contains.double()  # (classes, n)
    largest, classes = in_class.max(0)
    return largest / contains.sum(0), classes


if __name__ == "__main__":
    run(main)
