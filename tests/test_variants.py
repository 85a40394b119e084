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


@pytest.mark.slow
def test_a_variant_is_trained_once(cache, monkeypatch):
    """Fails if a second table trains a model again, takes one with other settings or of another tokenizer for it, or if
    a training that was interrupted counts as finished."""
    path = variants.tokenizer(**SET, **TOKENIZER)
    assert os.path.dirname(path) == "cache" and "num_tokens4-codebook_size16" in path
    others = [variants.tokenizer(**SET, **TOKENIZER | other) for other in ({"steps": 2}, {"lr": 1e-4}, {"seed": 1})]
    denoisers = [variants.fsdd(tokenizer, **DENOISER) for tokenizer in (path, others[-1])]
    assert len({path, *others}) == 4 and denoisers[0] != denoisers[1] and len(list(cache.glob("tokens-*.npy"))) == 2
    trained = []
    for script in (train_tokenizer, train_fsdd):
        monkeypatch.setattr(script, "main", lambda arguments, *_: trained.append(arguments))
    # the device and the log do not change the model
    assert variants.tokenizer(**SET, **TOKENIZER | {"device": "auto"}, log_every=7) == path
    assert variants.fsdd(path, **DENOISER) == denoisers[0] and not trained
    save_checkpoint(load_checkpoint(path, "", "tokenizer") | {"step": 2}, path)
    assert variants.tokenizer(**SET, **TOKENIZER) == path and {"--resume", f"--out={path}"} < {*trained[0]}
    table = [(*row[:1], 5e-4, *row[2:]) if row[0] == "lr" else row for row in train_tokenizer.HYPERPARAMETERS]
    monkeypatch.setattr(train_tokenizer, "HYPERPARAMETERS", table)  # a default that changed
    assert variants.tokenizer(**SET, **TOKENIZER) != path and len(trained) == 2


@pytest.mark.slow
def test_fids_of_variants_are_kept(cache, digits, monkeypatch):
    """Fails if a second table measures again, or takes an FID that other settings gave."""
    tokenizer = variants.tokenizer(**SET, **TOKENIZER)
    denoiser = variants.fsdd(tokenizer, **DENOISER)
    rfid, gfid = variants.digits_fid(tokenizer, CPU), variants.digits_fid(denoiser, CPU, num=40, steps=2)
    monkeypatch.setattr(evaluate_fid, "evaluate", lambda *args: {"digits_fid": -1.0})
    for path, options, expected in ((tokenizer, {}, rfid), (denoiser, {"num": 40, "steps": 2}, gfid),
                                    (denoiser, {"num": 40, "steps": 1}, -1), (f"{digits}/tokenizer.pt", {}, -1)):
        assert variants.digits_fid(path, CPU, **options) == expected
    assert not os.path.exists(f"{digits}/tokenizer.pt.json")  # no variant: it may be another model next time
