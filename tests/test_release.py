"""The authors' release computes the same as ours: both models, Algorithm 1 and the sampler.

release_outputs.npz contains what the authors' own modules (github.com/Gengzigang/TokenSet) compute, in float32: narrow
models whose weights come from a rule, Algorithm 1 on random input, and the sampler with every random draw replaced by
the most probable outcome. Our models get the same weights through paper/import_released_weights.py.
"""
import argparse
import os
import zlib

import numpy as np
import torch

import fsdd
from paper.import_released_weights import import_fsdd, import_tokenizer
from tokenizer import SetTokenizer

RELEASE = {name: torch.from_numpy(array) if array.dtype.kind in "fi" else array.tolist()
           for name, array in np.load(os.path.join(os.path.dirname(__file__), "release_outputs.npz")).items()}


def weights_by_rule(shapes):
    """The weights that the release's outputs were computed with. shapes: {name: shape}."""
    tensors = {}
    for name, shape in shapes.items():
        a = np.random.default_rng(zlib.crc32(b"narrow/" + name.encode())).standard_normal(shape, dtype=np.float32)
        if name.endswith("bias"):
            a = 0.1 * a
        elif len(shape) == 1:  # the scale of a norm
            a = 1 + 0.2 * a
        elif any(word in name for word in ("embedding", "token", "pos_embed")):
            a = 0.3 * a
        else:
            a = a / np.sqrt(np.prod(shape[1:]))
        tensors[name] = torch.from_numpy(np.asarray(a, dtype=np.float32))
    return tensors


def shapes_of(lines):
    """Lines "name<TAB>shape" -> {name: shape}."""
    return {name: tuple(map(int, shape.split("x"))) for name, shape in (line.split("\t") for line in lines)}


def write_released_files(folder):
    """The narrow models as the authors publish theirs: set_tokenizer.pth and fsdd.pth. Returns their paths."""
    paths = f"{folder}/set_tokenizer.pth", f"{folder}/fsdd.pth"
    torch.save(weights_by_rule(shapes_of(RELEASE["tokenizer_names"])), paths[0])
    torch.save({"ema": weights_by_rule(shapes_of(RELEASE["denoiser_names"])),
                "args": argparse.Namespace(model="DiT1D-S", lr=1e-4, results="results")}, paths[1])
    return paths


def load(model_class, config, weights):
    model = model_class(**config).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def test_tokenizer_equals_the_release(tmp_path):
    """Fails if a tensor is imported under a wrong name, or if the tokenizer does not compute what the release does."""
    tokenizer = load(SetTokenizer, *import_tokenizer(write_released_files(tmp_path)[0]))
    images = RELEASE["images"]
    latents = RELEASE["latents"][:, :, 0].transpose(1, 2)  # (3, code_dim, 1, M) -> (3, M, code_dim)
    assert torch.allclose(tokenizer.encoder(images), latents, atol=1e-4)
    assert torch.equal(tokenizer.encode(images), RELEASE["tokens"])
    assert torch.allclose(tokenizer.decode(RELEASE["sets"]), RELEASE["decoded"], atol=1e-4)


@torch.no_grad()
def test_denoiser_equals_the_release(tmp_path):
    """Fails if a tensor is imported under a wrong name, if the denoiser does not compute what the release does, if time
    runs the wrong way, or if another row of the class embedding is the null class."""
    denoiser = load(fsdd.Denoiser, *import_fsdd(write_released_files(tmp_path)[1]))
    logits = denoiser(RELEASE["counts"], 1 - RELEASE["data_fraction"], RELEASE["labels"])
    assert torch.allclose(logits, RELEASE["logits"], atol=1e-4)


def test_greedy_adjusting_equals_the_release():
    """Fails if Algorithm 1 chooses other codes than the release."""
    log_p = RELEASE["adjust_p"].log()  # (64, 12, 9)
    adjusted = fsdd.greedy_adjust(RELEASE["adjust_x"], lambda k: log_p.gather(2, k[:, :, None])[:, :, 0], 8)
    assert torch.equal(adjusted, RELEASE["adjusted"])


class Formula:
    """The denoiser that the release's sampler was run with, a formula in place of a network."""
    codebook_size, num_tokens, num_classes = 12, 8, 1

    def __call__(self, x_t, t, labels):
        linear = torch.einsum("bc,cjk->bjk", x_t.float(), RELEASE["w"])
        return linear * (0.3 + 0.5 * (1 - t))[:, None, None] - 2.2 * torch.arange(9)


def most_probable_steps(monkeypatch, x, t, **settings):
    """Our sampler from X_t (6, C) on, every draw replaced by the most probable outcome: the states (steps + 1, 6, C)
    and the means of the Gaussians (steps, 6, C)."""
    means, real = [], fsdd.discrete_gaussian
    monkeypatch.setattr(fsdd, "sample_categorical", lambda p, *args, **settings: p.argmax(-1))
    monkeypatch.setattr(fsdd, "discrete_gaussian", lambda mean, *args: means.append(mean) or real(mean, *args))
    labels = torch.zeros(6, dtype=torch.int64)
    states = list(fsdd.refine(Formula(), labels, guidance=(1,), start=(x, t), **settings))
    return torch.stack(states), torch.stack(means)


def means_between(states, x0, steps=10):
    """Eq. 10, the means (steps, 6, C) that follow from the release's states X_t and the x_0 drawn in each step."""
    t = 1 - torch.arange(steps)[:, None, None] / steps
    return states[:-1] + (x0 - states[:-1]) / (steps * t)


def test_sampler_equals_the_release(monkeypatch):
    """Fails if x_0, the steps in which it is adjusted, the means of Eq. 10, or the states differ from the release's
    preset for the best FID."""
    states, x0 = RELEASE["fid_xt"], RELEASE["fid_x0"]  # (11, 6, C), (10, 6, C)
    ours, means = most_probable_steps(monkeypatch, RELEASE["start"], 1.0, steps=10, top_p=0.8)
    assert torch.equal(ours[:9], states[:9]) and torch.allclose(means[:9], means_between(states, x0)[:9], atol=1e-5)
    # In the step to t = 0.1 the release's Gaussians underflow, and it rounds the means by largest remainder; we adjust
    # as in all steps. From the release's state at t = 0.1, the last step is the same again.
    ours, _ = most_probable_steps(monkeypatch, states[9], 0.1, steps=1, top_p=0.8)
    assert torch.equal(ours[1], states[10])


def test_sharp_sampler_equals_the_release_where_its_sums_are_right(monkeypatch):
    """Fails if our sampler with top_k = 2 does not keep the sum M, or if its states differ from those of the release's
    sharp preset that sum to M. (The release adjusts nothing there: its last states sum to 2 to 6 in place of 8.)"""
    states, x0 = RELEASE["sharp_xt"], RELEASE["sharp_x0"]
    ours, means = most_probable_steps(monkeypatch, RELEASE["start"], 1.0, steps=10, top_p=1.0, top_k=2)
    assert (ours.sum(2) == 8).all()
    right = states[:9].sum(2) == 8  # (9, 6); after these steps, the release rounds by largest remainder here too
    assert torch.equal(ours[:9][right], states[:9][right])
    assert torch.allclose(means[:9][right], means_between(states, x0)[:9][right], atol=1e-5)
