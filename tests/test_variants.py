"""The models that the tables train: each once, under a name that says what it is."""
import os

import pytest
import torch

import evaluate_fid
import train_fsdd
import train_tokenizer
from paper import variants
from support.files import load_checkpoint, save_checkpoint

TOKENIZER = {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "batch_size": 8, "steps": 3,
             "device": "cpu"}
SET = {"num_tokens": 4, "codebook_size": 16}
DENOISER = {"width": 16, "heads": 2, "layers": 1, "batch_size": 8, "steps": 3, "device": "cpu"}
CPU = torch.device("cpu")


def refuse(*args, **options):
    raise AssertionError("this should not have been done again")


@pytest.mark.slow
def test_a_variant_is_trained_once(cache, monkeypatch):
    """Fails if a second table trains a model again, or takes one with other settings for it."""
    path = variants.tokenizer(**SET, **TOKENIZER)
    assert os.path.dirname(path) == "cache" and "num_tokens4-codebook_size16" in path
    with monkeypatch.context() as without:
        without.setattr(train_tokenizer, "main", refuse)
        assert variants.tokenizer(**SET, **TOKENIZER) == path
        # they do not change the model
        assert variants.tokenizer(**SET, **TOKENIZER | {"device": "auto"}, log_every=7) == path
    others = [variants.tokenizer(**SET, **TOKENIZER | other) for other in ({"steps": 2}, {"lr": 1e-4})]
    table = [(*row[:1], 5e-4, *row[2:]) if row[0] == "lr" else row for row in train_tokenizer.HYPERPARAMETERS]
    monkeypatch.setattr(train_tokenizer, "HYPERPARAMETERS", table)
    others.append(variants.tokenizer(**SET, **TOKENIZER))  # a default that changed
    assert len({path, *others}) == 4 and all(map(os.path.isfile, others))
    assert load_checkpoint(others[-1], "", "tokenizer")["config"]["lr"] == 5e-4


@pytest.mark.slow
def test_a_denoiser_belongs_to_its_tokenizer(cache, monkeypatch):
    """Fails if a denoiser, or the encoded training set, of another tokenizer is taken."""
    first, second = (variants.tokenizer(**SET, **TOKENIZER, seed=seed) for seed in (0, 1))
    denoisers = [variants.fsdd(path, **DENOISER) for path in (first, second)]
    assert denoisers[0] != denoisers[1] and len(list(cache.glob("tokens-*.npy"))) == 2
    monkeypatch.setattr(train_fsdd, "main", refuse)
    assert variants.fsdd(first, **DENOISER) == denoisers[0]


@pytest.mark.slow
def test_a_variant_that_was_interrupted_resumes(cache, monkeypatch):
    """Fails if half a training counts as a variant, or is trained from the first step again."""
    path, arguments = variants.tokenizer(**SET, **TOKENIZER), []
    save_checkpoint(load_checkpoint(path, "", "tokenizer") | {"step": 2}, path)
    monkeypatch.setattr(train_tokenizer, "main", lambda argv, *_: arguments.extend(argv))
    assert variants.tokenizer(**SET, **TOKENIZER) == path
    assert "--resume" in arguments and f"--out={path}" in arguments


@pytest.mark.slow
def test_fids_of_variants_are_kept(cache, digits, monkeypatch):
    """Fails if a second table measures again, or takes an FID that other settings gave."""
    tokenizer = variants.tokenizer(**SET, **TOKENIZER)
    denoiser = variants.fsdd(tokenizer, **DENOISER)
    rfid, gfid = variants.digits_fid(tokenizer, CPU), variants.digits_fid(denoiser, CPU, num=40, steps=2)
    args = evaluate_fid.parse([f"--ckpt={denoiser}", "--num=40", "--steps=2", f"--classifier={variants.CLASSIFIER}",
                               "--device=cpu"])
    assert gfid == pytest.approx(evaluate_fid.evaluate(args, CPU)["digits_fid"])
    monkeypatch.setattr(evaluate_fid, "evaluate", lambda *args: {"digits_fid": -1.0})
    for path, options, expected in ((tokenizer, {}, rfid), (denoiser, {"num": 40, "steps": 2}, gfid),
                                    (denoiser, {"num": 40, "steps": 1}, -1), (f"{digits}/tokenizer.pt", {}, -1)):
        assert variants.digits_fid(path, CPU, **options) == expected
    assert not os.path.exists(f"{digits}/tokenizer.pt.json")  # no variant: it may be another model next time


def test_what_is_measured_is_kept_once(tmp_path):
    """Fails if an interrupted table measures again, or loses what else the file holds, or a value of 0 counts as
    none."""
    path, values = f"{tmp_path}/a.json", iter((0.0, 1.0))
    assert [variants.keep(path, key, lambda: next(values)) for key in "aabb"] == [0, 0, 1, 1]
