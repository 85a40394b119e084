"""Metrics of images (Sec. 4.1): FID, Inception Score, precision and recall.

    python evaluate_fid.py --ckpt fsdd.pt                            generate images and measure them: gFID
    python evaluate_fid.py --ckpt tokenizer.pt                       reconstruct the validation images: rFID
    python evaluate_fid.py --images samples.npz --ref stats.npz      measure existing images; any two of images,
                                                                     statistics and checkpoints can be compared
    torchrun --nproc_per_node=8 evaluate_fid.py --ckpt fsdd.pt --ref VIRTUAL_imagenet256_labeled.npz     as in the paper

Features are those of Inception-v3 of 2015-12-05 (published/inception.py), as in ADM's evaluation; its weights are
downloaded, or given by --inception. The embedded digits and emoji need no download: their distance is computed from the
features of a small classifier (published/classifier.py) and called "digits FID" or "emoji FID". It cannot be compared
with an FID of Inception.
"""
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import sample
from data import EMBEDDED, open_dataset
from data.evaluation_inputs import Images, check_statistics, open_images
from published.classifier import open_classifier
from published.inception import InceptionV3, load_inception
from support.command_line import Parser, parse_as, stop
from support.distributed import all_gather, all_reduce, chunks
from support.files import atomic_open, check_outputs, load_checkpoint, write_json
from support.hardware import init_distributed
from support.training import run
from tokenizer import SetTokenizer

# The options of generation, --batch, --seed, --device and --bf16 are those of sample.add_generation_options().
NUM = 50000               # images that an fsdd checkpoint generates, spread evenly over the classes, as in the papers
NUM_EMBEDDED = 2000       # the same for digits and emoji; emoji have the training images' shares of classes
NETWORK_BATCH = 50        # images in a forward pass of Inception: about 1 GiB
SPLITS = 10               # parts of the images; the Inception Score is the mean over them
NEIGHBOURS = 3            # k of precision and recall
NEIGHBOUR_IMAGES = 50000  # at most so many images, spread evenly, for precision and recall; their features are kept
NEEDS = ("this takes two files: Inception's weights, which are downloaded or given by --inception, and a reference, "
         "--ref: for gFID on ImageNet ADM's VIRTUAL_imagenet256_labeled.npz (github.com/openai/guided-diffusion, "
         "evaluations), otherwise statistics that --save_stats wrote, images as .npz or folder, or a checkpoint")


def main(argv=None):
    args = parse(argv)
    device, rank, world_size = init_distributed(args.device, tf32=False)  # TF32 differs from one GPU to another
    began = time.monotonic()
    try:
        results, found = measure_and_compare(args, device, rank, world_size)
    except ValueError as problem:
        stop(str(problem))
    if rank > 0:
        return
    for name, value in results.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"measured in {(time.monotonic() - began) / 60:.1f} min", flush=True)
    if args.json:
        write_json(results, args.json)
    if args.save_stats:
        with atomic_open(args.save_stats) as file:  # as ADM's; num, size and features are ours
            np.savez(file, mu=found.mu.numpy(), sigma=found.sigma.numpy(), num=found.num, size=found.size,
                     features=results["features"])


def evaluate(args, device, rank=0, world_size=1):
    """The numbers that a command line asks for, {name: value}, on rank 0; None on the others.

    args: of parse(). ValueError if something is missing or does not fit.
    """
    return measure_and_compare(args, device, rank, world_size)[0]


def measure_and_compare(args, device, rank, world_size):
    """The numbers of evaluate(), and what measure() returns for the images, None if these are statistics."""
    images, reference, data = open_inputs(args, device)
    both = bool(images.read and reference and reference.read)  # precision and recall compare images with images
    measured = bool(reference and reference.read and (both or not reference.statistics))
    net = network(args, data, device, rank) if images.read or measured else None  # not for statistics
    features = check_features(images, reference, net)
    against = measure(net, reference, args.batch, both, device, rank, world_size) if measured else None
    found = measure(net, images, args.batch, both, device, rank, world_size) if images.read else None
    if rank > 0:
        return None, None
    results = compare(features, images, found, reference, against, device)
    if found and found.classified_as_label is not None:
        results |= {"classified_as_label": found.classified_as_label,
                    f"test_{data}_classified_as_label": net.accuracy.item()}
    return results, found


