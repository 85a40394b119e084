"""Table 1 and Fig. 4 (Sec. 4.2.1): does the order of the tokens change what is decoded from them?

    python -m paper.table1_order                          tokenizer.pt of the digits, digits FID
    python -m paper.table1_order --ckpt tokenizer.pt --data data/imagenet       the paper's own table, rFID

Prints a Markdown table: for each of the five orders the distance of the reconstructed validation images to the images, and the
largest change of a pixel against the order that the encoder gives. paper/reconstruct.py draws Fig. 4, here as figure4.png.
The paper: rFID 3.62 in every order.
"""
import argparse
import time

import torch

import common
from evaluate_fid import frechet_distance, measure, network, reconstructed
from paper import reconstruct

CKPT = "tokenizer.pt"
OUT = "figure4.png"
BATCH = 250      # images at once
SEED = 0         # of the shuffled order
DEVICE = "auto"  # auto, cpu, cuda


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, _, _ = common.start_processes(args.device)
    checkpoint = common.load_checkpoint(args.ckpt, "python train_tokenizer.py", "tokenizer")
    data = args.data or checkpoint.get("config", {}).get("data")
    M = checkpoint["model_config"]["num_tokens"]
    shuffle = torch.randperm(M, generator=common.generator("cpu", "order", args.seed)).to(device)
    rows, largest, first = [], [], None
    try:
        net = digits_classifier(args, device, 0) if data == "digits" and not args.inception else inception(args, device, 0)
        for i, name in enumerate(reconstruct.COLUMNS[1:]):
            images, originals = reconstructed(checkpoint, args, data, device,
                                              lambda tokens: reconstruct.five_orders(tokens, shuffle)[i])  # noqa: B023
            if i == 0:
                against, first = measure(net, originals, args.batch, False, device), images
            found = measure(net, images, args.batch, False, device)
            rows.append(frechet_distance(found.mu, found.sigma, against.mu, against.sigma))
            largest.append(largest_change(first, images, args.batch))
    except ValueError as problem:
        common.stop(str(problem))
    fid = "digits FID" if data == "digits" and not args.inception else "rFID"
    print("| order | " + " | ".join(reconstruct.COLUMNS[1:]) + " |\n|" + "---|" * 6)
    print(f"| {fid} | " + " | ".join(f"{value:.4f}" for value in rows) + " |")
    print("| largest change of a pixel, of 255 | " + " | ".join(map(str, largest)) + " |")
    places = ["digits"] if data == "digits" else [f"{data}/val"]
    reconstruct.main([*places, f"--ckpt={args.ckpt}", f"--out={args.out}", f"--seed={args.seed}", f"--device={args.device}"])
    print(f"{common.duration(time.time() - began)}")


def largest_change(images, others, batch):
    """The largest difference of a pixel between two sides of the same images, 0..255."""
    parts = common.chunks(slice(0, images.num), batch)
    return max(int((images.read(part).int() - others.read(part).int()).abs().max()) for part in parts)


def parse(argv):
    parser = common.Parser(prog="python -m paper.table1_order", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=CKPT, help=f"checkpoint of train_tokenizer.py or import_released_weights ({CKPT})")
    parser.add_argument("--data", help="digits, or a folder that holds val/ (what the checkpoint was trained on)")
    parser.add_argument("--num", type=int, help="validation images (all)")
    parser.add_argument("--inception", help="file of Inception's weights (downloaded to torch's cache)")
    parser.add_argument("--out", default=OUT, help=f"the picture of Fig. 4, .png ({OUT})")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images at once ({BATCH})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the shuffled order ({SEED})")
    parser.add_argument("--device", default=DEVICE, help=f"auto, cpu or cuda ({DEVICE})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
