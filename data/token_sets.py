"""The training set as token sets, encoded once before stage 2 is trained, which then reads no image."""
import contextlib
import hashlib

import numpy as np
import torch
from tqdm import tqdm

import common
from data import files, records
from data.reading import in_order


def encode_training_set(tokenizer, dataset, device, cfg):
    """The tokens of every training image, and of its mirror image where cfg.flip: (1 or 2, N, M) uint16, memory-mapped.

    They are kept at cfg.tokens; a .json file beside it says which tokenizer and images they are from, and where these
    are the same the file is used again. ValueError where a rank can't see them.
    """
    made_from = hashlib.sha256(f"{dataset.fingerprint()} {tokenizer.image_size}".encode())
    for name, weight in tokenizer.state_dict().items():
        made_from.update(name.encode() + weight.cpu().numpy().tobytes())
    shape = [2 if cfg.flip else 1, len(dataset), tokenizer.num_tokens]
    note = {"made_from": made_from.hexdigest(), "shape": shape}
    tokens = open_tokens(cfg.tokens, note)
    if not common.all_gather(tokens is not None)[0]:
        with files.written(cfg.tokens) if common.is_main() else contextlib.nullcontext() as file:
            put(np.zeros(shape, np.uint16), file)  # claims the space on the disk
            put(tokens := encode(tokenizer, dataset, device, cfg), file)
        if common.is_main():
            records.write_json(note | {"sha256": hashlib.sha256(tokens).hexdigest()}, note_of(cfg.tokens))
        common.all_gather(None)  # rank 0 has written
        tokens = open_tokens(cfg.tokens, note)
    elif common.is_main():
        print(f"{cfg.tokens} holds the tokens of these images by this tokenizer; used again", flush=True)
    if not all(common.all_gather(tokens is not None)):
        raise ValueError(f"{cfg.tokens} does not hold what rank 0 wrote: another run writes it too, or not every "
                         "machine sees it; give --tokens a path of this run's own, in a folder they share")
    return tokens


def check_token_file(path, codebook_size):
    """ValueError where tokens of a codebook can't be kept at a path."""
    files.check_output(path)
    if not path.endswith(".npy"):  # such as a checkpoint, whose place they would take
        raise ValueError(f"--tokens must end in .npy, got {path}")
    if codebook_size > 2 ** 16:
        raise ValueError(f"the token file holds codes up to 65535, the tokenizer has {codebook_size} codes")


def note_of(path):
    return records.beside(path, ".json")


def put(array, file):
    """Write an array to an open .npy file in place of what it holds, on rank 0, which has one."""
    if file:
        file.seek(0)
        np.save(file, array)
        file.flush()


def open_tokens(path, note):
    """The tokens in a file, memory-mapped; None where its own note or its content is not what note says."""
    found = records.read_json(note_of(path))
    try:
        tokens = np.load(path, mmap_mode="r")
        same = note.items() <= found.items() and hashlib.sha256(tokens).hexdigest() == found.get("sha256")
        return tokens if same and list(tokens.shape) == note["shape"] and tokens.dtype == np.uint16 else None
    except (OSError, ValueError, EOFError):  # not there, cut off, or something else
        return None


def encode(tokenizer, dataset, device, cfg):
    """The same tokens as an array. The batches, and so the rounding, are the same for any number of ranks."""
    rank, world_size = common.rank_and_world_size()
    parts = common.chunks(slice(0, len(dataset)), min(250, max(1, 2 ** 22 // tokenizer.image_size ** 2)))
    mine, batches = parts[rank::world_size], []
    for images, _ in tqdm(in_order(dataset, mine, cfg.workers), desc="encoding the training set", total=len(mine),
                          disable=rank > 0, mininterval=5):
        images = images.to(device) / 127.5 - 1  # (n, ch, H, W) in [-1, 1]
        with common.autocast(device, cfg.bf16):
            versions = [tokenizer.encode(x) for x in ([images, images.flip(3)] if cfg.flip else [images])]
        batches.append(torch.stack(versions).cpu().numpy().astype(np.uint16))  # (1 or 2, n, M)
    found = common.all_gather(batches)  # found[rank][turn]
    return np.concatenate([found[i % world_size][i // world_size] for i in range(len(parts))], axis=1)
