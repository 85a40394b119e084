"""Pages of images, as PIL images and as files."""
import os

import torch
from PIL import Image, ImageDraw

from support.files import atomic_open


def to_uint8(images):
    """Images in [-1, 1] -> uint8 0..255, same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images, columns, row_labels=None, column_labels=None):
    """A PIL image of uint8 images (N, ch, H, W) in rows of columns. row_labels: a text in front of each row.
    column_labels: a text above each column."""
    N, _, H, W = images.shape
    rows = -(-N // columns)
    scale = max(1, 64 // H)  # digits and emoji would be tiny
    margin = 0 if row_labels is None else 12 + max(7 * len(text) for text in row_labels)
    top = 0 if column_labels is None else 18
    page = Image.new("RGB", (margin + columns * W * scale, top + rows * H * scale), "white")
    for i, image in enumerate(images.cpu()):
        picture = to_pil(image).resize((W * scale, H * scale), Image.NEAREST)
        page.paste(picture, (margin + i % columns * W * scale, top + i // columns * H * scale))
    for row, text in enumerate(row_labels or []):
        ImageDraw.Draw(page).text((6, top + (row + 0.5) * H * scale - 6), text, fill="black")
    for column, text in enumerate(column_labels or []):
        ImageDraw.Draw(page).text((margin + column * W * scale + 2, 3), text, fill="black")
    return page


def to_pil(image):
    """An image (ch, H, W) uint8 -> a PIL image."""
    pixels = image.cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def grid_by_class(images, labels, class_names):
    """A PIL image of uint8 images (N, ch, H, W), with a row for each class. labels: (N,), those of a class together."""
    columns = int(labels.bincount().max())
    rows = images.split(labels.unique_consecutive(return_counts=True)[1].tolist())
    filled = [torch.cat([row, row.new_full((columns - len(row), *row.shape[1:]), 255)]) for row in rows]  # with white
    return grid(torch.cat(filled), columns, [class_names[label] for label in labels.unique_consecutive()])


def save(page, path, **options):
    """Write a PIL image, whole or not at all."""
    with atomic_open(path) as file:
        page.save(file, os.path.splitext(path)[1][1:], **options)


def save_samples(path, images, labels, class_names):
    """images (frames, N, ch, H, W) uint8 and labels (N,) -> a grid (.png) or an animation (.gif), a row for each
    class."""
    pages = [grid_by_class(frame, labels, class_names) for frame in images]
    film = dict(save_all=True, append_images=pages[1:], duration=[120] * (len(pages) - 1) + [2000], loop=0)
    save(pages[0], path, **film if path.endswith(".gif") else {})