def network(args, data, device, rank):
    """The network whose features are compared: Inception-v3, or for embedded images, without --inception, their
    classifier."""
    if data in EMBEDDED and not args.inception:
        path = args.classifier or os.path.join(os.path.dirname(args.ckpt or ""), f"{data}_classifier.pt")
        return open_classifier(data, path, device, rank)
    try:  # rank 0 downloads the weights, the others then read the file
        net = load_inception(args.inception, progress=True) if rank == 0 else None
        all_gather(None)
        return (net or load_inception(args.inception)).to(device)
    except ValueError as problem:
        raise ValueError(f"{problem}; --inception names the file") from None


def parse(argv):
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", help="fsdd.pt: generates images and measures them; tokenizer.pt: reconstructs images")
    source.add_argument("--images", help="instead of --ckpt: a folder of images, or an .npz of images, arr_0 uint8 "
                        "(N, H, W, 3), or of their statistics, mu and sigma")
    parser.add_argument("--ref", default="", help="what to compare with: anything that --images takes, or a checkpoint "
                        "(else, for tokenizer.pt the images themselves; for digits or emoji the training images)")
    parser.add_argument("--data", help="digits, emoji, or a folder with train/ and val/ (what the checkpoint was "
                        "trained on)")
    parser.add_argument("--num", "--num_images", type=parse_as(int, "[1, inf)"), help="images to generate "
                        f"({NUM}, digits and emoji {NUM_EMBEDDED}) or to reconstruct (all); under torchrun write "
                        "--num_images")
    parser.add_argument("--image_size", type=parse_as(int, "[1, inf)"), help="crop images in folders, as ADM does")
    parser.add_argument("--inception", default="", help="file of Inception's weights (downloaded to torch's cache)")
    parser.add_argument("--classifier", help="file of the classifier of digits or emoji, trained if it does not exist "
                        "(digits_classifier.pt or emoji_classifier.pt in the checkpoint's folder)")
    parser.add_argument("--save_stats", help="write mu and sigma of the measured images to this .npz, for --ref")
    parser.add_argument("--json", help="write the results to this file")
    sample.add_generation_options(parser)
    args = parser.parse_args(argv)
    if args.num and not (args.ckpt or args.ref.endswith(".pt")):
        parser.error("--num needs a checkpoint; --images are all measured")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save_stats must end in .npz, got {args.save_stats}")
    inputs = (args.ckpt, args.images, args.ref, args.inception, args.classifier)
    check_outputs(args.save_stats, args.json, inputs=inputs)
    return args


def compare(features, images, found, reference, against, device):
    """The numbers, {name: value}, of measured images and, where there is a reference, of their distance to it.

    features: the name of the features.  found, against: what measure() returns for images and reference, None for one
    of which only statistics are known. Statistics from a file take precedence over those of the images in the same
    file, as with ADM's references.
    """
    data, classifier, _ = features.partition(" classifier ")
    prefix = data + "_" if classifier else ""  # not to be confused with Inception's
    results = {"images": images.name} | ({"num_images": found.num} if found else {}) | {"features": features}
    if reference:
        results["reference"] = reference.name
        statistics, sizes = [], []
        for source, measured in ((images, found), (reference, against)):
            mu, sigma = source.statistics or (measured.mu, measured.sigma)
            num = source.statistics_num if source.statistics else measured.num
            sizes.append(source.statistics_size if source.statistics else measured.size)
            statistics += [mu, sigma]
            if num and num <= len(mu):  # N images span N - 1 dimensions
                print(f"warning: {num} images for {len(mu)} features: their covariance is singular and FID is "
                      "too large; compare it only with an FID of as many images", file=sys.stderr)
        if all(sizes) and sizes[0] != sizes[1]:
            print(f"warning: the images have {sizes[0]} pixels, those of the reference {sizes[1]}; FID compares images "
                  "of one size", file=sys.stderr)
        results[prefix + "fid"] = frechet_distance(*statistics)
    if found and found.score:
        results["inception_score"], results["inception_score_std"] = found.score
    if found and against and min(found.num, against.num) > NEIGHBOURS:
        precision, recall = precision_recall(found.features.to(device), against.features.to(device))
        results |= {prefix + "precision": precision, prefix + "recall": recall}
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The images to measure and the reference: from files (data/evaluation_inputs.py), or made by checkpoints


