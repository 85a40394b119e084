"""How good images are (Sec. 4.1): FID, Inception Score, precision and recall.

    python evaluate_fid.py --ckpt fsdd.pt                            generate images and measure them: gFID
    python evaluate_fid.py --ckpt tokenizer.pt                       reconstruct the validation images and measure them: rFID
    python evaluate_fid.py --images samples.npz --ref stats.npz      measure images that are there; any two of these and of
                                                                     statistics can be compared
    torchrun --nproc_per_node=8 evaluate_fid.py --ckpt fsdd.pt --ref VIRTUAL_imagenet256_labeled.npz     as in the paper

Features are those of Inception-v3 of 2015-12-05, the network that all published FIDs are in; its weights are downloaded, or
given by --inception. The embedded digits need no download: their distance is taken in the features of a small classifier,
trained here once, and called "digits FID". The two are not comparable. README.md says which files a paper's numbers need.
"""
import argparse
import hashlib
import math
import os
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import common
import sample
from data import open_dataset
from data.image_folder import SUFFIXES, center_crop, find_images, reason, to_rgb
from data.reading import batch_indices
from tokenizer import SetTokenizer

# The options --batch, --seed, --device, --bf16 and those of generation have their values from sample.py.
NUM = 50000              # images that an fsdd checkpoint generates, spread evenly over the classes, as in the papers
NUM_DIGITS = 2000        # the same for the digits
NETWORK_BATCH = 50       # images that Inception sees at once: about 1 GiB
SPLITS = 10              # parts that the Inception Score is the mean over
NEIGHBOURS = 3           # k of precision and recall
NEIGHBOUR_IMAGES = 50000  # images of a side, evenly picked, that count for precision and recall; their features stay in memory
CLASSIFIER = "digits_classifier.pt"  # the trained classifier of the digits; stands beside the checkpoint
CLASSIFIER_EPOCHS = 4
INCEPTION_URLS = (  # one network, the same tensors by the same names, published twice; either file will do
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth")
NEEDS = ("this takes two files: Inception's weights, which are downloaded or given by --inception, and a reference, --ref: for "
         "gFID on ImageNet ADM's VIRTUAL_imagenet256_labeled.npz (github.com/openai/guided-diffusion, evaluations), else "
         "statistics that --save_stats wrote, an .npz of images, a folder of them or a checkpoint")


def main(argv=None):
    args = parse(argv)
    device, rank, processes = common.init_distributed(args.device, tf32=False)  # a published number must not hang on the GPU
    began = time.time()
    try:
        results = evaluate(args, device, rank, processes)
    except ValueError as problem:
        common.stop(str(problem))
    if rank > 0:
        return
    if args.json:
        common.write_json(results, args.json)
    for name, value in results.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"measured in {(time.time() - began) / 60:.1f} min")


def evaluate(args, device, rank=0, processes=1):
    """The numbers that a command line asks for, {name: value}; args: of parse(). All processes take part; only on the main
    process it returns them. ValueError where something lacks or doesn't fit.
    """
    images, reference, data = open_sides(args, device)
    both = bool(images.read and reference and reference.read)  # precision and recall need images on both sides
    measured = bool(reference and reference.read and (both or not reference.statistics))
    net = None  # two statistics need none
    if images.read or measured:
        net = network(args, data, device, rank)
    features = check_features(images, reference, net)
    against = measure(net, reference, args.batch, both, device, rank, processes) if measured else None
    found = measure(net, images, args.batch, both, device, rank, processes) if images.read else None
    if rank > 0:
        return None
    if args.save_stats:
        save_statistics(args.save_stats, found, net)
    results = compare(features, images, found, reference, against, device)
    if found and found.read_as_label is not None:
        results |= {"read_as_label": found.read_as_label, "test_digits_read_as_label": net.accuracy.item()}
    return results


def network(args, data, device, rank):
    """The network whose features are compared: Inception-v3, for the digits the classifier unless --inception asks for it."""
    classifier = data == "digits" and not args.inception
    return digits_classifier(args, device, rank) if classifier else inception(args, device, rank)


