"""The encoded training set: what it holds, and when its file is used again."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import token_sets
from data.token_sets import check_token_file, encode_training_set
from tests.conftest import few_digits
from tests.scripts import on_ranks
from tests.test_tokenizer import small_tokenizer

CPU = torch.device("cpu")


def make_tokenizer(seed=0):
    return small_tokenizer(image_size=28, patch_size=7, codebook_size=64, seed=seed)


@pytest.fixture
def cfg(tmp_path):
    return SimpleNamespace(tokens=str(tmp_path / "tokens.npy"), flip=True, workers=0, bf16="off")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_tokens_are_those_of_the_images(world_size, cfg):
    """Fails if stage 2 learns from tokens of other images, in another order, or without the mirror images, or if the
    batches of a rank are lost."""
    tokenizer, images = make_tokenizer(), few_digits("train", 600)  # three batches
    for tokens in on_ranks(world_size, lambda: encode_training_set(tokenizer, images, CPU, cfg)):
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.shape == (2, 600, 6)
        for i in range(0, 600, 37):
            image = images.images[i:i + 1] / 127.5 - 1
            assert tokens[0, i].tolist() == tokenizer.encode(image)[0].tolist()
            assert tokens[1, i].tolist() == tokenizer.encode(image.flip(3))[0].tolist()
    assert np.unique(tokens.reshape(-1, 6), axis=0).shape[0] > 200  # the test can tell images apart


def test_tokens_are_used_again_for_the_same_tokenizer_and_images(cfg, monkeypatch, capsys):
    """Fails if stage 2 learns from tokens of another tokenizer or of other images, or if every run encodes them
    again."""
    few, encoded, encode = few_digits("train", 100), [], token_sets.encode
    monkeypatch.setattr(token_sets, "encode", lambda *args: encoded.append(1) or encode(*args))

    def encodes(tokenizer, dataset):
        encoded.clear()
        tokens = encode_training_set(tokenizer, dataset, CPU, cfg)
        assert ("used again" in capsys.readouterr().out) == (not encoded)
        assert tokens[0, 0].tolist() == tokenizer.encode(dataset.images[:1] / 127.5 - 1)[0].tolist()
        return bool(encoded)

    assert encodes(make_tokenizer(), few) and not encodes(make_tokenizer(), few)
    assert encodes(make_tokenizer(seed=1), few)  # other weights
    assert encodes(make_tokenizer(seed=1), few_digits("train", 101))
    other = few_digits("train", 101)
    other.images = 255 - other.images
    assert encodes(make_tokenizer(seed=1), other) and not encodes(make_tokenizer(seed=1), other)
    cfg.flip = False
    assert encodes(make_tokenizer(seed=1), other)


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + bytes([content[-1] ^ 1]),
                                    lambda content: content[:len(content) // 2], lambda content: b"no array"])
def test_damaged_tokens_are_encoded_again(damage, cfg, tmp_path):
    """Fails if a damaged file of tokens is trained on, or ends in a traceback."""
    few, file = few_digits("train", 100), tmp_path / "tokens.npy"
    tokens = np.array(encode_training_set(make_tokenizer(), few, CPU, cfg))
    file.write_bytes(damage(file.read_bytes()))
    assert np.array_equal(encode_training_set(make_tokenizer(), few, CPU, cfg), tokens)


def test_tokens_replace_no_other_file(cfg, tmp_path):
    """Fails if --tokens with the name of another array, or one with another .json file beside it, replaces them, or if
    a checkpoint is overwritten."""
    with pytest.raises(ValueError, match="must end in .npy"):
        check_token_file(str(tmp_path / "tokenizer.pt"), 9)
    for name in ("tokens.npy", "tokens.json"):
        (tmp_path / name).write_bytes(b"[1, 2]")
        with pytest.raises(ValueError, match="tokens.npy or .*tokens.json is not from this script"):
            check_token_file(cfg.tokens, 9)
        (tmp_path / name).unlink()
    encode_training_set(make_tokenizer(), few_digits("train", 10), CPU, cfg)
    check_token_file(cfg.tokens, 2 ** 16)