def open_inputs(args, device):
    """(the Images to measure, the Images to compare with or None, the data: a name, a folder or None)."""
    images, reference, data = open_source(args.ckpt or args.images, args, device)
    if images.read is None and args.save_stats:
        raise ValueError(f"{args.images} holds statistics already; --save_stats needs images")
    if args.ref:
        reference, _, trained_on = open_source(args.ref, args, device)
        data = data or trained_on
    elif reference is None and data in EMBEDDED:
        reference = training_images(data)  # as ADM's statistics are of the training set
    if not (reference or args.save_stats):
        raise ValueError(f"there is nothing to compare {images.name} with; {NEEDS}")
    for source in filter(None, (images, reference)):  # before any is generated
        if not source.statistics and source.num < 2:
            raise ValueError(f"a covariance needs at least two images, got {source.num} ({source.name})")
    return images, reference, data


def training_images(data):
    """The training images of an embedded data set."""
    dataset = open_dataset(data, "train", None)
    return Images(f"the training {data}", len(dataset), lambda part: dataset.images[part])


def open_source(path, args, device):
    """(the Images of a folder, an .npz or a checkpoint; the originals of reconstructions, otherwise None; the data)."""
    if not (path == args.ckpt or path.endswith(".pt")):
        return open_images(path, args.image_size), None, args.data
    checkpoint = load_checkpoint(path, "python train_fsdd.py (or train_tokenizer.py)", "fsdd", "tokenizer")
    data = args.data or checkpoint.get("config", {}).get("data")  # what it was trained on
    if checkpoint["kind"] == "fsdd":
        return generated(path, checkpoint, args, data, device), None, data
    return *reconstructed(path, checkpoint, args, data, device), data


