"""The training set as token sets, encoded once before stage 2, which then reads no image."""
import hashlib

import numpy as np
import torch
from tqdm import tqdm

from data.loader import read_slices
from support.distributed import all_gather, chunks, is_main, rank_and_world_size
from support.files import atomic_open, check_output, read_json, write_json
from support.hardware import autocast
from support.training import replace_suffix


def encode_training_set(tokenizer, dataset, device, cfg):
    """The tokens of every training image, and of its mirror image if cfg.flip: (1 or 2, N, M) uint16, memory-mapped.

    They are kept at cfg.tokens; a .json file next to it records which tokenizer and images they are from, and as long
    as these are the same the file is used again. ValueError if a rank can't see it.
    """
    made_from = hashlib.sha256(f"{dataset.fingerprint()} {tokenizer.image_size}".encode())
    for name, weight in tokenizer.state_dict().items():
        made_from.update(name.encode() + weight.cpu().numpy().tobytes())
    shape = [2 if cfg.flip else 1, len(dataset), tokenizer.num_tokens]
    note = {"made_from": made_from.hexdigest(), "shape": shape}
    tokens = open_tokens(cfg.tokens, note)
    if not all_gather(tokens is not None)[0]:
        tokens = encode(tokenizer, dataset, device, cfg)
        if is_main():
            with atomic_open(cfg.tokens) as file:
                np.save(file, tokens)
            write_json(note | {"sha256": hashlib.sha256(tokens).hexdigest()}, replace_suffix(cfg.tokens, ".json"))
        all_gather(None)  # rank 0 has written
        tokens = open_tokens(cfg.tokens, note)
    elif is_main():
        print(f"{cfg.tokens} holds the tokens of these images by this tokenizer; used again", flush=True)
    if not all(all_gather(tokens is not None)):
        raise ValueError(f"{cfg.tokens} does not hold what rank 0 wrote: another run writes it too, or not every "
                         "machine sees it; give --tokens a path of this run's own, in a folder they share")
    return tokens


def check_token_file(path, codebook_size):
    """ValueError if tokens of a codebook can't be kept at path."""
    check_output(path)
    if not path.endswith(".npy"):  # such as a checkpoint, which they would overwrite
        raise ValueError(f"--tokens must end in .npy, got {path}")
    if codebook_size > 2 ** 16:
        raise ValueError(f"the token file holds codes up to 65535, the tokenizer has {codebook_size} codes")


def open_tokens(path, note):
    """Tokens in a file, memory-mapped; None if its own note or its content does not agree with note."""
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
