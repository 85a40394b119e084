"""The models that the tables train: each once, under a name that says what it is."""
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import common
import evaluate_fid
import train_fsdd
import train_tokenizer
from data import records
from paper import variants
from tests.test_train_tokenizer import assert_same_checkpoint

TOKENIZER = {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "batch_size": 8, "steps": 3,
             "device": "cpu"}
SET = {"num_tokens": 4, "codebook_size": 16}
DENOISER = {"width": 16, "heads": 2, "layers": 1, "batch_size": 8, "steps": 3, "sample_steps": 2, "device": "cpu"}
CPU = torch.device("cpu")


def refuse(*args, **options):
    raise AssertionError("this should not have been done again")


def test_a_variant_is_trained_once(cache, monkeypatch):
    """Broken: a second table would train a model again, or take one with other settings for it."""
    path = variants.tokenizer(**SET, **TOKENIZER)
    assert os.path.dirname(path) == "cache" and "num_tokens4-codebook_size16" in path
    checkpoint = common.load_checkpoint(path, "", "tokenizer")
    assert checkpoint["step"] == 3 and checkpoint["model_config"]["num_tokens"] == 4
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
    assert common.load_checkpoint(others[-1], "", "tokenizer")["config"]["lr"] == 5e-4


def test_a_denoiser_belongs_to_its_tokenizer(cache, monkeypatch):
    """Broken: a denoiser, or the encoded training set, of another tokenizer would be taken."""
    first, second = (variants.tokenizer(**SET, **TOKENIZER, seed=seed) for seed in (0, 1))
    denoisers = [variants.fsdd(path, **DENOISER) for path in (first, second)]
    assert denoisers[0] != denoisers[1] and len(list(cache.glob("tokens-*.npy"))) == 2
    for path, of in zip(denoisers, (first, second)):
        its, weights = (common.load_checkpoint(one, "", "fsdd", "tokenizer") for one in (path, of))
        assert all(torch.equal(its["tokenizer"]["weights"][name], weight)
                   for name, weight in weights["weights"].items())
    monkeypatch.setattr(train_fsdd, "main", refuse)
    assert variants.fsdd(first, **DENOISER) == denoisers[0]


def test_a_variant_that_was_cut_off_goes_on(cache, monkeypatch):
    """Broken: half a training would count as a variant, or not give the model that an unbroken one gives."""
    options = SET | TOKENIZER | {"steps": 5}
    whole = variants.tokenizer(**options)
    os.rename(whole, "whole.pt")
    update, taken = train_tokenizer.CodeUse.update, []

    def stop_at_the_third(*args):
        update(*args)
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as cut:
        cut.setattr(train_tokenizer.CodeUse, "update", stop_at_the_third)
        with pytest.raises(SystemExit) as stopped:
            variants.tokenizer(**options)
    assert stopped.value.code == 128 + signal.SIGTERM and common.load_checkpoint(whole, "", "tokenizer")["step"] == 3
    assert variants.tokenizer(**options) == whole
    assert_same_checkpoint("whole.pt", whole)


def test_what_was_measured_of_a_variant_is_kept(cache, digits, monkeypatch):
    """Broken: a second table would measure again, or take an FID that other settings gave."""
    tokenizer = variants.tokenizer(**SET, **TOKENIZER)
    denoiser = variants.fsdd(tokenizer, **DENOISER)
    rfid, gfid = variants.fid(tokenizer, CPU), variants.fid(denoiser, CPU, num=40, steps=None)
    args = evaluate_fid.parse([f"--ckpt={denoiser}", "--num=40", f"--classifier={variants.CLASSIFIER}", "--device=cpu"])
    assert gfid == pytest.approx(evaluate_fid.evaluate(args, CPU)["digits_fid"]) and rfid > 0
    measured = []  # from here on the FID is how many have been measured
    monkeypatch.setattr(evaluate_fid, "evaluate", lambda *args: measured.append(args) or {"digits_fid": len(measured)})
    for _ in range(2):
        assert (variants.fid(tokenizer, CPU), variants.fid(denoiser, CPU, num=40)) == (rfid, gfid)
        assert variants.fid(denoiser, CPU, num=50) == 1 and variants.fid(denoiser, CPU, num=40, steps=1) == 2
    assert [args[0].ckpt for args in measured] == [denoiser] * 2 and measured[1][0].steps == 1
    own = f"{digits}/tokenizer.pt"  # no variant: it may be another one under the same name next time
    assert [variants.fid(own, CPU), variants.fid(own, CPU)] == [3, 4]


def test_no_variants_under_torchrun(cache, monkeypatch):
    """Broken: every process would train the same model into the same file."""
    monkeypatch.setattr(variants, "dist", SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(ValueError, match="leave out torchrun"):
        variants.tokenizer(**SET, **TOKENIZER)
    assert not cache.exists()


def test_numbers():
    """Broken: a table would show None where nothing was measured."""
    assert [variants.number(value) for value in (None, 0.0, 12.345)] == ["-", "0.0", "12.3"]


def test_all_processes_agree_on_what_is_kept(cache, monkeypatch):
    """Broken: a process that does not see the file of rank 0 yet would measure alone, and wait forever."""
    cache.mkdir()
    records.write_json({"--num=9": 5.0}, "cache/fsdd.pt.json")
    monkeypatch.setattr(evaluate_fid, "evaluate", refuse)
    monkeypatch.setattr(common, "all_gather", lambda mine: [{"--num=9": 5.0}, mine])
    assert variants.fid("cache/fsdd.pt", CPU, 1, 2, num=9) == 5.0
    os.remove("cache/fsdd.pt.json")
    assert variants.fid("cache/fsdd.pt", CPU, 1, 2, num=9) == 5.0