def parse(argv):
    parser = common.Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="fsdd.pt: generates images and measures them; tokenizer.pt: reconstructs images")
    parser.add_argument("--images", help="in place of --ckpt: a folder of images, or an .npz of them, arr_0 uint8 (N, H, W, 3), "
                                         "or of their statistics mu and sigma")
    parser.add_argument("--ref", help="what to compare with: what --images takes, or a checkpoint, .pt "
                                      "(tokenizer.pt: the images themselves; the digits' fsdd.pt: the training digits)")
    parser.add_argument("--data", help="digits, or a folder that holds train/ and val/ (what the checkpoint was trained on)")
    parser.add_argument("--num", "--num_images", type=int, help=f"images to generate ({NUM}, of the digits {NUM_DIGITS}) or to "
                                                                "reconstruct (all); under torchrun write --num_images")
    parser.add_argument("--image_size", type=int, help="crop the images of folders to so many pixels, as ADM does")
    parser.add_argument("--inception", help="file of Inception's weights (downloaded to torch's cache)")
    parser.add_argument("--classifier", help=f"the digits' classifier, trained where it is not there ({CLASSIFIER} beside the "
                                             "checkpoint)")
    parser.add_argument("--save_stats", help="write mu and sigma of the measured images to this .npz, for --ref")
    parser.add_argument("--json", help="write the results to this file")
    sample.add_generation_options(parser)
    args = parser.parse_args(argv)
    if bool(args.ckpt) == bool(args.images):
        parser.error("either --ckpt or --images must say what to measure")
    if args.num and not (args.ckpt or is_checkpoint(args.ref)):
        parser.error("--num goes with a checkpoint; of --images, all are measured")
    if args.image_size is not None and args.image_size < 1:
        parser.error(f"--image_size must be at least 1, got {args.image_size}")
    sample.check_generation_options(parser, args)
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save_stats must end in .npz, got {args.save_stats}")
    for path in (args.save_stats, args.json, args.classifier):
        common.check_folder(path or "")
    return args


def compare(features, images, found, reference, against, device):
    """The numbers, {name: value}, of measured images and, where there is a reference, of their distance to it.

    features: the name of what they are taken in.  found, against: what measure() gives for either side, None where only given
    statistics count. Statistics that are given come before those of the images beside them, as in ADM's references.
    """
    prefix = "digits_" if features.startswith("digits") else ""  # so that nobody takes them for Inception's
    results = {"images": images.name} | ({"num_images": found.num} if found else {}) | {"features": features}
    if reference:
        results["reference"] = reference.name
        statistics = []
        for given, seen in ((images, found), (reference, against)):
            mu, sigma = given.statistics or (seen.mu, seen.sigma)
            statistics += [mu, sigma]
            if not given.statistics and seen.num <= len(mu):  # N images span N - 1 dimensions
                print(f"warning: {seen.num} images are no more than the {len(mu)} features: their covariance is singular and the "
                      "FID comes out too large; compare it only with one from as many images", file=sys.stderr)
        results[prefix + "fid"] = frechet_distance(*statistics)
    if found and found.score:
        results["inception_score"], results["inception_score_std"] = found.score
    if found and against and min(found.num, against.num) > NEIGHBOURS:
        precision, recall = precision_recall(found.features.to(device), against.features.to(device))
        results |= {prefix + "precision": precision, prefix + "recall": recall}
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The two sides: images from a checkpoint, a folder or an .npz, or statistics alone


def side(name, num, read, labels=None, statistics=None, made_in=None):
    """name: as printed.  num: how many images.  read: slice of 0..num - 1 -> images (n, ch, H, W) uint8, None = there are none.

    labels: (num,) int64 or None.  statistics: (mu, sigma) where they are given.  made_in: the network they are of, if known.
    """
    return SimpleNamespace(name=name, num=num, read=read, labels=labels, statistics=statistics, made_in=made_in)


