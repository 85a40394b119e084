"""Fig. 5 (Sec. 4.2.2): the pixels that a single token depends on, in a grid, whose tokens have positions, and in a set.

    python -m paper.fig5_receptive_field                   the digits: trains a grid and a set, those of Table 2
    python -m paper.fig5_receptive_field --ckpt grid.pt set.pt --data data/imagenet

Writes figure5.png, a row for each tokenizer and a column for each of the first tokens: how strongly the token's latent,
before quantization, changes with each pixel, mean over images; every map is scaled to its own maximum. Prints as a
Markdown table how global such maps are: the share of their sum outside the patch with the largest share, and the
smallest share of the pixels that contains 90 % of the sum. A token that depends on different positions in different
images has a wide mean map and narrow maps of single images, so both are measured.
"""
import time

import torch
import torch.nn.functional as F

from paper import layouts, table2_noise
from paper.inputs import DATA, DEVICE, WORKERS, open_tokenizer, read_batches, read_options
from support.command_line import stop
from support.hardware import init_distributed
from support.pictures import grid, save
from support.training import run

LAYOUTS = ("grid", "set")  # in the paper VQGAN, TokenSet
CONTAINED = 0.9            # share of a map's sum, for the second measure
OPTIONS = [
    ("--ckpt", (), "", "checkpoints of train_tokenizer.py or paper.layouts (those of the digits are trained)"),
    ("--num", 500, "[1, inf)", "images"),
    ("--tokens", 8, "[1, inf)", "how many tokens, the first ones"),
    ("--out", "figure5.png", "", "the picture"),
    DATA, WORKERS, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "fig5_receptive_field", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device)
    paths = args.ckpt or [table2_noise.trained(layout, args.device) for layout in LAYOUTS]
    pairs = [open_tokenizer(path, args.data, device, layouts.KINDS)[:2] for path in paths]
    sizes = {(tokenizer.image_size, tokenizer.encoder.patches.stride[0]) for tokenizer, _ in pairs}
    if len(sizes) > 1:
        stop("the tokenizers must have images and patches of one size, "
             f"got {' and '.join(map(str, sorted(sizes)))} pixels")
    (size, patch), = sizes
    number = min([args.tokens] + [tokenizer.num_tokens for tokenizer, _ in pairs])
    found = [measure(*pair, patch, number, args, device) for pair in pairs]
    print("| tokenizer | mean map: outside its patch | pixels with 90 % | single images: outside its patch "
          "| pixels with 90 % |\n|---|---|---|---|---|")
    names = [f"{layouts.layout_of(tokenizer)}, M = {tokenizer.num_tokens}" for tokenizer, _ in pairs]
    even = spread(torch.ones(size, size), patch)
    for name, shares in (*zip(names, [shares for _, shares in found]), ("evenly spread", [*even, *even])):
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    columns = [f"token {token + 1}" for token in range(number)]
    save(grid(torch.cat([heat(maps) for maps, _ in found]), number, names, columns), args.out)
    print(f"{args.out}: {number} tokens of each; {(time.time() - began) / 60:.1f} min")


def measure(tokenizer, dataset, patch, number, args, device):
    """The mean maps of the first tokens, (number, H, W), and the two numbers of spread(), means over these tokens, of
    the mean maps and of the maps of single images."""
    num, size = min(args.num, len(dataset)), tokenizer.image_size
    total = torch.zeros(number, size, size, dtype=torch.float64, device=device)
    single = torch.zeros(2, dtype=torch.float64, device=device)
    for _, images in read_batches(dataset, num, size, device, args.workers):
        maps = sensitivity(tokenizer, images / 127.5 - 1, number).double()
        total += maps.sum(0)
        single += torch.stack(spread(maps, patch)).mean(2).sum(1)
    return total / num, [share.mean().item() for share in spread(total, patch)] + (single / num).tolist()


def sensitivity(tokenizer, images, number):
    """How much the latents of the first tokens depend on each pixel: images (B, ch, H, W) -> (B, number, H, W).

    The norm of the gradient of a token's latent z of length 1, sqrt(sum over k and channels of (dz_k / dpixel)^2), at
    images in [-1, 1]. The paper does not say of which number it takes the gradient; this one does not depend on the
    codebook or on its axes.
    """
    images = images.clone().requires_grad_()
    latents = F.normalize(tokenizer.encoder(images).float(), dim=-1)  # (B, M, code_dim)
    squared = images.new_zeros(len(images), number, *images.shape[2:])
    for token in range(number):
        for k in range(latents.shape[2]):
            # no image depends on another, so one sum has the gradients of all
            gradient, = torch.autograd.grad(latents[:, token, k].sum(), images, retain_graph=True)
            squared[:, token] += gradient.square().sum(1)
    return squared.sqrt()


def spread(maps, patch):
    """How global maps (..., H, W) are, none negative: the share of a map's sum outside the patch with the largest
    share, (...), and the smallest share of its pixels that contains 90 % of the sum, (...)."""
    whole = maps.sum((-2, -1))
    patches = F.avg_pool2d(maps.reshape(-1, 1, *maps.shape[-2:]), patch) * patch ** 2  # their sums
    outside = 1 - patches.amax((1, 2, 3)).view(whole.shape) / whole
    cumulative = maps.flatten(-2).sort(-1, descending=True).values.cumsum(-1)  # of the n strongest pixels
    return outside, ((cumulative < CONTAINED * whole[..., None]).sum(-1) + 1) / cumulative.shape[-1]


def heat(maps):
    """Maps (n, H, W), none negative, as pictures (n, 3, h, w) uint8: from black over red and yellow to white, the map's
    own maximum, with a white margin; those of digits are enlarged four times."""
    scaled = (maps / maps.amax((1, 2), keepdim=True))[:, None].cpu()
    scaled = F.interpolate(scaled, scale_factor=max(1, 112 // maps.shape[1]))
    coloured = (3 * scaled - torch.arange(3.0).view(3, 1, 1)).clamp(0, 1)  # red comes first, then green, then blue
    return F.pad((coloured * 255).round(), (4,) * 4, value=255).to(torch.uint8)


if __name__ == "__main__":
    run(main)
