"""Inputs of an evaluation: images in a folder or an .npz file, or only their statistics (see evaluate_fid.py). Also
writes such an .npz file of samples."""
import math
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch

from data.image_folder import ImageFolder
from support.files import atomic_open


class Images(NamedTuple):
    """Images or statistics to measure or to compare with."""
    name: str                                # as printed
    num: Optional[int]                       # number of images
    read: Optional[Callable]                 # slice of 0..num - 1 -> images (n, ch, H, W) uint8; None without images
    labels: Optional[torch.Tensor] = None    # (num,) int64
    statistics: Optional[tuple] = None       # (mu, sigma)
    features: Optional[str] = None           # the network that the statistics are of, if known
    statistics_num: Optional[int] = None     # the number of images that the statistics are of, if known
    statistics_size: Optional[str] = None    # their size, such as "256 x 256", if known


def open_images(path, image_size):
    """A folder of images or an .npz file; ValueError for anything else."""
    if os.path.isdir(path):
        return open_folder(path, image_size)
    if not os.path.isfile(path):
        raise ValueError(f"there is no {path}; it should be a folder of images or an .npz file")
    try:
        return open_npz(path)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as problem:  # RuntimeError: encrypted
        raise ValueError(f"{path} can't be read as an .npz file ({problem})") from None


def open_folder(path, image_size):
    """The images in a folder and its subfolders, in the order of their names, RGB, all of one size."""
    dataset = ImageFolder(path, None, image_size)
    first = dataset.read(0, 0).shape

    def read_checked(index):
        pixels = dataset.read(index, 0)
        if pixels.shape != first:
            raise ValueError(f"images must have one size, but {dataset.path(0)} is {first[1]} x {first[0]} pixels and "
                             f"{dataset.path(index)} {pixels.shape[1]} x {pixels.shape[0]}; --image_size crops them")
        return pixels

    def read(part):
        with ThreadPoolExecutor() as threads:  # Pillow decodes outside Python's lock
            pixels = np.stack(list(threads.map(read_checked, range(part.start, part.stop))))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    return Images(path, len(dataset), read)


def open_npz(path):
    """Statistics (mu, sigma), a sample batch (arr_0), or both, as in ADM's references, which include 10,000 images for
    precision and recall. Images are read on demand, as 50,000 of 256 x 256 would take 9.8 GB."""
    archive = zipfile.ZipFile(path)
    held = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    num, read, statistics, known = None, None, None, {}
    if {"mu", "sigma"} <= held:
        mu, sigma = (read_array(archive, path, key) for key in ("mu", "sigma"))
        if not mu.dtype == sigma.dtype == np.float64:
            raise ValueError(f"mu and sigma in {path} must be floating-point numbers, got {mu.dtype} and {sigma.dtype}")
        check_statistics(mu, sigma, f"mu and sigma in {path}")
        statistics = (mu, sigma)
        known = {key: read_array(archive, path, key).item() for key in ("features", "num", "size") if key in held}
    if "arr_0" in held:
        num, read = open_batch(archive, path)
    if not (statistics or read):
        raise ValueError(f"{path} holds {', '.join(sorted(held)) or 'nothing'}; expected are arr_0, or mu and sigma")
    size = known.get("size")
    if statistics and read and not size:  # as in ADM's references
        size = "{3} x {2}".format(*read(slice(0, 1)).shape)
    return Images(path, num, read, None, statistics, known.get("features"), known.get("num"), size)


def read_array(archive, path, key):
    """An array in an .npz; floating-point numbers of any width and byte order become float64."""
    try:
        with archive.open(key + ".npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as problem:
        raise ValueError(f"{key} in {path} can't be read ({problem})") from None
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def open_batch(archive, path):
    """(N, read) of the images arr_0 (N, H, W, ch) in an .npz; read(slice) -> images (n, ch, H, W) uint8."""
    file = archive.open("arr_0.npy")
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_major, dtype = header(file)
    except ValueError as problem:
        raise ValueError(f"arr_0 in {path} can't be read ({problem})")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape or column_major:
        raise ValueError(f"arr_0 in {path} must be images (N, H, W, 3), uint8 in 0..255, got {dtype} {shape}"
                         f"{' in column-major order' if column_major else ''}")
    begin, size = file.tell(), math.prod(shape[1:])

    def read(part):
        try:
            file.seek(begin + part.start * size)
            raw = file.read((part.stop - part.start) * size)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as problem:
            raise ValueError(f"arr_0 in {path} can't be read ({problem})")
        if len(raw) < (part.stop - part.start) * size:
            raise ValueError(f"arr_0 in {path} ends before its {shape[0]} images do")
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, *shape[1:]).permute(0, 3, 1, 2)

    return shape[0], read


def save_npz(path, chunks, labels, size):
    """ADM's sample batch: arr_0 uint8 (N, size, size, 3) and arr_1 the labels (N,). chunks: an iterable of images
    (frames, n, ch, size, size) uint8, written one by one, so that memory holds few."""
    with atomic_open(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), size, size, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for images in chunks:
                member.write(images[-1].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy().tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels.numpy())


def check_statistics(mu, sigma, name):
    """ValueError unless mu (D,) and sigma (D, D) are finite floating-point numbers."""
    mu, sigma = torch.as_tensor(mu), torch.as_tensor(sigma)
    shapes_fit = mu.ndim == 1 and len(mu) and sigma.shape == (len(mu), len(mu))
    if not (shapes_fit and mu.is_floating_point() and sigma.is_floating_point()):
        raise ValueError(f"{name} must be floating-point numbers of the shapes (D,) and (D, D), "
                         f"got {mu.dtype} {tuple(mu.shape)} and {sigma.dtype} {tuple(sigma.shape)}")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{name} must be finite, but contain NaN or infinity")