def open_sides(args, device):
    """(what is measured, what it is compared with or None, the data: "digits", a folder or None); ValueError where one lacks."""
    originals, data = None, args.data
    if args.ckpt:
        images, originals, data = open_checkpoint(args.ckpt, args, device)
    else:
        images = open_images(args.images, args.image_size)
    if images.read is None and args.save_stats:
        raise ValueError(f"{args.images} holds statistics already; --save_stats needs images")
    if is_checkpoint(args.ref):
        reference, _, trained_on = open_checkpoint(args.ref, args, device)
        data = data or trained_on
    elif args.ref:
        reference = open_images(args.ref, args.image_size)
    elif originals:
        reference = originals
    elif data == "digits":
        reference = training_digits()  # as ADM's statistics are of the training set
    elif args.save_stats:
        reference = None
    else:
        raise ValueError(f"there is nothing to compare {images.name} with; {NEEDS}")
    for one in filter(None, (images, reference)):  # before any is generated
        if not one.statistics and one.num < 2:
            raise ValueError(f"a covariance needs at least two images, got {one.num} ({one.name})")
    return images, reference, data


def training_digits():
    digits = open_dataset("digits", "train", 28)
    return side("the training digits", len(digits), lambda part: digits.images[part])


def is_checkpoint(path):
    return bool(path) and path.endswith(".pt")


def open_checkpoint(path, args, device):
    """(images that a checkpoint generates or reconstructs, the originals of reconstructions or None, what it was trained on)."""
    checkpoint = common.load_checkpoint(path, "python train_fsdd.py (or train_tokenizer.py)", "fsdd", "tokenizer")
    data = args.data or checkpoint.get("config", {}).get("data")
    if checkpoint["kind"] == "fsdd":
        return generated(path, checkpoint, args, data, device), None, data
    return *reconstructed(path, checkpoint, args, data, device), data


