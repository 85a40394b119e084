"""Table 6 (Sec. 4.3.2): the number of tokens M and the codebook size C against rFID and gFID.

    python -m paper.table6_sweep                                      the digits: trains a model for each pair
    python -m paper.table6_sweep --ckpt a/tokenizer.pt a/fsdd.pt b/tokenizer.pt b/fsdd.pt --ref FILE.npz

Prints a Markdown table, on the digits of digits FIDs. With --ckpt it measures the checkpoints that are given,
tokenizers and denoisers in any number, a row for each pair of M and C. The paper: more of both helps both up to a
point, and hurts beyond it.
"""
import time

import common
from paper import variants

NUM_TOKENS = (8, 16, 32, 64)              # M, with the C of BOTH
CODEBOOK_SIZES = (32, 64, 128, 256, 512)  # C, with the M of BOTH
BOTH = (32, 128)                          # (M, C) that both columns share
TOKENIZER = {"steps": 1200}               # of every tokenizer, else as the digits'
DENOISER = {"steps": 1600, "width": 64, "heads": 2}  # of every denoiser, likewise: 1.7 passes over the data
NUM = 1000       # images to generate
STEPS = 12       # steps from noise to data


def main(argv=None):
    args = parse(argv)
    began = time.time()
    device, rank, processes = common.init_distributed(args.device, tf32=False)
    try:
        if args.ckpt:
            rows = measure(args, device, rank, processes)
        else:
            rows = [train(M, C, args, device) for M, C in pairs(args.num_tokens, args.codebook_sizes)]
    except ValueError as problem:
        common.stop(str(problem))
    if rank == 0:
        print("| M | C | rFID | gFID |\n|---|---|---|---|")
        for M, C, rfid, gfid in rows:
            print(f"| {M} | {C} | {variants.number(rfid)} | {variants.number(gfid)} |")
        print(f"{(time.time() - began) / 60:.1f} min")


def pairs(num_tokens, codebook_sizes):
    """The pairs (M, C) of the table: every C with the M of BOTH, then every M with the C of BOTH, as in the paper."""
    if not (*num_tokens, *codebook_sizes):
        raise ValueError("--num_tokens and --codebook_sizes can't both be empty")
    return list(dict.fromkeys([(BOTH[0], C) for C in codebook_sizes] + [(M, BOTH[1]) for M in num_tokens]))


def add_pairs(parser):
    """The options that pairs() takes."""
    parser.add_argument("--num_tokens", type=int, nargs="*", default=NUM_TOKENS, help=f"values of M {NUM_TOKENS}")
    parser.add_argument("--codebook_sizes", type=int, nargs="*", default=CODEBOOK_SIZES,
                        help=f"values of C {CODEBOOK_SIZES}")


def train(M, C, args, device):
    """A row of the table, of models trained here."""
    tokenizer = variants.tokenizer(num_tokens=M, codebook_size=C, device=args.device, **TOKENIZER)
    denoiser = variants.fsdd(tokenizer, device=args.device, **DENOISER)
    gfid = variants.fid(denoiser, device, num=args.num or NUM, steps=args.steps or STEPS)
    return M, C, variants.fid(tokenizer, device), gfid


def measure(args, device, rank, processes):
    """The rows of the table, of the checkpoints in args.ckpt."""
    found = {}
    for path in args.ckpt:
        checkpoint = common.load_checkpoint(path, "python train_fsdd.py (or train_tokenizer.py)", "fsdd", "tokenizer")
        M, C = (checkpoint["model_config"][name] for name in ("num_tokens", "codebook_size"))
        options = {"data": args.data, "inception": args.inception}
        if checkpoint["kind"] == "fsdd":
            options |= {"ref": args.ref, "num": args.num, "steps": args.steps}
        if checkpoint["kind"] in found.setdefault((M, C), {}):
            raise ValueError(f"{path} is the second {checkpoint['kind']} checkpoint with M = {M} and C = {C}; "
                             "the table has room for one")
        found[M, C][checkpoint["kind"]] = variants.fid(path, device, rank, processes, **options)
    return [(*pair, row.get("tokenizer"), row.get("fsdd")) for pair, row in found.items()]


def parse(argv):
    parser = common.Parser(prog="python -m paper.table6_sweep", description=__doc__)
    parser.add_argument("--ckpt", nargs="+",
                        help="checkpoints of train_tokenizer.py and train_fsdd.py (the digits' are trained)")
    add_pairs(parser)
    variants.add_options(parser, num=NUM)
    parser.add_argument("--steps", type=int, help=f"from noise to data ({STEPS}, with --ckpt the checkpoint's)")
    return variants.check_options(parser, parser.parse_args(argv))


if __name__ == "__main__":
    common.run(main)
