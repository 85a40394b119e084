"""Checks that the tokenizer.pt and fsdd.pt here, made by the README's second command, are good. Exits non-zero if not.

The bounds are those that a reader may count on; the README has the numbers that were reached. Processors without
bfloat16 instructions have bounds of their own for time.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import generation  # noqa: E402
import train_tokenizer  # noqa: E402
from data import open_dataset  # noqa: E402
from dual_transform import tokens_to_counts  # noqa: E402
from fsdd import refine  # noqa: E402
from published.classifier import open_classifier, share_classified_as  # noqa: E402
from support.hardware import autocast, fast_bf16  # noqa: E402
from support.pictures import to_uint8  # noqa: E402
from support.seeds import generator  # noqa: E402

failed = []
TRAINING_SECONDS, GENERATION_SECONDS = (540, 2.5) if fast_bf16(torch.device("cpu")) else (1320, 6)
DIGITS_FID = 45


def check(name, value, holds, bound):
    print(f"{'ok  ' if holds else 'FAIL'} {name}: {value} (must be {bound})", flush=True)
    if not holds:
        failed.append(name)


def closest(rows, others):
    """The L1 distance of every count vector in rows (n, C) to the nearest one in others (N, C)."""
    return torch.cat([torch.cdist(part.float(), others.float(), p=1).amin(1) for part in rows.split(250)])


def spread(images, labels):
    """Mean over classes of the root mean squared distance of a class's pixels, in [-1, 1], from their mean."""
    return np.mean([(images[labels == c] / 127.5 - 1).std(0).square().mean().sqrt().item() for c in range(10)])


def check_command(command):
    """Run the README's second command; its time and memory."""
    began = time.time()
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)
    seconds = time.time() - began
    check("time of the training command", f"{seconds:.0f} s", seconds <= TRAINING_SECONDS, f"<= {TRAINING_SECONDS} s")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20  # of the largest process; KiB on Linux
    check("peak memory of the training command", f"{peak:.2f} GiB", peak <= 4, "<= 4 GiB")


def check_tokenizer(tokenizer, test):
    """Reconstruction, use of the codebook, richness of the sets, order. Returns the test digits' tokens (N, M)."""
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    check("size of the sets", f"M = {M}, C = {C}", M >= 16 and C >= 64, "M >= 16, C >= 64")
    mse, in_use, _ = train_tokenizer.evaluate(tokenizer, test, torch.device("cpu"))
    check("mean squared error on test digits", f"{mse:.4f}", mse <= 0.05, "<= 0.05")
    check("codes in use on test digits", f"{in_use:.1%}", in_use >= 0.9, ">= 90 %")
    tokens = encode(tokenizer, test)
    rich = ((tokens_to_counts(tokens, C) > 0).sum(1) >= M / 2).double().mean().item()
    check("test digits with at least M / 2 distinct codes", f"{rich:.1%}", rich > 0.5, "> 50 %")
    order = torch.rand(tokens.shape, generator=generator("cpu", "order", 0)).argsort(1)
    moved = (tokenizer.decode(tokens[:500]) - tokenizer.decode(tokens.gather(1, order)[:500])).abs().max().item()
    check("largest pixel change by the order of tokens", f"{moved:.1e}", moved < 1e-5, "< 1e-5")
    return tokens


def encode(tokenizer, digits):
    return torch.cat([tokenizer.encode(part / 127.5 - 1) for part in digits.images.split(500)])


def check_samples(net, tokenizer, tokens, test):
    """1000 samples by sample.py: classified as their label, and varied."""
    reconstructed = to_uint8(torch.cat([tokenizer.decode(part) for part in tokens.split(500)]))
    accuracy = share_classified_as(net, reconstructed, test.labels)
    print(f"     reconstructed test digits classified as their label: {accuracy:.2%}")
    subprocess.run([sys.executable, "sample.py", "--ckpt=fsdd.pt", "--num=1000", "--out=check.npz", "--seed=1"],
                   check=True)
    with np.load("check.npz") as file:
        images, labels = torch.from_numpy(file["arr_0"])[..., 0][:, None], torch.from_numpy(file["arr_1"])
    os.remove("check.npz")
    accuracy = share_classified_as(net, images, labels)
    check("samples classified as their label", f"{accuracy:.1%}", accuracy >= 0.97, ">= 97 %")
    ours, theirs = spread(images, labels), spread(reconstructed, test.labels)
    print(f"     spread within a class: samples {ours:.3f}, reconstructed test digits {theirs:.3f}")
    check("spread of samples against that of test digits", f"{ours / theirs:.3f}", ours / theirs >= 0.85, ">= 0.85")
    distinct = len({image.tobytes() for image in images.numpy()}) / len(images)
    check("distinct samples", f"{distinct:.1%}", distinct >= 0.95, ">= 95 %")


