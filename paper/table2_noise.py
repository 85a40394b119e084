"""Table 2 (Sec. 4.2.3): the share of an image's tokens that stay the same when Gaussian noise is added to it.

    python -m paper.table2_noise                           the test digits: trains a grid, a sequence and a set
    python -m paper.table2_noise --ckpt grid.pt sequence.pt set.pt --data data/imagenet

Prints a Markdown table with a row for each tokenizer, and two for a set: as a sequence (the paper's dagger) token m of
the noisy image must be token m of the clean one, as a set the order does not matter. The three of the digits are alike
in M, C, widths and steps, and all learn pixels only; the paper's are TiTok and VQGAN as published. The last column is
the error of the reconstructions. paper/layouts.py trains the sequence and the grid.

The paper does not define its signal-to-noise ratio. Here the signal's power is the mean square of an image's own pixels
in [0, 1], so that black is no signal; the noise's is its variance on the same scale. Noisy images are neither clipped
nor rounded: clipping would take power from the noise, half of it where a digit is black.
"""
import time

import torch
from tqdm import tqdm

import common
from data.reading import read_ahead
from dual_transform import tokens_to_counts
from evaluate_fid import open_tokenizer
from paper import layouts, variants
from paper.table6_sweep import TOKENIZER

LAYOUTS = ("grid", "sequence", "set")             # in the paper VQGAN, TiTok, TokenSet
SIZES = {"num_tokens": 16, "codebook_size": 128}  # of all three: a grid has as many tokens as patches
SNRS = (40, 30, 20, 10, 1)  # dB
WORKERS = 0                 # processes that read images
SEED = 0                    # of the noise
DEVICE = "auto"             # auto, cpu, cuda


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, rank, processes = common.init_distributed(args.device)
    rows = []
    try:
        for path in args.ckpt or [trained(layout, args.device) for layout in LAYOUTS]:
            tokenizer, dataset = load(path, args.data, device)
            num = min(args.num or len(dataset), len(dataset))
            found = measure(tokenizer, dataset, num, args, device, rank, processes)
            rows.append((layouts.layout_of(tokenizer), tokenizer.num_tokens, *found))
    except ValueError as problem:
        common.stop(str(problem))
    if rank == 0:
        print("| tokenizer | tokens | " + " | ".join(f"{snr} dB" for snr in SNRS) + " | mean squared error |\n|"
              + "---|" * (3 + len(SNRS)))
        for layout, M, as_set, as_sequence, mse in rows:
            shown = {"set, as a sequence": as_sequence, "set": as_set} if layout == "set" else {layout: as_sequence}
            for name, shares in shown.items():
                print(f"| {name} | {M} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + f" | {mse:.4f} |")
        print(f"{num} images; {(time.time() - began) / 60:.1f} min")


def trained(layout, device):
    """The path of a tokenizer of the digits with a layout, trained now if it is not there. Table 6 has the same set."""
    if layout == "set":
        return variants.tokenizer(**SIZES, device=device, **TOKENIZER)
    kind = f"{layout} tokenizer"
    return variants.tokenizer(**SIZES, device=device, **TOKENIZER, model_class=layouts.KINDS[kind], kind=kind)


def load(path, data, device):
    """(a checkpoint's tokenizer, without gradients; the validation images, by default those of its training data).

    ValueError where the two do not fit.
    """
    checkpoint = common.load_checkpoint(path, "python train_tokenizer.py (or -m paper.layouts)", *layouts.KINDS)
    tokenizer, dataset = open_tokenizer(path, checkpoint, data or checkpoint.get("config", {}).get("data"), device,
                                        layouts.KINDS[checkpoint["kind"]])
    return tokenizer.requires_grad_(False), dataset


def batches(dataset, num, image_size, device, rank, processes, workers):
    """This process's share of num images spread evenly over the dataset: yields their indices, a list, and the images
    (n, ch, H, W) in [-1, 1]."""
    at_once = min(250, max(1, 2 ** 20 // image_size ** 2))  # a million pixels, to bound memory
    parts = common.chunks(common.shard(num, rank, processes), at_once)
    indices = [[i * len(dataset) // num for i in range(part.start, part.stop)] for part in parts]
    images = read_ahead(dataset, ([(i, 0) for i in some] for some in indices), workers)
    for some, (pixels, _) in zip(indices, tqdm(images, total=len(parts), disable=None)):
        yield some, pixels.to(device) / 127.5 - 1


def measure(tokenizer, dataset, num, args, device, rank, processes):
    """Over num images: the shares of tokens that stay, as a set and as a sequence, (len(SNRS),) each, and the mean
    squared error without noise."""
    common.set_tf32(False)  # TF32 would be noise too
    shares, squared = (torch.zeros(n, dtype=torch.float64, device=device) for n in ((2, len(SNRS)), 1))
    for indices, images in batches(dataset, num, tokenizer.image_size, device, rank, processes, args.workers):
        tokens = tokenizer.encode(images)
        squared += (tokenizer.decode(tokens) - images).square().mean((1, 2, 3)).sum()
        # one draw an image, for all ratios and tokenizers
        noise = torch.stack([torch.randn(images.shape[1:], generator=common.generator("cpu", "noise", args.seed, i))
                             for i in indices]).to(device)
        for i, snr in enumerate(SNRS):
            noisy = tokenizer.encode(add_noise(images, noise, snr))
            shares[:, i] += torch.stack(overlap(tokens, noisy, tokenizer.codebook_size)).sum(1)
    for total in (shares, squared):
        common.all_reduce(total)
    return *(shares / num).tolist(), squared.item() / num


def add_noise(images, noise, snr):
    """Images (B, ch, H, W) in [-1, 1] plus noise of variance 1, scaled to snr dB in each image."""
    power = ((images + 1) / 2).square().mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    std = (power / 10 ** (snr / 10)).sqrt()  # of pixels in [0, 1]; in [-1, 1] it is twice that
    return images + 2 * std * noise


def overlap(tokens, others, codebook_size):
    """The share of tokens (B, M) that are in others (B, M) too, (B,) in [0, 1]: as sets, which share a code that one
    holds a times and the other b times min(a, b) times; and as sequences, token m against token m."""
    counts, theirs = (tokens_to_counts(x, codebook_size) for x in (tokens, others))  # (B, C)
    return torch.minimum(counts, theirs).sum(1) / tokens.shape[1], (tokens == others).double().mean(1)


def parse(argv):
    parser = common.Parser(prog="python -m paper.table2_noise", description=__doc__)
    parser.add_argument("--ckpt", nargs="+", help="tokenizers, checkpoints of train_tokenizer.py or paper.layouts "
                                                  "(the digits' are trained)")
    add_options(parser)
    parser.add_argument("--num", "--num_images", type=int,
                        help="validation images (all); under torchrun write --num_images")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the noise ({SEED})")
    args = parser.parse_args(argv)
    check_options(parser, args, num=1, seed=0)
    return args


def add_options(parser):
    """What Fig. 5 has as well."""
    parser.add_argument("--data", help="digits, or a folder that holds val/ (what each checkpoint was trained on)")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes that read images ({WORKERS})")
    parser.add_argument("--device", default=DEVICE, help=f"auto, cpu or cuda ({DEVICE})")


def check_options(parser, args, **least):
    """End with one sentence where a number is less than its least."""
    for name, value in ({"workers": 0} | least).items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            parser.error(f"--{name} must be at least {value}, got {getattr(args, name)}")


if __name__ == "__main__":
    common.run(main)
