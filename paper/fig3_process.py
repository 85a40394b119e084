"""Fig. 3 (Sec. 3.3.1): one image's counts on their way from X_0 to X_1, and what greedy adjusting changes.

    python -m paper.fig3_process                              a test digit, fsdd.pt (digits.pt if there is none)
    python -m paper.fig3_process --ckpt fsdd.pt --images photo.jpg

Writes figure3.png, a row for each time t: the counts of all codes as bars (grey; green what greedy adjusting added,
outlined in red what it removed), and the image decoded from them. Prints the sum of each row before and after
adjusting.
"""
import torch
from PIL import Image, ImageDraw

import sample
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import discrete_gaussian, greedy_adjust, sample_noise
from paper.fig1_pipeline import bar
from paper.inputs import SEED, read_images, read_options
from support.pictures import save, to_pil
from support.seeds import generator
from support.training import run

TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # 0 = data, 1 = noise
LEFT, WIDTH, HEIGHT = 40, 960, 112      # where the bars begin, size of a row of bars, pixels
GREY, GREEN, RED = "#8a8f98", "#2e9d57", "#d0473a"
OPTIONS = [
    ("--ckpt", sample.default_checkpoint(), "", "checkpoint of train_fsdd.py"),
    ("--images", "digits", "", "an image file, or the word digits: the first test digit"),
    ("--out", "figure3.png", "", "the picture"),
    SEED,
]


def main(argv=None):
    args = read_options(OPTIONS, "fig3_process", __doc__, argv)
    _, tokenizer, _ = sample.load(args.ckpt, torch.device("cpu"))
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    image = read_images([args.images], 1, tokenizer)
    x0 = tokens_to_counts(tokenizer.encode(image / 127.5 - 1), C)  # (1, C)
    random = generator("cpu", "figure 3", args.seed)
    x1 = sample_noise(1, C, M, "multinomial", random)
    uniform = torch.rand(x0.shape, generator=random)  # the same for all times, so that the rows can be compared
    states = [before_and_after(x0, x1, t, uniform, M) for t in TIMES]
    print("| t | sum before adjusting | after | added | removed | codes that differ from X_0 |\n" + "|---" * 6 + "|")
    for t, (before, after) in zip(TIMES, states):
        change = after - before
        print(f"| {t} | {before.sum()} | {after.sum()} | {change.clamp(min=0).sum()} | {-change.clamp(max=0).sum()} "
              f"| {(after != x0).sum()} |")
    decoded = sample.decode(tokenizer, counts_to_tokens(torch.cat([after for _, after in states])))
    save(draw(states, decoded), args.out)
    print(f"{args.out}: {len(TIMES)} times, {C} codes, M = {M}")


def before_and_after(x0, x1, t, uniform, num_tokens):
    """X_t before and after greedy adjusting, (1, C) each; fsdd.forward_process() gives the second."""
    if t in (0, 1):
        return (x1, x1) if t else (x0, x0)
    mean, std = t * x1 + (1 - t) * x0, (x1 - x0).abs() / 4  # Eq. 6
    before, log_prob = discrete_gaussian(mean, std, num_tokens, uniform)
    return before, greedy_adjust(before, log_prob, num_tokens)


def draw(states, decoded):
    """A PIL image: for each of the states a row of bars, one for each code, and the image (ch, H, W) uint8 decoded from
    it."""
    unit = (HEIGHT - 12) / max(int(torch.maximum(before, after).max()) for before, after in states)  # pixels a count
    page = Image.new("RGB", (LEFT + WIDTH + HEIGHT, len(states) * HEIGHT), "white")
    pen = ImageDraw.Draw(page)
    for row, (t, (before, after), image) in enumerate(zip(TIMES, states, decoded)):
        floor, C = (row + 1) * HEIGHT - 4, before.shape[1]
        pen.text((4, floor - HEIGHT // 2), f"t {t}", fill="black")
        for code, (b, a) in enumerate(zip(before[0].tolist(), after[0].tolist())):
            axis = (LEFT, floor, WIDTH)
            bar(pen, axis, code, C, 0, min(a, b) * unit, fill=GREY)
            bar(pen, axis, code, C, b * unit, a * unit, fill=GREEN)
            bar(pen, axis, code, C, a * unit, b * unit, outline=RED)
        pen.line((LEFT, floor, LEFT + WIDTH, floor), fill="black")
        picture_of_row = to_pil(image).resize((HEIGHT - 8, HEIGHT - 8), Image.NEAREST)
        page.paste(picture_of_row, (LEFT + WIDTH + 4, row * HEIGHT + 4))
    return page


if __name__ == "__main__":
    run(main)
