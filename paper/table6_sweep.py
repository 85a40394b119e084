"""Table 6 (Sec. 4.3.2): the number of tokens M and the codebook size C against rFID and gFID.

    python -m paper.table6_sweep                                      the digits: trains models for each pair
    python -m paper.table6_sweep --ckpt a/tokenizer.pt a/fsdd.pt b/tokenizer.pt b/fsdd.pt --ref FILE.npz

Prints a Markdown table; for the digits, of digits FIDs. With --ckpt it measures the checkpoints that are given, any
number of tokenizers and denoisers, a row for each pair of M and C. The paper: larger M and C improve both up to a
point, and degrade generation beyond it.
"""
import time

from paper import variants
from paper.inputs import DATA, DEVICE, INCEPTION, NUM, REF, read_options
from support.command_line import stop
from support.files import load_checkpoint
from support.hardware import init_distributed
from support.training import run

NUM_TOKENS = (8, 16, 32, 64)              # M, with the C of BOTH
CODEBOOK_SIZES = (32, 64, 128, 256, 512)  # C, with the M of BOTH
BOTH = (32, 128)                          # (M, C) that both columns share
TOKENIZER = {"steps": 1200}               # of every tokenizer, else as the digits'
DENOISER = {"steps": 1600, "width": 64, "heads": 2}  # of every denoiser, likewise: 1.7 passes over the data
NUM_SAMPLES, STEPS = 1000, 12             # images to generate, and sampling steps
PAIRS = [
    ("--num_tokens", NUM_TOKENS, "[1, inf)", "values of M"),
    ("--codebook_sizes", CODEBOOK_SIZES, "[1, inf)", "values of C"),
]
OPTIONS = [
    ("--ckpt", (), "", "checkpoints of train_tokenizer.py and train_fsdd.py (those of the digits are trained)"),
    *PAIRS,
    (NUM, None, "[2, inf)", f"images to generate (digits: {NUM_SAMPLES})"),
    ("--steps", None, "[1, inf)", f"sampling steps ({STEPS}, with --ckpt the checkpoint's)"),
    DATA, REF, INCEPTION, DEVICE,
]


def main(argv=None):
    args = read_options(OPTIONS, "table6_sweep", __doc__, argv)
    began = time.time()
    device, rank, world_size = init_distributed(args.device, tf32=False)
    if args.ckpt:
        rows = measure(args, device, rank, world_size)
    else:
        rows = {pair: train(*pair, args, device) for pair in pairs(args.num_tokens, args.codebook_sizes)}
    if rank == 0:
        names = {name for row in rows.values() for name, _ in row.values()}
        digits = names == {"digits FID"}
        fids = "digits FID, reconstructions | digits FID, samples" if digits else "rFID | gFID"
        print(f"| M | C | {fids} |\n|---|---|---|---|")
        for (M, C), row in rows.items():
            cells = [f"{row[kind][1]:.1f}" if kind in row else "-" for kind in ("tokenizer", "fsdd")]
            print(f"| {M} | {C} | {' | '.join(cells)} |")
        print(f"{(time.time() - began) / 60:.1f} min")


def pairs(num_tokens, codebook_sizes):
    """The pairs (M, C) of the table: every C with the M of BOTH, then every M with the C of BOTH, as in the paper."""
    return list(dict.fromkeys([(BOTH[0], C) for C in codebook_sizes] + [(M, BOTH[1]) for M in num_tokens]))


def train(M, C, args, device):
    """{kind of checkpoint: (name, value) of its FID} of a row of the table, of models trained here."""
    tokenizer = variants.tokenizer(num_tokens=M, codebook_size=C, device=args.device, **TOKENIZER)
    denoiser = variants.fsdd(tokenizer, device=args.device, **DENOISER)
    return {"tokenizer": variants.fid(tokenizer, device),
            "fsdd": variants.fid(denoiser, device, num=args.num or NUM_SAMPLES, steps=args.steps or STEPS)}


def measure(args, device, rank, world_size):
    """{(M, C): what train() returns} of the checkpoints in args.ckpt."""
    rows = {}
    for path in args.ckpt:
        checkpoint = load_checkpoint(path, "python train_fsdd.py (or train_tokenizer.py)", "fsdd", "tokenizer")
        config = checkpoint.get("tokenizer", checkpoint)["model_config"]  # a denoiser may have a null code as well
        M, C = config["num_tokens"], config["codebook_size"]
        options = {"data": args.data, "inception": args.inception}
        if checkpoint["kind"] == "fsdd":
            options |= {"ref": args.ref, "num": args.num, "steps": args.steps}
        row = rows.setdefault((M, C), {})
        if checkpoint["kind"] in row:
            stop(f"{path} is the second {checkpoint['kind']} checkpoint with M = {M} and C = {C}; give one of each")
        row[checkpoint["kind"]] = variants.fid(path, device, rank, world_size, **options)
    return rows


if __name__ == "__main__":
    run(main)
