"""Random generators whose numbers depend on a purpose and a key only, not on what was drawn before."""
import zlib

import numpy as np
import torch


def generator(device, purpose, *key):
    """A random generator seeded by purpose, a word, and key, numbers such as (seed, step)."""
    seed = np.random.SeedSequence([zlib.crc32(purpose.encode()), len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) >> 1)
