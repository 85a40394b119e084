"""Table 1 and Fig. 4 (Sec. 4.2.1): do reconstructions depend on the order of the tokens?

    python -m paper.table1_order                          tokenizer.pt of the digits, digits FID
    python -m paper.table1_order --ckpt tokenizer.pt --data data/imagenet --workers 8        the paper's own table, rFID

Prints a Markdown table: for each of the five orders the distance of the reconstructed validation images to the images,
and the largest change of a pixel from the encoder's order. Writes figure4.png, the first images and their
reconstructions. The paper: rFID 3.62 in every order.
"""
import time

import torch
from tqdm import tqdm

import evaluate_fid
import generation
from data.loader import read_ahead
from paper.inputs import DATA, DEVICE, INCEPTION, NUM, SEED, WORKERS, open_tokenizer, read_options
from paper.reconstruct import COLUMNS, five_orders
from published.classifier import Classifier
from support.command_line import stop
from support.distributed import all_gather, all_reduce
from support.hardware import init_distributed
from support.pictures import grid, save
from support.seeds import generator
from support.training import run

SHOWN = 10  # images in the picture
OPTIONS = [
    ("--ckpt", "tokenizer.pt", "", "checkpoint of train_tokenizer.py or import_released_weights"),
    (NUM, None, "[2, inf)", "validation images (all)"),
    ("--out", "figure4.png", "", "the picture of Fig. 4"),
    ("--classifier", "", "", "file of the classifier of digits or emoji (in the checkpoint's folder)"),
    DATA, INCEPTION, WORKERS, SEED, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table1_order", __doc__, argv)
    began = time.time()
    device, rank, world_size = init_distributed(args.device, tf32=False)  # its rounding would hide that of the orders
    try:
        tokenizer, dataset, data = open_tokenizer(args.ckpt, args.data, device)
        net = evaluate_fid.network(args, data, device, rank)
        statistics, changes = measure(tokenizer, dataset, net, args, device, rank, world_size)
        if rank > 0:
            return
        images, *orders = (one.mean_and_covariance() for one in statistics)
        fids = [evaluate_fid.frechet_distance(*order, *images) for order in orders]
    except ValueError as problem:
        stop(str(problem))
    fid = f"{net.data} FID" if isinstance(net, Classifier) else "rFID"
    print("| order | " + " | ".join(COLUMNS[1:]) + " |\n|" + "---|" * 6)
    print(f"| {fid} | " + " | ".join(f"{value:.4f}" for value in fids) + " |")
    print("| largest change of a pixel, of 255 | " + " | ".join(map(str, changes)) + " |")
    print(f"{args.out}: the first images; {(time.time() - began) / 60:.1f} min")


def measure(tokenizer, dataset, net, args, device, rank, world_size):
    """Pass the images through the tokenizer and net once, divided among the ranks, and draw the first ones.

    Returns Statistics of the features of the images and of their reconstructions in the five orders, and the largest
    change of a pixel in each order, five numbers in 0..255.
    """
    shuffle = torch.randperm(tokenizer.num_tokens, generator=generator("cpu", "order", args.seed)).to(device)
    parts = evaluate_fid.evenly(len(dataset), args.num).split(evaluate_fid.NETWORK_BATCH)[rank::world_size]
    batches = read_ahead(dataset, ([(i, 0) for i in part.tolist()] for part in parts), args.workers)
    statistics = [evaluate_fid.Statistics(net.dims, device) for _ in COLUMNS]
    changes = torch.zeros(len(COLUMNS) - 1, dtype=torch.int64)
    for i, (images, _) in enumerate(tqdm(batches, total=len(parts), disable=rank > 0, mininterval=5)):
        tokens = tokenizer.encode(images.to(device) / 127.5 - 1)
        decoded = [generation.decode(tokenizer, order) for order in five_orders(tokens, shuffle)]  # (n, ch, H, W) uint8
        for one, pixels in zip(statistics, [images, *decoded]):
            one.add(net(pixels.to(device))[0])
        changes = changes.maximum(torch.stack([(other.long() - decoded[0].long()).abs().max() for other in decoded]))
        if i == rank == 0:
            rows = torch.stack([images, *decoded], 1)[:SHOWN]  # (SHOWN, 6, ch, H, W)
            save(grid(rows.flatten(0, 1), len(COLUMNS), column_labels=COLUMNS), args.out)
    for one in statistics:
        for tensor in one.sums():
            all_reduce(tensor)
    return statistics, torch.stack(all_gather(changes)).amax(0).tolist()


if __name__ == "__main__":
    run(main)
