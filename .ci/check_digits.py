"""Checks that the tokenizer.pt and fsdd.pt here, made by the README's second command, and the repository's digits.pt
are good. Exits non-zero if not.

The bounds are those that a reader may count on; the README has the numbers that were reached. Processors without
bfloat16 instructions have bounds of their own for time.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import sample  # noqa: E402
import train_tokenizer  # noqa: E402
from data import open_dataset  # noqa: E402
from support.hardware import autocast, fast_bf16  # noqa: E402
from support.seeds import generator  # noqa: E402

CPU = torch.device("cpu")
TRAINING_SECONDS, GENERATION_SECONDS = (720, 14) if fast_bf16(CPU) else (1320, 25)
failed = []


def check(name, value, holds, bound):
    print(f"{'ok  ' if holds else 'FAIL'} {name}: {value} (must be {bound})", flush=True)
    if not holds:
        failed.append(name)


def check_command(command):
    """Run the README's second command and look at its time."""
    began = time.time()
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)
    seconds = time.time() - began
    check("time of the training command", f"{seconds:.0f} s", seconds <= TRAINING_SECONDS, f"<= {TRAINING_SECONDS} s")


def check_generation(denoiser, tokenizer, settings):
    """The time of 100 digits, and the sum of every state."""
    refine = sample.make_sampler(settings)
    began = time.time()
    with autocast(CPU, "auto"):
        states = list(refine(denoiser, torch.arange(100) // 10, generator=generator("cpu", "check")))
    seconds = time.time() - began
    check("100 digits", f"{seconds:.1f} s", seconds <= GENERATION_SECONDS, f"<= {GENERATION_SECONDS} s")
    sums = all((x.sum(1) == tokenizer.num_tokens).all() and x.min() >= 0 for x in states)
    check("every state of generation sums to M", sums, sums, "True")


def measure(ckpt):
    """What evaluate_fid.py says of a checkpoint, a dict."""
    subprocess.run([sys.executable, "evaluate_fid.py", f"--ckpt={ckpt}", "--json=check.json"], check=True)
    with open("check.json") as file:
        found = json.load(file)
    os.remove("check.json")
    return found


def check_fid():
    """evaluate_fid.py on the three checkpoints."""
    found = measure("tokenizer.pt")
    accuracy, fid = found["test_digits_classified_as_label"], found["digits_fid"]
    check("classifier on real test digits", f"{accuracy:.2%}", accuracy >= 0.99, ">= 99 %")
    check("digits FID of tokenizer.pt", f"{fid:.1f}", fid <= 25, "<= 25")
    for ckpt in ("fsdd.pt", "digits.pt"):
        found = measure(ckpt)
        fid, recall, share = (found[name] for name in ("digits_fid", "digits_recall", "classified_as_label"))
        check(f"digits FID of {ckpt}", f"{fid:.1f}", fid <= 40, "<= 40")
        check(f"recall of {ckpt}", f"{recall:.3f}", recall >= 0.3, ">= 0.3")
        check(f"samples of {ckpt} classified as their label", f"{share:.1%}", share >= 0.97, ">= 97 %")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", help="run this first, and look at its time too")
    command = parser.parse_args().command
    if command:
        check_command(command)
    denoiser, tokenizer, checkpoint = sample.load("fsdd.pt", CPU)
    error, in_use, _ = train_tokenizer.evaluate(tokenizer, open_dataset("digits", "test", 28), CPU)
    check("squared error on test digits", f"{error:.4f}", error <= 0.05, "<= 0.05")
    check("codes in use on test digits", f"{in_use:.1%}", in_use >= 0.9, ">= 90 %")
    check_generation(denoiser, tokenizer, checkpoint["generation"])
    check_fid()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
