"""Table 1 and Fig. 4 (Sec. 4.2.1): does the order of the tokens change what is decoded from them?

    python -m paper.table1_order                          tokenizer.pt of the digits, digits FID
    python -m paper.table1_order --ckpt tokenizer.pt --data data/imagenet --workers 8        the paper's own table, rFID

Prints a Markdown table: for each of the five orders the distance of the reconstructed validation images to the images,
and the largest change of a pixel against the order that the encoder gives. Writes figure4.png, the first images and
what is decoded. The paper: rFID 3.62 in every order.
"""
import time

import torch
from tqdm import tqdm

import common
import evaluate_fid
import sample
from data import pictures
from data.digits_classifier import DigitsClassifier
from data.reading import read_ahead
from paper import reconstruct, variants

CKPT = "tokenizer.pt"
OUT = "figure4.png"
SHOWN = 10       # images in the picture
WORKERS = 0      # processes that read images
SEED = 0         # of the shuffled order
DEVICE = "auto"  # auto, cpu, cuda


def main(argv=None):
    args = parse(argv)
    began = time.time()
    # TF32 would blur what the orders differ by
    device, rank, processes = common.init_distributed(args.device, tf32=False)
    checkpoint = common.load_checkpoint(args.ckpt, "python train_tokenizer.py", "tokenizer")
    data = args.data or checkpoint.get("config", {}).get("data")
    try:
        tokenizer, dataset = evaluate_fid.open_tokenizer(args.ckpt, checkpoint, data, device)
        net = evaluate_fid.network(args, data, device, rank)
        statistics = [evaluate_fid.Statistics(net.dims, device) for _ in reconstruct.COLUMNS]
        changes = measure(tokenizer, dataset, net, statistics, args, device, rank, processes)
        if rank == 0:
            against, *found = (one.mean_and_covariance() for one in statistics)
            fids = [evaluate_fid.frechet_distance(*order, *against) for order in found]
    except ValueError as problem:
        common.stop(str(problem))
    if rank == 0:
        fid = "digits FID" if isinstance(net, DigitsClassifier) else "rFID"
        print("| order | " + " | ".join(reconstruct.COLUMNS[1:]) + " |\n|" + "---|" * 6)
        print(f"| {fid} | " + " | ".join(f"{value:.4f}" for value in fids) + " |")
        print("| largest change of a pixel, of 255 | " + " | ".join(map(str, changes)) + " |")
        print(f"{args.out}: the first images; {(time.time() - began) / 60:.1f} min")


def measure(tokenizer, dataset, net, statistics, args, device, rank, processes):
    """See the images once, dealt out to the processes: add the features of the images and of the five orders to
    statistics, draw the first images, and return the largest change of a pixel in each order, five numbers in
    0..255."""
    shuffle = torch.randperm(tokenizer.num_tokens, generator=common.generator("cpu", "order", args.seed)).to(device)
    parts = evaluate_fid.evenly(len(dataset), args.num).split(evaluate_fid.NETWORK_BATCH)[rank::processes]
    batches = read_ahead(dataset, ([(i, 0) for i in part.tolist()] for part in parts), args.workers)
    changes = torch.zeros(len(reconstruct.COLUMNS) - 1, dtype=torch.int64)
    for i, (images, _) in enumerate(tqdm(batches, total=len(parts), disable=rank > 0, mininterval=5)):
        tokens = tokenizer.encode(images.to(device) / 127.5 - 1)
        orders = reconstruct.five_orders(tokens, shuffle)
        decoded = [sample.decode(tokenizer, order) for order in orders]  # each (n, ch, H, W) uint8
        for one, seen in zip(statistics, [images, *decoded]):
            one.add(net(seen.to(device))[0])
        changes = changes.maximum(torch.stack([(other.long() - decoded[0].long()).abs().max() for other in decoded]))
        if i == rank == 0:
            rows = torch.stack([images, *decoded], 1)[:SHOWN]  # (SHOWN, 6, ch, H, W)
            page = pictures.grid(rows.flatten(0, 1), len(reconstruct.COLUMNS), column_labels=reconstruct.COLUMNS)
            pictures.save(page, args.out)
    for one in statistics:
        for tensor in one.sums():
            common.all_reduce(tensor)
    return torch.stack(common.all_gather(changes)).amax(0).tolist()


def parse(argv):
    parser = common.Parser(prog="python -m paper.table1_order", description=__doc__)
    parser.add_argument("--ckpt", default=CKPT,
                        help=f"checkpoint of train_tokenizer.py or import_released_weights ({CKPT})")
    parser.add_argument("--data", help="digits, or a folder that holds val/ (what the checkpoint was trained on)")
    parser.add_argument("--num", "--num_images", type=int,
                        help="validation images (all); under torchrun write --num_images")
    parser.add_argument("--inception", help="file of Inception's weights (downloaded to torch's cache)")
    parser.add_argument("--out", default=OUT, help=f"the picture of Fig. 4, .png ({OUT})")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes that read images ({WORKERS})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the shuffled order ({SEED})")
    parser.add_argument("--device", default=DEVICE, help=f"auto, cpu or cuda ({DEVICE})")
    parser.set_defaults(classifier=variants.CLASSIFIER)
    args = parser.parse_args(argv)
    for name, least in (("num", 2), ("workers", 0), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    pictures.check_picture(parser, args.out)
    return args


if __name__ == "__main__":
    common.run(main)