def generated(path, checkpoint, args, data, device):
    """Images generated by a checkpoint of train_fsdd.py, the same for any number of ranks."""
    denoiser, tokenizer = sample.models(checkpoint, device)
    names = checkpoint["class_names"]
    num = args.num or (NUM_EMBEDDED if data in EMBEDDED else NUM)
    labels = sample.choose_labels(None, num, names, len(names))
    if data == "emoji":  # whose classes differ in size
        emoji = open_dataset(data, "train", None)
        if emoji.class_names == names:
            labels = emoji.labels.sort().values[torch.arange(num) * len(emoji) // num]
    refine = sample.make_sampler(sample.generation_settings(checkpoint["generation"], args))

    def read(part):  # measure() reads slices of args.batch images, the chunks that sample.py generates
        return sample.draw_images(denoiser, tokenizer, labels[part], refine, part.start // args.batch, args)[-1]

    return Images(f"generated by {path}", len(labels), read, labels)


def reconstructed(path, checkpoint, args, data, device):
    """Reconstructions of the validation images by a checkpoint of train_tokenizer.py, and these images."""
    tokenizer, dataset = open_tokenizer(path, checkpoint, data, device)
    chosen = evenly(len(dataset), args.num)

    def read(part):
        return dataset.__getitems__([(i, 0) for i in chosen[part].tolist()])[0]

    def reconstruct(part):
        return sample.decode(tokenizer, tokenizer.encode(read(part).to(device) / 127.5 - 1))

    return (Images(f"reconstructed by {path}", len(chosen), reconstruct, dataset.labels[chosen]),
            Images(f"the validation images of {data}", len(chosen), read))


def open_tokenizer(path, checkpoint, data, device, model_class=SetTokenizer):
    """The tokenizer of a checkpoint, and the validation images of data. ValueError if these do not fit together.

    model_class: the class of this kind of checkpoint (paper/layouts.py has others).
    """
    if data is None:
        raise ValueError(f"{path} does not say what it was trained on; give the images as --data: digits, emoji, or a "
                         "folder that holds train/ and val/")
    tokenizer = sample.load_tokenizer(checkpoint, device, model_class)
    dataset = open_dataset(data, "test", tokenizer.image_size)
    if dataset.channels != tokenizer.channels:
        raise ValueError(f"the images of {data} have {dataset.channels} channels, those of {path} "
                         f"{tokenizer.channels}; give the --data that it was trained on")
    return tokenizer, dataset


def evenly(total, num):
    """The indices (n,) int64 of num images, evenly spread over total; of all if num is None or larger."""
    num = min(num or total, total)
    return torch.arange(num) * total // num


def check_features(images, reference, net):
    """The name of the features that are compared; ValueError for statistics of different features."""
    sources = [source for source in (images, reference) if source and source.statistics]
    named = next((source.features for source in sources if source.features), None)
    dims, features = (net.dims, net.name) if net else (len(sources[0].statistics[0]), named)
    for source in sources:
        if len(source.statistics[0]) != dims or source.features not in (None, features):
            raise ValueError(f"{source.name} holds statistics of {len(source.statistics[0])} features "
                             f"({source.features or 'of a network that it does not name'}), which can't be compared "
                             f"with the {dims} of {features or sources[0].name}")
    return features or f"{dims} features that no file names"


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: images -> features -> statistics, batch by batch


@torch.no_grad()
def measure(net, images, batch, keep, device, rank=0, world_size=1):
    """Pass all Images through net, once, in batches divided among the ranks. No image is kept.

    net: images (B, ch, H, W) uint8 -> features (B, net.dims), logits.  keep: keep features for precision and recall.
    Returns on rank 0 num, size (a text), mu (D,), sigma (D, D), the features that are kept (n, D), score (mean,
    deviation) or None, and classified_as_label, the share of images that net classifies as their label, or None; on the
    others None.
    """
    N = images.num
    statistics = Statistics(net.dims, device)
    score = InceptionScore(N, net.fc.out_features, device) if isinstance(net, InceptionV3) else None
    right = torch.zeros((), dtype=torch.float64, device=device)
    kept, room = [torch.zeros(0, net.dims)], min(N, NEIGHBOUR_IMAGES)
    parts = chunks(slice(0, N), batch)

    size = ""

    def measure_slice(part):
        nonlocal size
        rows, pixels = torch.arange(part.start, part.stop), images.read(part)
        size = f"{pixels.shape[3]} x {pixels.shape[2]}"
        found = [net(piece.to(device)) for piece in pixels.split(NETWORK_BATCH)]
        features, logits = (torch.cat(tensors) for tensors in zip(*found))
        if not features.isfinite().all():
            raise ValueError(f"{net.name} gives features that are not finite for images {part.start} to "
                             f"{part.stop - 1} of {images.name}; its weights are damaged")
        statistics.add(features)
        if score:
            score.add(logits - net.fc.bias, rows.to(device))  # the published Inception Score leaves the bias out
        elif images.labels is not None:
            right.add_((logits.argmax(1).cpu() == images.labels[part]).sum())
        if keep:
            kept.append(features[(rows + 1) * room // N > rows * room // N].cpu())  # room of the N images, evenly

    for first in tqdm(range(0, len(parts), world_size), desc=images.name, disable=rank > 0, mininterval=5):
        for part in parts[first + rank:first + rank + 1]:  # none for some ranks in the last round
            measure_slice(part)
    for tensor in (*statistics.sums(), *(score.sums() if score else ()), right):
        all_reduce(tensor)
    kept = all_gather(torch.cat(kept))
    if rank > 0:
        return None
    mu, sigma = statistics.mean_and_covariance()
    return SimpleNamespace(num=N, size=size, mu=mu, sigma=sigma, features=torch.cat(kept),
                           score=score.result() if score else None,
                           classified_as_label=right.item() / N if not score and images.labels is not None else None)


class Statistics:
    """Number, sum and sum of outer products of features (N, D), in float64, which give their mean and covariance.

    The sums of all ranks add up to those of all images; only the rounding of float64 depends on how images are divided
    among ranks (1e-12 of the mean squares). Nothing is subtracted before squaring: features of Inception and of the
    classifier are not negative and their means at most a few deviations, which costs one or two of float64's sixteen
    digits.
    """

    def __init__(self, dims, device="cpu"):
        self.count, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64, device=device)
                                            for shape in ((), (dims,), (dims, dims)))

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
        mu = total / N
        return mu, (outer - N * mu[:, None] * mu) / (N - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance between two Gaussians, FID in the features of Inception (Heusel et al., 2017):

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    mu1, mu2: (D,), sigma1, sigma2: (D, D), symmetric; arrays or tensors of floating-point numbers. Computed in float64.
    Returns a float >= 0, for singular covariances too. ValueError for NaN, infinity or shapes that don't fit.

    sigma1 sigma2 has the eigenvalues of A' sigma2 A where A A' = sigma1, which is symmetric: no square root of a
    general matrix, no complex numbers. Directions in which sigma1 is zero up to rounding are left out of A.
    """
    check_statistics(mu1, sigma1, "mu1 and sigma1")
    check_statistics(mu2, sigma2, "mu2 and sigma2")
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64, device="cpu")
                                for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu1 and mu2 must have the same length, got {len(mu1)} and {len(mu2)}")
    values, vectors = torch.linalg.eigh((sigma1 + sigma1.T) / 2)  # ascending
    positive = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    A = vectors[:, positive] * values[positive].sqrt()  # (D, rank)
    eigenvalues = torch.linalg.eigvalsh(A.T @ ((sigma2 + sigma2.T) / 2) @ A).clamp(min=0)  # (rank,)
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, distance.item())


class InceptionScore:
    """exp of the mean over images of KL(p(y|x) || p(y)), mean over SPLITS parts of the images (Salimans et al., 2016).

    As our images come in the order of their classes, they are assigned to the parts at random, with torch-fidelity's
    seed. Only sums over each part are kept:  mean KL = mean of sum_y p(y|x) log p(y|x)  -  sum_y p(y) log p(y)
    """

    def __init__(self, num, classes, device="cpu"):
        splits = min(SPLITS, num)
        self.split = torch.empty(num, dtype=torch.int64, device=device)  # the part that every image belongs to
        order = torch.from_numpy(np.random.RandomState(2020).permutation(num)).to(device)
        self.split[order] = ((torch.arange(num, device=device) + 1) * splits - 1) // num
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
    """Precision: the share of images on the manifold of the reference; recall: the reverse (Kynkaanniemi et al., 2019).

    The manifold of a set is the union of balls around its points, each as large as the distance to the point's k-th
    nearest neighbour in the set.  features: (N, D), reference: (N', D), N and N' more than k.
    ADM computes the distances in float16 where they are finite; here they are float32.
    """
    def share_within(points, others):
        # Allocated first, as small tensors kept between the large ones of the loop would fragment the memory
        radii = torch.empty(len(others), device=others.device)
        for part in chunks(slice(0, len(others)), 1000):  # the nearest of all, at distance 0, is the point itself
            radii[part] = torch.cdist(others[part], others).topk(k + 1, largest=False).values[:, -1]
        return sum((torch.cdist(x, others) <= radii).any(1).sum().item() for x in points.split(1000)) / len(points)

    return share_within(features, reference), share_within(reference, features)


if __name__ == "__main__":
    run(main)