def generated(path, checkpoint, args, data, device):
    """Images of a checkpoint of train_fsdd.py, the same for any number of processes."""
    denoiser, tokenizer = sample.models(checkpoint, device)
    names = checkpoint["class_names"]
    labels = sample.choose_labels(None, args.num or (NUM_DIGITS if data == "digits" else NUM), names, len(names))
    settings = sample.generation_settings(checkpoint["generation"], args)
    next(sample.refine(denoiser, labels[:1].to(device), **settings))  # refuses wrong settings

    def read(part):  # measure() reads slices of args.batch images: the chunks that sample.py draws
        return sample.draw_chunk(denoiser, tokenizer, labels[part], settings, part.start // args.batch, args)[-1]

    return side(f"generated by {path}", len(labels), read, labels)


def reconstructed(path, checkpoint, args, data, device):
    """(the reconstructions of the validation images by a checkpoint of train_tokenizer.py, those images)."""
    tokenizer, dataset = open_tokenizer(path, checkpoint, data, device)
    chosen = evenly(len(dataset), args.num)

    def read(part):
        return dataset.__getitems__([(i, 0) for i in chosen[part].tolist()])[0]

    def reconstruct(part):
        return sample.decode(tokenizer, tokenizer.encode(read(part).to(device) / 127.5 - 1))

    return (side(f"reconstructed by {path}", len(chosen), reconstruct, dataset.labels[chosen]),
            side(f"the validation images of {data}", len(chosen), read))


def open_tokenizer(path, checkpoint, data, device):
    """(the tokenizer of a checkpoint of train_tokenizer.py, the validation images of data). ValueError where they don't fit."""
    if data is None:
        raise ValueError(f"{path} does not say what it was trained on; give the images by --data: digits, or a folder that "
                         "holds train/ and val/")
    tokenizer = SetTokenizer(**checkpoint["model_config"]).to(device).eval()
    tokenizer.load_state_dict(checkpoint["weights"])
    dataset = open_dataset(data, "test", tokenizer.image_size)
    if dataset.channels != checkpoint["model_config"]["channels"]:
        raise ValueError(f"the images of {data} have {dataset.channels} channels, those of {path} "
                         f"{checkpoint['model_config']['channels']}; give by --data what it was trained on")
    return tokenizer, dataset


def evenly(total, num):
    """The places of num of total images, or of all where num is None or more, evenly spread: (n,) int64."""
    num = min(num or total, total)
    return torch.arange(num) * total // num


def open_images(path, image_size):
    """A folder of images or an .npz as a side(); ValueError, one sentence, for anything else."""
    if os.path.isdir(path):
        return open_folder(path, image_size)
    if not os.path.isfile(path):
        raise ValueError(f"there is no {path}; it should be a folder of images or an .npz file")
    try:
        return open_npz(path)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as problem:  # RuntimeError: it is encrypted
        raise ValueError(f"{path} can't be read as an .npz file ({problem})")


def open_folder(path, image_size):
    """The images in a folder and the folders in it, in the order of their names, RGB, all of one size."""
    paths = sorted(os.path.join(path, name) for name, _ in find_images(path, ""))
    if not paths:
        raise ValueError(f"there are no images in {path}; names that end in {', '.join(SUFFIXES)} are looked for")
    first = read_image(paths[0], image_size).shape

    def read_checked(name):
        pixels = read_image(name, image_size)
        if pixels.shape != first:
            raise ValueError(f"images must have one size, but {paths[0]} is {first[1]} x {first[0]} pixels and {name} "
                             f"{pixels.shape[1]} x {pixels.shape[0]}; --image_size crops them")
        return pixels

    def read(part):
        with ThreadPoolExecutor() as threads:  # Pillow decodes outside Python's lock
            pixels = np.stack(list(threads.map(read_checked, paths[part])))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    return side(path, len(paths), read)


def read_image(path, image_size):
    """One image, (H, W, 3) uint8; with an image_size, cropped from the centre as ADM does it."""
    try:
        with Image.open(path) as file:
            return np.array(center_crop(file, image_size) if image_size else to_rgb(file))
    except Exception as problem:  # Pillow fails in many ways on a file that is no image
        raise ValueError(f"{path} can't be read as an image ({reason(problem)})") from None


def open_npz(path):
    """Statistics (mu, sigma), a sample batch (arr_0), or both: ADM's references hold 10,000 images for precision and recall too.

    Images are read as they are asked for: 50,000 of 256 x 256 would be 9.8 GB.
    """
    archive = zipfile.ZipFile(path)
    held = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    num, read, statistics, made_in = None, None, None, None
    if {"mu", "sigma"} <= held:
        mu, sigma = (read_array(archive, path, key) for key in ("mu", "sigma"))
        if not mu.dtype == sigma.dtype == np.float64:
            raise ValueError(f"mu and sigma in {path} must be floating-point numbers, got {mu.dtype} and {sigma.dtype}")
        check_statistics(mu, sigma, f"mu and sigma in {path}")
        statistics = (mu, sigma)
        made_in = str(read_array(archive, path, "features")) if "features" in held else None
    if "arr_0" in held:
        num, read = open_batch(archive, path)
    if not (statistics or read):
        raise ValueError(f"{path} holds {common.listed(sorted(held))}; needed is arr_0, or mu and sigma")
    return side(path, num, read, None, statistics, made_in)


def read_array(archive, path, key):
    """An array of an .npz; floating-point numbers of any width and byte order as float64."""
    try:
        with archive.open(key + ".npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as problem:
        raise ValueError(f"{key} in {path} can't be read ({problem})")
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def open_batch(archive, path):
    """(N, read) of the images arr_0 (N, H, W, ch) in an .npz, which is read piece by piece."""
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


def check_features(images, reference, net):
    """The name of the features that are compared; ValueError where given statistics are of others than net's or one another's."""
    given = [one for one in (images, reference) if one and one.statistics]
    named = next((one.made_in for one in given if one.made_in), None)
    dims, made_in = (net.dims, net.name) if net else (len(given[0].statistics[0]), named)
    for one in given:
        if len(one.statistics[0]) != dims or one.made_in not in (None, made_in):
            raise ValueError(f"{one.name} holds statistics of {len(one.statistics[0])} features "
                             f"({one.made_in or 'it is not said which'}), which can't be compared with the {dims} of "
                             f"{made_in or given[0].name}")
    return made_in or f"{dims} features that no file names"


def save_statistics(path, found, net):
    """Write mu and sigma as ADM does, and the network that they are of; a kill leaves the old file or the new one."""
    with open(path + ".tmp", "wb") as file:
        np.savez(file, mu=found.mu.numpy(), sigma=found.sigma.numpy(), num=found.num, features=net.name)
    os.replace(path + ".tmp", path)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: images -> features -> statistics, in a stream


@torch.no_grad()
def measure(net, images, batch, keep, device, rank=0, processes=1):
    """See all images of a side() once, in batches dealt out to the processes, and keep no image.

    net: images (B, ch, H, W) uint8 -> features (B, net.dims), logits.  keep: whether to keep features for precision and recall.
    Returns on the main process num, mu (D,), sigma (D, D), features (n, D) or None, score (mean, deviation) or None, and
    read_as_label, the share of images that the network reads as their label, or None; on the others None.
    """
    N = images.num
    statistics = Statistics(net.dims, device)
    score = None if isinstance(net, DigitsClassifier) else InceptionScore(N, net.fc.out_features, device)
    right = torch.zeros((), dtype=torch.float64, device=device)
    kept, room = [torch.zeros(0, net.dims)], min(N, NEIGHBOUR_IMAGES)
    parts = common.chunks(slice(0, N), batch)

    def see(part):
        rows = torch.arange(part.start, part.stop)
        found = [net(piece.to(device)) for piece in images.read(part).split(NETWORK_BATCH)]
        features, logits = (torch.cat(tensors) for tensors in zip(*found))
        if not features.isfinite().all():
            raise ValueError(f"{net.name} gives features that are not finite for images {part.start} to {part.stop - 1} of "
                             f"{images.name}; its weights are damaged")
        statistics.add(features)
        if score:
            score.add(logits - net.fc.bias, rows.to(device))  # the published Inception Score leaves the bias out
        elif images.labels is not None:
            right.add_((logits.argmax(1).cpu() == images.labels[part]).sum())
        if keep:
            kept.append(features[(rows + 1) * room // N > rows * room // N].cpu())  # room of N images, evenly

    for first in common.tqdm(range(0, len(parts), processes), desc=images.name, disable=rank > 0, mininterval=5):
        common.on_every_rank(lambda: [see(part) for part in parts[first + rank:first + rank + 1]])
    for tensor in (*statistics.sums(), *(score.sums() if score else ()), right):
        common.all_reduce(tensor)
    features = common.all_gather(torch.cat(kept)) if keep else []
    if rank > 0:
        return None
    mu, sigma = statistics.mean_and_covariance()
    return SimpleNamespace(num=N, mu=mu, sigma=sigma, features=torch.cat(features) if keep else None,
                           score=score.result() if score else None,
                           read_as_label=right.item() / N if not score and images.labels is not None else None)


class Statistics:
    """Number, sum and sum of outer products of features (N, D), in float64: what their mean and covariance hang on.

    Sums from several processes add up to those of all images; only the rounding of float64 hangs on how images are shared
    out (1e-12 of the mean squares). Nothing is subtracted before squaring: features of Inception and of the classifier are not
    negative and their means not larger than a few deviations, which costs one or two of float64's sixteen digits.
    """

    def __init__(self, dims, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dims, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dims, dims, dtype=torch.float64, device=device)

    def add(self, features):
        features = features.double()  # (B, D)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def sums(self):
        return self.count, self.sum, self.outer

    def mean_and_covariance(self):
        """mu (D,) and the unbiased covariance sigma (D, D) (divided by N - 1, as in ADM), float64 on the CPU."""
        N, total, outer = (tensor.cpu() for tensor in self.sums())
        if N < 2:
            raise ValueError(f"a covariance needs at least two images, got {int(N)}")
        mu = total / N
        return mu, (outer - N * mu[:, None] * mu) / (N - 1)


def check_statistics(mu, sigma, name):
    """ValueError unless mu (D,) and sigma (D, D) are finite floating-point numbers."""
    mu, sigma = torch.as_tensor(mu), torch.as_tensor(sigma)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not mu.is_floating_point() or not sigma.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers of the shapes (D,) and (D, D), got {mu.dtype} {tuple(mu.shape)} "
                         f"and {sigma.dtype} {tuple(sigma.shape)}")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{name} must be finite, but there is NaN or infinity in them")


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance between two Gaussians, FID in the features of Inception (Heusel et al., 2017):

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    mu1, mu2: (D,), sigma1, sigma2: (D, D), symmetric, arrays or tensors of floating-point numbers; all is computed in float64.
    Returns a float >= 0, for singular covariances too. ValueError for NaN, infinity or shapes that don't fit.

    sigma1 sigma2 has the eigenvalues of A' sigma2 A where A A' = sigma1, which is symmetric: no square root of a general
    matrix, no complex numbers. Directions in which sigma1 is zero but for rounding are left out of A.
    """
    check_statistics(mu1, sigma1, "mu1 and sigma1")
    check_statistics(mu2, sigma2, "mu2 and sigma2")
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu1 and mu2 must have the same length, got {len(mu1)} and {len(mu2)}")
    values, vectors = torch.linalg.eigh((sigma1 + sigma1.T) / 2)  # ascending
    held = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    A = vectors[:, held] * values[held].sqrt()  # (D, rank)
    eigenvalues = torch.linalg.eigvalsh(A.T @ ((sigma2 + sigma2.T) / 2) @ A).clamp(min=0)  # (rank,)
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, distance.item())


class InceptionScore:
    """exp of the mean over images of KL(p(y|x) || p(y)), mean over SPLITS parts of the images (Salimans et al., 2016).

    As our images stand in the order of their classes, they are dealt to the parts at random, by torch-fidelity's draw. The sums
    of every part are all that is kept:  mean KL = mean of sum_y p(y|x) log p(y|x)  -  sum_y p(y) log p(y).
    """

    def __init__(self, num, classes, device="cpu"):
        splits = min(SPLITS, num)
        self.split = torch.empty(num, dtype=torch.int64, device=device)  # the part that every image belongs to
        place = torch.from_numpy(np.random.RandomState(2020).permutation(num)).to(device)
        self.split[place] = ((torch.arange(num, device=device) + 1) * splits - 1) // num
        self.count = self.split.bincount(minlength=splits).double()  # (splits,)
        self.p = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64, device=device)

    def add(self, logits, rows):
        """logits: (B, classes).  rows: (B,), which images these are, of num."""
        log_p = logits.double().log_softmax(1)
        self.p.index_add_(0, self.split[rows], log_p.exp())
        self.p_log_p.index_add_(0, self.split[rows], (log_p.exp() * log_p).sum(1))

    def sums(self):
        return self.p, self.p_log_p

    def result(self):
        """(mean, standard deviation) over the parts."""
        marginal = self.p / self.count[:, None]
        scores = (self.p_log_p / self.count + torch.special.entr(marginal).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(features, reference, k=NEIGHBOURS):
    """Precision: share of images that lie within the reach of the reference; recall: the reverse (Kynkaanniemi et al., 2019).

    features: (N, D), reference: (N', D).  An image reaches as far as its k-th nearest neighbour of its own side.
    ADM computes the same with distances in float16 where they are finite; here they are float32.
    """
    def distances(points, others):  # (1000, len(others)) at a time
        return (torch.cdist(part, others) for part in points.split(1000))

    def reach(points):
        return torch.cat([rows.topk(k + 1, largest=False).values[:, -1] for rows in distances(points, points)])  # 0 is itself

    def share_within(points, others):
        radii = reach(others)
        return torch.cat([(rows <= radii).any(1) for rows in distances(points, others)]).double().mean().item()

    if min(len(features), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side, got {len(features)} and {len(reference)}")
    return share_within(features, reference), share_within(reference, features)


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3 of 2015-12-05 (Szegedy et al., arXiv 1512.00567), with the names of the published weight file

POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),  # TensorFlow counts no padding
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}

# A block is a list of branches whose outputs are concatenated. A branch is a list of steps, one after the other: a pool, a
# convolution (name, channels, size, stride = 1), or a list of convolutions side by side.


def inception_a(pool_channels):  # 35 x 35
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            ["average", ("branch_pool", pool_channels, 1)]]


def inception_b():  # 35 x 35 -> 17 x 17
    return [[("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            ["halve"]]


def inception_c(c):  # 17 x 17
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
             ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            ["average", ("branch_pool", 192, 1)]]


def inception_d():  # 17 x 17 -> 8 x 8
    return [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
             ("branch7x7x3_4", 192, 3, 2)],
            ["halve"]]


def inception_e(pool):  # 8 x 8
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
            [pool, ("branch_pool", 192, 1)]]


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU; at stride 1 with padding that keeps the size, unless padded is False."""

    def __init__(self, in_channels, out_channels, size, stride=1, padded=True):
        super().__init__()
        padding = "same" if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class Block(nn.Module):
    """A block from its list of branches: (B, in_channels, H, W) -> (B, the branches' channels, H', W')."""

    def __init__(self, in_channels, branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = in_channels
            for step in branch:
                if isinstance(step, str):
                    continue
                side_by_side = step if isinstance(step, list) else [step]
                for name, *shape in side_by_side:
                    self.add_module(name, Convolution(channels, *shape))
                channels = side_by_side[0][1]

    def forward(self, x):
        return torch.cat([self.run(branch, x) for branch in self.branches], dim=1)

    def run(self, branch, x):
        for step in branch:
            if isinstance(step, str):
                x = POOLS[step](x)
            elif isinstance(step, tuple):
                x = getattr(self, step[0])(x)
            else:
                x = torch.cat([getattr(self, name)(x) for name, *_ in step], dim=1)
        return x


class InceptionV3(nn.Module):
    """The network that FID is defined by: images (B, 3, H, W) uint8 -> features (B, 2048), logits (B, 1008).

    Grey images (B, 1, H, W) are taken as RGB of three equal channels. ValueError for another shape or dtype.
    weights: tensors by the names of the published file; left out, random ones (and load_state_dict() takes the file's too).
    Always in eval mode. Differs from torchvision's in the pools and in 1008 classes. main() turns TF32 off, whose rounding would
    move an FID from one GPU to another.
    """

    name, dims = "Inception-v3 2015-12-05", 2048

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = Block(192, inception_a(32))
        self.Mixed_5c = Block(256, inception_a(64))
        self.Mixed_5d = Block(288, inception_a(64))
        self.Mixed_6a = Block(288, inception_b())
        self.Mixed_6b = Block(768, inception_c(128))
        self.Mixed_6c = Block(768, inception_c(160))
        self.Mixed_6d = Block(768, inception_c(160))
        self.Mixed_6e = Block(768, inception_c(192))
        self.Mixed_7a = Block(768, inception_d())
        self.Mixed_7b = Block(1280, inception_e("average"))
        self.Mixed_7c = Block(2048, inception_e("max"))  # max, as in the graph of 2015, unlike the paper; all FIDs use it
        self.fc = nn.Linear(2048, 1008)
        self.eval()
        if weights is not None:
            self.load(weights)

    def load(self, weights):
        """Take a published file's tensors; then, for speed, batch norm goes into the convolutions, and channels come last."""
        ours, weights = ({name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
                         for tensors in (self.state_dict(), weights))
        common.check_tensors(weights, {name: tensor.shape for name, tensor in ours.items()}, "the file")
        self.load_state_dict(weights)
        for module in self.modules():
            if isinstance(module, Convolution):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (B, 3, H, W), uint8 in 0..255, got {images.dtype} {tuple(images.shape)}")
        x = (resize(images.float(), 299) - 128) / 128
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = POOLS["halve"](x)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = POOLS["halve"](x)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))
        return features, self.fc(features)


def resize(images, size):
    """TensorFlow 1's bilinear resize, (B, ch, H, W) -> (B, ch, size, size), float32.

    Neither half-pixel centres nor antialiasing, unlike PyTorch's: the value at i is taken at i * (H / size), from the two
    pixels around it.
    """
    for axis in (3, 2):
        length = images.shape[axis]
        place = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        low = place.long()
        weight = (place - low).view(-1, *[1] * (3 - axis))
        left, right = images.index_select(axis, low), images.index_select(axis, (low + 1).clamp(max=length - 1))
        images = left + (right - left) * weight
    return images


def inception(args, device, rank):
    """Inception with the weights of --inception or the published ones; ValueError, one sentence, where there are none."""
    path = args.inception
    if path and not os.path.isfile(path):
        raise ValueError(f"there is no file {path}; --inception takes the one at {INCEPTION_URLS[0]}")

    def build():
        weights = read_weights(path) if path else download()
        try:
            return InceptionV3(weights).to(device)
        except (ValueError, AttributeError) as problem:  # AttributeError: no dict of names
            raise ValueError(f"{path or 'the downloaded file'} does not hold Inception's weights ({problem}); --inception takes "
                             f"the one at {INCEPTION_URLS[0]}")

    net = common.on_every_rank(lambda: build() if rank == 0 else None)  # the main process downloads
    return common.on_every_rank(lambda: net or build())


def read_weights(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch.load fails in many ways on a file that is no checkpoint
        raise ValueError(f"{path} can't be read as weights ({type(problem).__name__}); --inception takes the file at "
                         f"{INCEPTION_URLS[0]}")


def download():
    """The published weights out of torch's cache, where they are put with their hash checked."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    cached = {os.path.join(folder, os.path.basename(url)): url for url in INCEPTION_URLS}
    path = next((path for path in cached if os.path.isfile(path)), next(iter(cached)))
    try:
        return torch.hub.load_state_dict_from_url(cached[path], map_location="cpu", check_hash=True, weights_only=True,
                                                  progress=common.is_main())
    except Exception as problem:  # no network, no room, another hash, a damaged file
        raise ValueError(f"Inception's weights could not be had from {cached[path]} ({problem}); bring that file here by other "
                         f"means and put it at {path}, or name it by --inception")


# ---------------------------------------------------------------------------------------------------------------------
# The digits' own network


class DigitsClassifier(nn.Module):
    """A small convolutional network that reads digits: images (B, ch, 28, 28) uint8 -> features (B, 128), logits (B, 10)."""

    dims = 128

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * 49, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))  # share of the test digits that it reads
        self.eval()

    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2:] != (28, 28):
            raise ValueError(f"digits must be (B, 1, 28, 28), uint8 in 0..255, got {images.dtype} {tuple(images.shape)}")
        features = self.body(images[:, :1] / 127.5 - 1)
        return features, self.head(features)

    @property
    def name(self):
        """Says which weights these are: statistics in the features of others can't be compared."""
        digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in self.state_dict().values()))
        return f"digits classifier {digest.hexdigest()[:8]}"


def digits_classifier(args, device, rank):
    """The classifier, the same in all processes; trained at its first use (a minute on two cores) and kept."""
    path = args.classifier or os.path.join(os.path.dirname(args.ckpt or ""), CLASSIFIER)

    def prepare():
        net = DigitsClassifier()
        if rank == 0 and not load_classifier(net, path):
            print(f"training the classifier that digits FID is measured in, once; it is kept as {path}", flush=True)
            net = train_classifier(open_dataset("digits", "train", 28))
            test = open_dataset("digits", "test", 28)
            net.accuracy.fill_(share_read_as(net, test.images, test.labels))
            common.save_checkpoint({"kind": "digits classifier", "weights": net.state_dict()}, path)
        return net

    net = common.on_every_rank(prepare).to(device)
    if dist.is_initialized():
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, 0)
    return net


def load_classifier(net, path):
    """Whether net could be given the weights in a file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(checkpoint["weights"])
        return checkpoint["kind"] == "digits classifier"
    except Exception:  # none there, or not usable: it is trained anew
        return False


def train_classifier(digits, batch=200):
    """A DigitsClassifier trained on the training digits alone; the same weights at every call on the same
    machine with the same number of threads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitsClassifier().train()
        optimizer = torch.optim.AdamW(net.parameters())
        steps = CLASSIFIER_EPOCHS * len(digits) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for step in common.tqdm(range(steps), desc="classifier", mininterval=5):
            i = batch_indices(len(digits), batch, 0, step)
            loss = F.cross_entropy(net(digits.images[i])[1], digits.labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def share_read_as(net, images, labels):
    """Share of images (N, ch, 28, 28) uint8 that the classifier reads as their labels (N,)."""
    device = net.head.weight.device
    read = torch.cat([net(part.to(device))[1].argmax(1).cpu() for part in images.split(500)])
    return (read == labels).double().mean().item()


if __name__ == "__main__":
    common.run(main)
