"""Table 1 (Sec. 4.2.1): do reconstructions depend on the order of the tokens?

    python -m paper.table1_order                          tokenizer.pt of the digits, digits FID
    python -m paper.table1_order --ckpt tokenizer.pt --data data/imagenet --workers 8        the paper's own table, rFID

Prints a Markdown table: for each of the five orders of paper/reconstruct.py (Fig. 4) the distance of the reconstructed
validation images to the images, and the largest change of a pixel from the encoder's order. The paper: rFID 3.62 in
every order.
"""
import time

import torch

import evaluate_fid
import sample
from paper.inputs import DATA, DEVICE, INCEPTION, SEED, WORKERS, open_tokenizer, read_batches, read_options
from paper.reconstruct import COLUMNS, five_orders
from published.inception import InceptionV3
from support.command_line import stop
from support.hardware import init_distributed
from support.seeds import generator
from support.training import run

OPTIONS = [
    ("--ckpt", "tokenizer.pt", "", "checkpoint of train_tokenizer.py or import_released_weights"),
    ("--num", None, "[2, inf)", "validation images (all)"),
    ("--classifier", "", "", "file of the classifier of digits or emoji (in the checkpoint's folder)"),
    DATA, INCEPTION, WORKERS, SEED, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table1_order", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)  # its rounding would hide that of the orders
    tokenizer, dataset, data = open_tokenizer(args.ckpt, args.data, device)
    try:
        net = evaluate_fid.network(args, data, device, rank=0)
        (images, *orders), changes = measure(tokenizer, dataset, net, args, device)
        fids = [evaluate_fid.frechet_distance(*order, *images) for order in orders]
    except ValueError as problem:
        stop(str(problem))
    fid = "rFID" if isinstance(net, InceptionV3) else f"{data} FID"
    print("| order | " + " | ".join(COLUMNS[1:]) + " |\n|" + "---|" * 6)
    print(f"| {fid} | " + " | ".join(f"{value:.4f}" for value in fids) + " |")
    print("| largest change of a pixel, of 255 | " + " | ".join(map(str, changes)) + " |")
    print(f"{(time.time() - began) / 60:.1f} min")


@torch.no_grad()
def measure(tokenizer, dataset, net, args, device):
    """Pass the images through the tokenizer and net once. Returns mean and covariance of the features of the images and
    of their reconstructions in the five orders, and the largest change of a pixel in each order, five numbers in
    0..255."""
    shuffle = torch.randperm(tokenizer.num_tokens, generator=generator("cpu", "order", args.seed)).to(device)
    statistics = [evaluate_fid.Statistics(net.dims, device) for _ in COLUMNS]
    changes = torch.zeros(len(COLUMNS) - 1, dtype=torch.int64)
    num = min(args.num or len(dataset), len(dataset))
    for _, images in read_batches(dataset, num, tokenizer.image_size, device, args.workers):
        tokens = tokenizer.encode(images / 127.5 - 1)
        decoded = [sample.decode(tokenizer, order) for order in five_orders(tokens, shuffle)]  # (n, ch, H, W) uint8
        for one, pixels in zip(statistics, [images, *decoded]):
            one.add(net(pixels.to(device))[0])
        changes = changes.maximum(torch.stack([(other.long() - decoded[0].long()).abs().max() for other in decoded]))
    return [one.mean_and_covariance() for one in statistics], changes.tolist()


if __name__ == "__main__":
    run(main)
