"""How fast a folder of images is read: images a second on one core, next to the usual pipeline.

    python -m data.speed data/imagenet

A training process reads about --workers times as many, as long as it has the cores and the disk keeps up.
"""
import argparse
import os
import sys
import time

import numpy as np
import torch
from PIL import Image

from data.image_folder import ImageFolder

IMAGE_SIZE = 256  # side of the crops, pixels
NUM = 320         # images looked at, spread over the training set
BATCH = 32        # images a batch; the ways of reading take turns after each


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="holds train/CLASS/*")
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE, help=f"side of the crops, pixels ({IMAGE_SIZE})")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        training = ImageFolder(args.folder, "train", args.image_size, "random", flip=True)
        exact = ImageFolder(args.folder, "train", args.image_size)
        ways = {"usual pipeline, bilinear, float": lambda items: usual_pipeline(training, items),
                "crops of stage 1": training.__getitems__, "crops of stage 2, as ADM's": exact.__getitems__,
                "check for unreadable files": lambda items: training.unreadable([index for index, _ in items])}
        print_rates(ways, training)
    except ValueError as problem:
        sys.exit(f"error: {problem}")


def print_rates(ways, dataset):
    indices = np.linspace(0, len(dataset) - 1, min(NUM, len(dataset))).astype(int).tolist()
    broken = dataset.unreadable(indices)  # and now the files are in memory
    indices = [index for index in indices if os.fsdecode(dataset.names[index]) not in broken]
    seconds = dict.fromkeys(ways, 0.0)
    for start in range(0, len(indices), BATCH):
        for name, read in ways.items():
            began = time.process_time()
            read([(index, 0) for index in indices[start:start + BATCH]])
            seconds[name] += time.process_time() - began
    first = next(iter(ways))
    for name in ways:
        print(f"{name:32} {len(indices) / seconds[name]:7.0f} images a second and core, "
              f"{seconds[first] / seconds[name]:5.2f} of the first")


def usual_pipeline(dataset, items):
    """What torchvision's Resize, RandomCrop, RandomHorizontalFlip and ToTensor do: a batch (n, 3, H, W) of float32 in
    [0, 1]."""
    size, batch = dataset.image_size, []
    for index, _ in items:
        with Image.open(dataset.path(index)) as file:
            image = file.convert("RGB")
        scale = size / min(image.size)
        image = image.resize((int(image.width * scale + 0.5), int(image.height * scale + 0.5)), Image.BILINEAR)
        left, top = np.random.randint(image.width - size + 1), np.random.randint(image.height - size + 1)
        image = image.crop((left, top, left + size, top + size))
        if np.random.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        batch.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255))
    return torch.stack(batch)


if __name__ == "__main__":
    main()
