"""Table 2 (Sec. 4.2.3): the share of an image's tokens that stay the same when Gaussian noise is added to it.

    python -m paper.table2_noise                           the digits: trains a grid, a sequence and a set
    python -m paper.table2_noise --ckpt grid.pt sequence.pt set.pt --data data/imagenet

Prints a Markdown table with a row for each tokenizer, and two for a set: as a sequence (the paper's dagger) token m of
the noisy image must be token m of the clean one; as a set the order does not matter. The three of the digits have the
same M, C, widths and steps, and all learn only pixels; the paper's are TiTok and VQGAN as published. The last column is
the error of the reconstructions. paper/layouts.py trains the sequence and the grid.

The paper does not define its signal-to-noise ratio. Here the signal's power is the mean square of an image's own pixels
in [0, 1], so that black is no signal; the noise's power is its variance on the same scale. Noisy images are neither
clipped nor rounded: clipping would reduce the power of the noise, by half where a digit is black.
"""
import time

import torch

from dual_transform import tokens_to_counts
from paper import variants
from paper.inputs import DATA, DEVICE, SEED, WORKERS, open_tokenizer, read_batches, read_options
from paper.layouts import KINDS, layout_of
from paper.table6_sweep import TOKENIZER
from support.hardware import init_distributed
from support.seeds import generator
from support.training import run

LAYOUTS = ("grid", "sequence", "set")             # in the paper VQGAN, TiTok, TokenSet
SIZES = {"num_tokens": 16, "codebook_size": 128}  # of all three: a grid has as many tokens as patches
SNRS = (40, 30, 20, 10, 1)  # dB
OPTIONS = [
    ("--ckpt", (), "", "checkpoints of train_tokenizer.py or paper.layouts (those of the digits are trained)"),
    ("--num", None, "[1, inf)", "validation images (all)"),
    DATA, WORKERS, SEED, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table2_noise", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)  # TF32 would be noise too
    rows = []
    for path in args.ckpt or [trained(layout, args.device) for layout in LAYOUTS]:
        tokenizer, dataset, _ = open_tokenizer(path, args.data, device, KINDS)
        num = min(args.num or len(dataset), len(dataset))
        rows.append((layout_of(tokenizer), tokenizer.num_tokens, *measure(tokenizer, dataset, num, args, device)))
    print("| tokenizer | tokens | " + " | ".join(f"{snr} dB" for snr in SNRS) + " | mean squared error |\n|"
          + "---|" * (3 + len(SNRS)))
    for layout, M, as_set, as_sequence, mse in rows:
        shown = {"set, as a sequence": as_sequence, "set": as_set} if layout == "set" else {layout: as_sequence}
        for name, shares in shown.items():
            print(f"| {name} | {M} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + f" | {mse:.4f} |")
    print(f"{num} images; {(time.time() - began) / 60:.1f} min")


def trained(layout, device):
    """The path of a tokenizer of the digits with a layout, trained unless it exists. Table 6 has the same set."""
    if layout == "set":
        return variants.tokenizer(**SIZES, device=device, **TOKENIZER)
    kind = f"{layout} tokenizer"
    return variants.tokenizer(**SIZES, device=device, **TOKENIZER, model_class=KINDS[kind], kind=kind)


def measure(tokenizer, dataset, num, args, device):
    """Over num images: the shares of tokens that stay, as a set and as a sequence, (len(SNRS),) each, and the mean
    squared error without noise."""
    shares, squared = (torch.zeros(n, dtype=torch.float64, device=device) for n in ((2, len(SNRS)), 1))
    for indices, images in read_batches(dataset, num, tokenizer.image_size, device, args.workers):
        images = images / 127.5 - 1
        tokens = tokenizer.encode(images)
        squared += (tokenizer.decode(tokens) - images).square().mean((1, 2, 3)).sum()
        # one draw for each image, for all ratios and tokenizers
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator("cpu", "noise", args.seed, i))
                             for i in indices]).to(device)
        for i, snr in enumerate(SNRS):
            noisy = tokenizer.encode(add_noise(images, noise, snr))
            shares[:, i] += torch.stack(overlap(tokens, noisy, tokenizer.codebook_size)).sum(1)
    return *(shares / num).tolist(), squared.item() / num


def add_noise(images, noise, snr):
    """Images (B, ch, H, W) in [-1, 1] plus noise of variance 1, scaled to snr dB in each image."""
    power = ((images + 1) / 2).square().mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    std = (power / 10 ** (snr / 10)).sqrt()  # of pixels in [0, 1]; in [-1, 1] it is twice that
    return images + 2 * std * noise


def overlap(tokens, others, codebook_size):
    """The share of tokens (B, M) that are in others (B, M) too, (B,) in [0, 1]: as sets, where a code that occurs a
    times in one and b times in the other counts min(a, b) times; and as sequences, token m against token m."""
    counts, other_counts = (tokens_to_counts(x, codebook_size) for x in (tokens, others))  # (B, C)
    as_set = torch.minimum(counts, other_counts).sum(1) / tokens.shape[1]
    return as_set, (tokens == others).double().mean(1)


if __name__ == "__main__":
    run(main)