def check_classifier():
    """The classifier that evaluate_fid.py trains, anew."""
    if os.path.exists("digits_classifier.pt"):
        os.remove("digits_classifier.pt")
    net = open_classifier("digits", "digits_classifier.pt", torch.device("cpu"), 0)
    accuracy = net.accuracy.item()
    check("classifier on real test digits", f"{accuracy:.2%}", accuracy >= 0.99, ">= 99 %")
    return net


def measure(ckpt, *options):
    """What evaluate_fid.py says of a checkpoint, a dict."""
    subprocess.run([sys.executable, "evaluate_fid.py", f"--ckpt={ckpt}", "--json=check.json", *options], check=True)
    with open("check.json") as file:
        found = json.load(file)
    os.remove("check.json")
    return found


def check_fid():
    """evaluate_fid.py on both checkpoints with its defaults; then with other numbers of steps."""
    fid = measure("tokenizer.pt")["digits_fid"]
    check("digits FID of tokenizer.pt", f"{fid:.1f}", fid <= 35, "<= 35")
    found = measure("fsdd.pt")
    fid, recall, share = (found[name] for name in ("digits_fid", "digits_recall", "classified_as_label"))
    check("digits FID of fsdd.pt", f"{fid:.1f}", fid <= DIGITS_FID, f"<= {DIGITS_FID}")
    check("recall of fsdd.pt", f"{recall:.3f}", recall >= 0.15, ">= 0.15")
    check("2000 samples classified as their label", f"{share:.1%}", share >= 0.98, ">= 98 %")
    fids = {steps: measure("fsdd.pt", f"--steps={steps}", "--num=1000")["digits_fid"] for steps in (6, 12, 25, 50)}
    worse = max(fids[more] - fids[fewer] for fewer in fids for more in fids if more > fewer)
    check("digits FID in " + ", ".join(f"{steps} steps {fid:.1f}" for steps, fid in fids.items())
          + "; more steps are worse by at most", f"{worse:.1f}", worse <= 3, "<= 3, the spread of seeds")
    fid = measure("digits.pt", "--num=1000")["digits_fid"]
    check("digits FID of the repository's digits.pt", f"{fid:.1f}", fid <= DIGITS_FID, f"<= {DIGITS_FID}")


def check_generation(denoiser, tokenizer, settings, tokens, train):
    """Time and sums; and no more samples may be a training digit's set than test digits are by chance."""
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    finished = subprocess.run([sys.executable, "sample.py", "--ckpt=fsdd.pt", "--out=check.png"], check=True,
                              capture_output=True, text=True)
    os.remove("check.png")
    seconds = float(finished.stdout.split(" images in ")[1].split(" s")[0])
    check("100 digits by sample.py, decoding included", f"{seconds} s", seconds <= GENERATION_SECONDS,
          f"<= {GENERATION_SECONDS} s")
    labels = torch.arange(10).repeat_interleave(10)
    with autocast(torch.device("cpu"), "auto"):
        arguments = generation.refine_arguments(settings) | {"generator": generator("cpu", "sample", 2)}
        states = list(refine(denoiser, labels, **arguments))
    sums = all((x.sum(1) == M).all() and x.min() >= 0 for x in states)
    check("every state of generation sums to M", sums, sums, "True")
    known = tokens_to_counts(encode(tokenizer, train), C)
    near, chance = closest(states[-1][:, :C], known), closest(tokens_to_counts(tokens[:1000], C), known)
    print(f"     L1 distance to the nearest training set of tokens: samples {near.mean():.1f}, "
          f"test digits {chance.mean():.1f}")
    copies, by_chance = ((distance == 0).double().mean().item() for distance in (near, chance))
    check("samples that are a training digit's set", f"{copies:.1%}", copies <= by_chance + 0.02,
          f"<= test digits' {by_chance:.1%} + 2 %")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", help="run this first, and look at its time and memory too")
    command = parser.parse_args().command
    if command:
        check_command(command)
    train, test = open_dataset("digits", "train", 28), open_dataset("digits", "test", 28)
    denoiser, tokenizer, checkpoint = generation.load("fsdd.pt", torch.device("cpu"))
    tokens = check_tokenizer(tokenizer, test)
    check_samples(check_classifier(), tokenizer, tokens, test)
    check_generation(denoiser, tokenizer, checkpoint["generation"], tokens, train)
    check_fid()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
