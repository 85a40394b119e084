"""Fig. 3 (Sec. 3.3.1): one image's counts on their way from X_0 to X_1, and what the greedy step adds and takes away.

    python -m paper.fig3_process                              a test digit, fsdd.pt
    python -m paper.fig3_process --ckpt fsdd.pt --images photo.jpg

Writes figure3.png, a row for each time t: the counts of all codes as bars (grey; green what greedy adjusting added, red
and outlined what it took away), and the image that they decode to. Prints what each row sums to before and after
adjusting.
"""
import time

import torch
from PIL import Image, ImageDraw

import common
import sample
from data import pictures
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import discrete_gaussian, greedy_adjust, sample_noise
from paper.reconstruct import read_images

CKPT = "fsdd.pt"
IMAGES = "digits"  # an image file, or the word digits: the first test digit
OUT = "figure3.png"
SEED = 0           # of the noise
TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # 0 = data, 1 = noise
WIDTH, HEIGHT = 960, 112  # of a row of bars, pixels
COLOURS = {"kept": "#8a8f98", "added": "#2e9d57", "taken": "#d0473a"}


def main(argv=None):
    args = parse(argv)
    began = time.time()
    denoiser, tokenizer, checkpoint = sample.load(args.ckpt, torch.device("cpu"))
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    try:
        image = read_images([args.images], 1, tokenizer.image_size, checkpoint["tokenizer"]["model_config"]["channels"])
    except ValueError as problem:
        common.stop(str(problem))
    x0 = tokens_to_counts(tokenizer.encode(image / 127.5 - 1), C)  # (1, C)
    random = common.generator("cpu", "figure 3", args.seed)
    x1 = sample_noise(1, C, M, checkpoint["generation"]["prior"], random)
    uniform = torch.rand(x0.shape, generator=random)  # one draw for all times, so that the rows tell one story
    states = [state(x0, x1, t, uniform, M) for t in TIMES]
    print("| t | sum before adjusting | after | added | taken away | codes that differ from X_0 |\n" + "|---" * 6 + "|")
    for t, (before, after) in zip(TIMES, states):
        change = after - before
        print(f"| {t} | {before.sum()} | {after.sum()} | {change.clamp(min=0).sum()} | {-change.clamp(max=0).sum()} "
              f"| {(after != x0).sum()} |")
    decoded = sample.decode(tokenizer, counts_to_tokens(torch.cat([after for _, after in states])))
    pictures.save(draw(states, decoded), args.out)
    print(f"{args.out}: {len(TIMES)} times, {C} codes, M = {M}; {(time.time() - began) / 60:.1f} min")


def state(x0, x1, t, uniform, num_tokens):
    """X_t before and after greedy adjusting, (1, C) each; fsdd.forward_process() gives the second."""
    if t in (0, 1):
        return (x1, x1) if t else (x0, x0)
    mean, std = t * x1 + (1 - t) * x0, (x1 - x0).abs() / 4  # Eq. 6
    before, log_prob = discrete_gaussian(mean, std, num_tokens, uniform)
    return before, greedy_adjust(before, log_prob, num_tokens)


def draw(states, decoded):
    """A PIL image: for each of the states a row of bars, one a code, and beside it the image (ch, H, W) uint8 it
    decodes to."""
    tallest = max(int(torch.maximum(before, after).max()) for before, after in states)
    page = Image.new("RGB", (40 + WIDTH + HEIGHT, len(states) * HEIGHT), "white")
    pen = ImageDraw.Draw(page)
    for row, (t, (before, after), image) in enumerate(zip(TIMES, states, decoded.numpy())):
        floor, unit = (row + 1) * HEIGHT - 4, (HEIGHT - 12) / tallest
        pen.text((4, floor - HEIGHT // 2), f"t {t}", fill="black")
        C = before.shape[1]
        for j, (b, a) in enumerate(zip(before[0].tolist(), after[0].tolist())):
            left, right = 40 + j * WIDTH / C, max(40 + (j + 1) * WIDTH / C - 1, 41 + j * WIDTH / C)
            top = lambda count: floor - count * unit  # noqa: B023, E731
            if min(a, b):
                pen.rectangle((left, top(min(a, b)), right, floor), fill=COLOURS["kept"])
            if a > b:
                pen.rectangle((left, top(a), right, top(b)), fill=COLOURS["added"])
            if b > a:
                pen.rectangle((left, top(b), right, top(a)), outline=COLOURS["taken"])
        pen.line((40, floor, 40 + WIDTH, floor), fill="black")
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        page.paste(picture.resize((HEIGHT - 8, HEIGHT - 8), 0), (40 + WIDTH + 4, row * HEIGHT + 4))
    return page


def parse(argv):
    parser = common.Parser(prog="python -m paper.fig3_process", description=__doc__)
    parser.add_argument("--ckpt", default=CKPT, help=f"checkpoint of train_fsdd.py ({CKPT})")
    parser.add_argument("--images", default=IMAGES, help=f"an image file, or the word digits ({IMAGES})")
    parser.add_argument("--out", default=OUT, help=f"the picture, .png ({OUT})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the noise ({SEED})")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    pictures.check_picture(parser, args.out)
    return args


if __name__ == "__main__":
    common.run(main)
