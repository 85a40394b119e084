"""The training set as token sets, encoded once before stage 2 is trained, which then reads no image."""
import hashlib
import os

import numpy as np
import torch
from tqdm import tqdm

import common
from data import records
from data.reading import in_order


def encode_training_set(tokenizer, dataset, device, cfg):
    """The tokens of every training image, and of its mirror image where cfg.flip: (1 or 2, N, M) uint16, memory-mapped.

    They are kept at cfg.tokens; a .json file beside it says which tokenizer and images they are from, and where these
    are the same the file is used again. ValueError where a rank can't see it.
    """
    made_from = hashlib.sha256(f"{dataset.fingerprint()} {tokenizer.image_size}".encode())
    for name, weight in tokenizer.state_dict().items():
        made_from.update(name.encode() + weight.cpu().numpy().tobytes())
    shape = [2 if cfg.flip else 1, len(dataset), tokenizer.num_tokens]
    note = {"made_from": made_from.hexdigest(), "shape": shape}
    path, note_path = cfg.tokens, records.beside(cfg.tokens, ".json")
    found = os.path.isfile(path) and records.read_json(note_path) == note
    if not common.all_gather(found)[0]:
        tokens = encode(tokenizer, dataset, device, cfg)
        if common.is_main():
            with open(path + ".tmp", "wb") as file:
                np.save(file, tokens)
            if os.path.exists(note_path):
                os.remove(note_path)  # first, so that these tokens never stand beside another's note
            os.replace(path + ".tmp", path)
            records.write_json(note, note_path)
    elif common.is_main():
        print(f"{path} holds the tokens of these images by this tokenizer; used again", flush=True)
    common.all_gather(None)  # rank 0 has written
    if not all(common.all_gather(os.path.isfile(path) and records.read_json(note_path) == note)):
        raise ValueError(f"not every machine sees {path} as rank 0 wrote it; --tokens must lie in a folder they share")
    return np.load(path, mmap_mode="r")


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
