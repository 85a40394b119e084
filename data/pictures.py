"""Images as bytes and as pages: what the scripts draw."""
import os

import torch
from PIL import Image, ImageDraw

import common
from data import files
from data.reading import read_ahead


def to_uint8(images):
    """Images in [-1, 1] -> uint8 0..255, same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def decode(tokenizer, tokens):
    """Tokens (n, M) -> images (n, ch, H, W) uint8 on the CPU; a million pixels at once, as MaskGIT-VQGAN needs
    memory."""
    at_once = max(1, 2 ** 20 // tokenizer.image_size ** 2)
    return torch.cat([to_uint8(tokenizer.decode(part)).cpu() for part in tokens.split(at_once)])


def grid(images, columns, row_labels=None, column_labels=None):
    """A PIL image of uint8 images (N, ch, H, W) in rows of columns. row_labels: a text in front of each row.
    column_labels: a text above each column."""
    N, _, H, W = images.shape
    rows = -(-N // columns)
    scale = max(1, 56 // H)  # digits would be tiny
    margin = 0 if row_labels is None else 12 + max(7 * len(text) for text in row_labels)
    top = 0 if column_labels is None else 18
    page = Image.new("RGB", (margin + columns * W * scale, top + rows * H * scale), "white")
    for i, image in enumerate(images.cpu().numpy()):
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture = picture.resize((W * scale, H * scale), Image.NEAREST)
        page.paste(picture, (margin + i % columns * W * scale, top + i // columns * H * scale))
    for row, text in enumerate(row_labels or []):
        ImageDraw.Draw(page).text((6, top + (row + 0.5) * H * scale - 6), text, fill="black")
    for column, text in enumerate(column_labels or []):
        ImageDraw.Draw(page).text((margin + column * W * scale + 2, 3), text, fill="black")
    return page


def draw_samples(file, kind, images, labels, class_names):
    """images (frames, N, ch, H, W) uint8 and labels (N,) -> a grid ("png") or an animation ("gif") in an open file."""
    columns = int(labels.bincount().max())  # a row for each class
    rows = [class_names[label] for label in labels.unique_consecutive()]
    pages = [grid(fill_rows(frame, labels, columns), columns, rows) for frame in images]
    film = dict(save_all=True, append_images=pages[1:], duration=[120] * (len(pages) - 1) + [2000], loop=0)
    pages[0].save(file, kind, **film if kind == "gif" else {})


def save(page, path, **options):
    """Write a PIL image so that a kill at any moment leaves the old file or the new one, whole."""
    with files.written(path) as file:
        page.save(file, os.path.splitext(path)[1][1:], **options)


def fill_rows(images, labels, columns):
    """Images (N, ch, H, W) of ascending rows of labels, with white images where a row is short of columns."""
    rows = images.split(labels.unique_consecutive(return_counts=True)[1].tolist())
    white = lambda row: row.new_full((columns - len(row), *row.shape[1:]), 255)  # noqa: E731
    return torch.cat([torch.cat([row, white(row)]) for row in rows])


def draw_reconstructions(model, dataset, device, path, number=20):
    """A page of test images, every second row their reconstructions from the tokens."""
    if common.is_main():
        columns = min(10, len(dataset))
        number = min(number, len(dataset)) // columns * columns
        spread = range(0, len(dataset), max(1, len(dataset) // number))
        images = next(read_ahead(dataset, [[(i, 0) for i in spread][:number]], workers=0))[0].to(device)
        pairs = torch.stack([images, to_uint8(model.decode(model.encode(images / 127.5 - 1)))])
        pairs = pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)  # rows: images, reconstructions, ...
        save(grid(pairs, columns, ["image", "decoded"] * (number // columns)), path)


def check_picture(parser, path):
    """Exit before any work where a picture can't be written to path."""
    if not path.endswith(".png"):
        parser.error(f"--out must end in .png, got {path}")
    common.check_output(path)
