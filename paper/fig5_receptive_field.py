"""Fig. 5 (Sec. 4.2.2): the pixels that a single token depends on, in a grid, whose tokens have positions, and in a set.

    python -m paper.fig5_receptive_field                   the test digits: trains a grid and a set, those of Table 2
    python -m paper.fig5_receptive_field --ckpt grid.pt set.pt --data data/imagenet

Writes figure5.png, a row for each tokenizer and a column for each of the first tokens: the mean over images of how
strongly the token's latent, before quantization, changes with each pixel; every map is scaled to its own maximum.
Prints as a Markdown table how global such maps are: the share of their sum outside the patch that holds most of it, and
the smallest share of the pixels that holds 90 % of it. A token that looks at one position in one image and at another
in the next has a wide mean and narrow maps, so both are measured of the mean map and of the maps of single images.
"""
import time

import torch
import torch.nn.functional as F

import common
from data import pictures
from paper import layouts, table2_noise

LAYOUTS = ("grid", "set")  # in the paper VQGAN, TokenSet
OUT = "figure5.png"
TOKENS = 8  # the first ones
NUM = 500   # images
HELD = 0.9  # share of a map's sum, for the second measure


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, rank, processes = common.init_distributed(args.device)
    try:
        loaded = [table2_noise.load(path, args.data, device)
                  for path in args.ckpt or [table2_noise.trained(layout, args.device) for layout in LAYOUTS]]
        sizes = sorted({(tokenizer.image_size, tokenizer.encoder.patches.stride[0]) for tokenizer, _ in loaded})
        if len(sizes) > 1:
            raise ValueError("the tokenizers must have images and patches of one size, "
                             f"got {' and '.join(map(str, sizes))} pixels")
        patch, number = sizes[0][1], min([args.tokens] + [tokenizer.num_tokens for tokenizer, _ in loaded])
        names = [f"{layouts.layout_of(tokenizer)}, M = {tokenizer.num_tokens}" for tokenizer, _ in loaded]
        found = [measure(*pair, patch, number, args, device, rank, processes) for pair in loaded]
    except ValueError as problem:
        common.stop(str(problem))
    if rank == 0:
        print("| tokenizer | mean map: outside its patch | pixels that hold 90 % | single images: outside its patch "
              "| pixels that hold 90 % |\n|---|---|---|---|---|")
        even = spread(torch.ones(sizes[0][0], sizes[0][0]), patch)
        for name, shares in (*zip(names, [shares for _, shares in found]), ("evenly spread", [*even, *even])):
            print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
        columns = [f"token {token + 1}" for token in range(number)]
        page = pictures.grid(torch.cat([heat(maps) for maps, _ in found]), number, names, columns)
        pictures.save(page, args.out)
        print(f"{args.out}: {number} tokens of each; {(time.time() - began) / 60:.1f} min")


def measure(tokenizer, dataset, patch, number, args, device, rank, processes):
    """The mean maps of the first tokens, (number, H, W), and the two numbers of spread(), means over these tokens, of
    the mean maps and of the maps of single images."""
    num, size = min(args.num, len(dataset)), tokenizer.image_size
    total = torch.zeros(number, size, size, dtype=torch.float64, device=device)
    single = torch.zeros(2, dtype=torch.float64, device=device)
    for _, images in table2_noise.batches(dataset, num, size, device, rank, processes, args.workers):
        maps = sensitivity(tokenizer, images, number).double()
        total += maps.sum(0)
        single += torch.stack(spread(maps, patch)).mean(2).sum(1)
    for summed in (total, single):
        common.all_reduce(summed)
    return total / num, [share.mean().item() for share in spread(total, patch)] + (single / num).tolist()


def sensitivity(tokenizer, images, number):
    """How much the latents of the first tokens depend on each pixel: images (B, ch, H, W) -> (B, number, H, W).

    The length of the gradient of a token's latent z of length 1, sqrt(sum over k and channels of (dz_k / dpixel)^2), at
    images in [-1, 1]. The paper leaves open of what number it takes the gradient; this one does not depend on the
    codebook or on its axes.
    """
    images = images.clone().requires_grad_()
    latents = F.normalize(tokenizer.encoder(images).float(), dim=-1)  # (B, M, code_dim)
    squared = images.new_zeros(len(images), number, *images.shape[2:])
    for token in range(number):
        for k in range(latents.shape[2]):
            # no image sees another, so that one sum has the gradients of all
            gradient, = torch.autograd.grad(latents[:, token, k].sum(), images, retain_graph=True)
            squared[:, token] += gradient.square().sum(1)
    return squared.sqrt()


def spread(maps, patch):
    """How global maps (..., H, W) are, none negative: the share of a map's sum outside the patch that holds most of it,
    (...), and the smallest share of its pixels that holds 90 % of the sum, (...)."""
    whole = maps.sum((-2, -1))
    patches = F.avg_pool2d(maps.reshape(-1, 1, *maps.shape[-2:]), patch) * patch ** 2  # their sums
    outside = 1 - patches.amax((1, 2, 3)).view(whole.shape) / whole
    held = maps.flatten(-2).sort(-1, descending=True).values.cumsum(-1)  # by the n strongest pixels
    return outside, ((held < HELD * whole[..., None]).sum(-1) + 1) / held.shape[-1]


def heat(maps):
    """Maps (n, H, W), none negative, to look at: (n, 3, h, w) uint8, from black over red and yellow to white, the map's
    own maximum; a digit's four times as large, with a white margin."""
    scaled = (maps / maps.amax((1, 2), keepdim=True))[:, None].cpu()
    scaled = F.interpolate(scaled, scale_factor=max(1, 112 // maps.shape[1]))
    coloured = (3 * scaled - torch.arange(3.0).view(3, 1, 1)).clamp(0, 1)  # red comes first, then green, then blue
    return F.pad((coloured * 255).round(), (4,) * 4, value=255).to(torch.uint8)


def parse(argv):
    parser = common.Parser(prog="python -m paper.fig5_receptive_field", description=__doc__)
    parser.add_argument("--ckpt", nargs="+", help="tokenizers, checkpoints of train_tokenizer.py or paper.layouts "
                                                  "(the digits' are trained)")
    table2_noise.add_options(parser)
    parser.add_argument("--num", "--num_images", type=int, default=NUM,
                        help=f"images ({NUM}); under torchrun write --num_images")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens to look at, the first ones ({TOKENS})")
    parser.add_argument("--out", default=OUT, help=f"the picture, .png ({OUT})")
    args = parser.parse_args(argv)
    table2_noise.check_options(parser, args, num=1, tokens=1)
    pictures.check_picture(parser, args.out)
    return args


if __name__ == "__main__":
    common.run(main)
