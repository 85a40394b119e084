"""Table 6 (Sec. 4.3.2): the number of tokens M and the codebook size C against reconstruction and generation.

    python -m paper.table6_sweep                          trains a tokenizer and a denoiser of the digits for each pair

Prints a Markdown table of digits FIDs. The paper: larger M and C improve both up to a point, and degrade generation
beyond it. On ImageNet, each pair is a run of both trainings, measured by evaluate_fid.py.
"""
import time

from paper import variants
from paper.inputs import DEVICE, read_options
from support.hardware import init_distributed
from support.training import run

NUM_TOKENS = (8, 32, 64)         # M, with the C of BOTH
CODEBOOK_SIZES = (32, 128, 512)  # C, with the M of BOTH
BOTH = (32, 128)                 # (M, C) that both columns share
TOKENIZER = {"steps": 1200}      # of every tokenizer, else as the digits'
DENOISER = {"steps": 1600, "width": 64, "heads": 2}  # of every denoiser, likewise: 1.7 passes over the data
PAIRS = [
    ("--num_tokens", NUM_TOKENS, "[1, inf)", "values of M"),
    ("--codebook_sizes", CODEBOOK_SIZES, "[1, inf)", "values of C"),
]
OPTIONS = [*PAIRS, ("--num", 1000, "[2, inf)", "images to generate"), DEVICE]


def main(argv=None):
    args = read_options(OPTIONS, "table6_sweep", __doc__, argv)
    began = time.time()
    device, *_ = init_distributed(args.device, tf32=False)
    rows = []
    for M, C in pairs(args):
        tokenizer = trained_tokenizer(M, C, args)
        denoiser = variants.fsdd(tokenizer, device=args.device, **DENOISER)
        rows.append((M, C, variants.digits_fid(tokenizer, device),
                     variants.digits_fid(denoiser, device, num=args.num)))
    print("| M | C | digits FID, reconstructions | digits FID, samples |\n|---|---|---|---|")
    for M, C, reconstructions, samples in rows:
        print(f"| {M} | {C} | {reconstructions:.1f} | {samples:.1f} |")
    print(f"{(time.time() - began) / 60:.1f} min")


def pairs(args):
    """The pairs (M, C) of the table: every C with the M of BOTH, then every M with the C of BOTH, as in the paper."""
    return list(dict.fromkeys([(BOTH[0], C) for C in args.codebook_sizes] + [(M, BOTH[1]) for M in args.num_tokens]))


def trained_tokenizer(M, C, args):
    """The path of the tokenizer of a row, trained unless it exists. Table 3 takes it as well."""
    return variants.tokenizer(num_tokens=M, codebook_size=C, device=args.device, **TOKENIZER)


if __name__ == "__main__":
    run(main)
