"""The training set as token sets, encoded once before stage 2, which then reads no image."""
import hashlib
import os

import numpy as np
import torch
from tqdm import tqdm

from data.loader import read_slices
from support.distributed import all_gather, chunks, is_main, rank_and_world_size
from support.files import atomic_open, check_outputs, read_json, write_json
from support.hardware import autocast, use_bf16
from support.training import replace_suffix


def encode_training_set(tokenizer, dataset, device, cfg):
    """The tokens of every training image, and of its mirror image if cfg.flip: (1 or 2, N, M) uint16, memory-mapped.

    They are kept in the file cfg.tokens. A .json file next to it records which tokenizer, images and number format
    they belong to; the tokens are used again as long as these are the same. ValueError if a rank can't read them.
    """
    bf16 = use_bf16(device, cfg.bf16)  # which rounds some tokens to others
    made_from = hashlib.sha256(f"{dataset.fingerprint()} {tokenizer.image_size} {bf16}".encode())
    for name, weight in tokenizer.state_dict().items():
        made_from.update(name.encode() + weight.cpu().numpy().tobytes())
    shape = [2 if cfg.flip else 1, len(dataset), tokenizer.num_tokens]
    note = {"made_from": made_from.hexdigest(), "shape": shape}
    tokens = open_tokens(cfg.tokens, note)
    if not all_gather(tokens is not None)[0]:
        tokens = encode(tokenizer, dataset, device, cfg)
        if is_main():
            write_json(note | {"sha256": hashlib.sha256(tokens).hexdigest()}, replace_suffix(cfg.tokens, ".json"))
            with atomic_open(cfg.tokens) as file:
                np.save(file, tokens)
        all_gather(None)  # wait for rank 0
        tokens = open_tokens(cfg.tokens, note)
    elif is_main():
        print(f"{cfg.tokens} already holds the tokens of these images by this tokenizer; it is used again", flush=True)
    if not all(all_gather(tokens is not None)):
        raise ValueError(f"{cfg.tokens} does not hold what rank 0 wrote: another run writes the same file, or not all "
                         "machines share its folder; give --tokens a path that only this run uses, in a shared folder")
    return tokens


def check_token_file(path, codebook_size):
    """ValueError, or an exit with one sentence, if tokens of a codebook can't be kept at path."""
    if not path.endswith(".npy"):  # such as a checkpoint, which would be overwritten
        raise ValueError(f"--tokens must end in .npy, got {path}")
    note = replace_suffix(path, ".json")
    check_outputs(path, note)
    if (os.path.isfile(path) or os.path.isfile(note)) and "made_from" not in read_json(note):
        raise ValueError(f"{path} or {note} is not from this script, which would replace both; give another --tokens")
    if codebook_size > 2 ** 16:
        raise ValueError(f"the token file holds codes up to 65535, the tokenizer has {codebook_size} codes")


def open_tokens(path, note):
    """Tokens in a file, memory-mapped; None if the .json file next to it or its content does not match note."""
    found = read_json(replace_suffix(path, ".json"))
    try:
        tokens = np.load(path, mmap_mode="r")
        same = note.items() <= found.items() and hashlib.sha256(tokens).hexdigest() == found.get("sha256")
        return tokens if same and list(tokens.shape) == note["shape"] and tokens.dtype == np.uint16 else None
    except (OSError, ValueError, EOFError):  # no such file, an incomplete one, or something else
        return None


def encode(tokenizer, dataset, device, cfg):
    """The tokens as an array. The batches, and so the rounding, are the same for any number of ranks."""
    rank, world_size = rank_and_world_size()
    parts = chunks(slice(0, len(dataset)), min(250, max(1, 2 ** 22 // tokenizer.image_size ** 2)))
    local, batches = parts[rank::world_size], []
    for images, _ in tqdm(read_slices(dataset, local, cfg.workers), desc="encoding the training set",
                          total=len(local), disable=rank > 0, mininterval=5):
        images = images.to(device) / 127.5 - 1  # (n, ch, H, W) in [-1, 1]
        with autocast(device, cfg.bf16):
            versions = [tokenizer.encode(x) for x in ([images, images.flip(3)] if cfg.flip else [images])]
        batches.append(torch.stack(versions).cpu().numpy().astype(np.uint16))  # (1 or 2, n, M)
    found = all_gather(batches)  # found[rank][turn]
    return np.concatenate([found[i % world_size][i // world_size] for i in range(len(parts))], axis=1)
