"""Stage 2 as it is run: the same batches for any number of ranks, exact resume, the encoded training set, mistakes."""
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import train_fsdd
import train_tokenizer
from support.command_line import parse
from support.files import save_checkpoint
from support.training import explain
from tests.conftest import few_digits
from tests.scripts import (assert_one_sentence, assert_ranks_train_alike, assert_same_training, crash, run_here,
                           send_sigterm, stop_and_resume, successful)
from tests.test_train_tokenizer import TINY as TINY_TOKENIZER
from tokenizer import SetTokenizer

TINY = ["--recipe=digits", "--width=16", "--heads=2", "--layers=1", "--batch_size=7", "--device_batch=3", "--steps=8",
        "--warmup=3", "--log_every=1", "--save_every=3", "--picture_every=0", "--bf16=off",
        "--device=cpu"]
SIZES = dict(channels=1, image_size=28, num_tokens=4, codebook_size=16, code_dim=2, patch_size=7, width=16, heads=2,
             encoder_layers=1, decoder_layers=1)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A small tokenizer, as an option of train_fsdd.py."""
    folder, patch = tmp_path_factory.mktemp("stage1"), pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr("data.loader.open_dataset", lambda data, split, size, **training: few_digits(split, 300))
        successful(run_here(train_tokenizer.main, *TINY_TOKENIZER, "--steps=3", folder=folder))
    return f"--tokenizer={folder}/tokenizer.pt"


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", ["uniform", "flips"])
def test_a_batch_is_drawn_as_the_settings_say(times):
    """Fails if training sees other times, no mirrored images, too many or too few labels, or the same noise in every
    step."""
    B, N, M, C = 50, 90, 4, 16
    tokens, labels = np.random.default_rng(0).integers(C, size=(2, N, M)).astype(np.uint16), torch.arange(N) % 10
    sizes = {"codebook_size": C, "num_tokens": M, "num_classes": 10}
    cfg = SimpleNamespace(batch_size=B, seed=3, label_drop=0.3, noise="multinomial", training_times=times)
    whole, other = (train_fsdd.draw_batch(tokens, labels, sizes, slice(0, B), step, "cpu", cfg) for step in (7, 8))
    assert (whole.x0.sum(1) == M).all() and (whole.x_t.sum(1) == M).all() and whole.x0.shape == (B, C)
    assert not torch.equal(whole.x0, whole.x_t)
    assert 0 < whole.t.min() and whole.t.max() <= 1 and (whole.t > 0.07).all() == (times == "flips")
    assert 5 < (whole.labels == 10).sum() < 25  # dropped
    versions = [np.bincount(sets, minlength=C).tolist() for sets in tokens.reshape(-1, M)]
    found = {versions.index(x0) // N for x0 in whole.x0.tolist()}
    assert found == {0, 1}  # images and mirrored images
    assert not torch.equal(whole.u_codes, other.u_codes) and not torch.equal(whole.t, other.t)


def test_a_stopped_training_resumes_to_the_same_numbers(stage1, few_to_train_on, tmp_path, monkeypatch):
    """Fails if --resume does not give the numbers of an unbroken run, or if a signal loses the steps since the last
    checkpoint. (Real kills: tests/test_kills.py)"""
    successful(run_here(train_fsdd.main, *TINY, stage1, folder=tmp_path))
    stop_and_resume(monkeypatch, train_fsdd, [*TINY, stage1], tmp_path / "stopped.pt",
                    [(5, send_sigterm, 5), (8, crash, 6)])
    assert_same_training(tmp_path / "fsdd.pt", tmp_path / "stopped.pt")


def test_any_number_of_ranks_trains_alike(stage1, few_to_train_on, tmp_path):
    """Fails if the batch, its noise or the mean of the gradients depend on the number of ranks, or of micro-batches:
    one rank takes three, three ranks take one each."""
    assert_ranks_train_alike("train_fsdd.py", [*TINY, stage1, "--steps=4", "--optimizer=adamw", "--clip=0"], tmp_path)


@pytest.mark.parametrize("arguments, num_codes", [
    ([], [8] * 3), (["--loss_codes=5", "--noise=distinct"], [20] * 3), (["--denoiser=dense", "--noise=masked"], [])])
def test_the_sparse_denoiser_is_trained_on_some_codes(arguments, num_codes, stage1, few_to_train_on, tmp_path,
                                                      monkeypatch):
    """Fails if training computes the loss from more or fewer codes than --loss_codes says, or a dense denoiser's from
    some only."""
    loss = mock.Mock(wraps=train_fsdd.sparse_loss)
    monkeypatch.setattr(train_fsdd, "sparse_loss", loss)
    successful(run_here(train_fsdd.main, *TINY, stage1, "--steps=1", *arguments, folder=tmp_path))
    assert [call.args[2] for call in loss.call_args_list] == num_codes  # of three micro-batches


def test_a_training_that_diverges_ends_with_one_sentence(stage1, few_to_train_on, tmp_path):
    """Fails if either training continues with gradients that are not finite, or ends with a traceback."""
    options = ["--optimizer=adamw", "--lr=9e18", "--warmup=0", "--clip=0"]
    for main, settings in ((train_tokenizer.main, TINY_TOKENIZER), (train_fsdd.main, [*TINY, stage1])):
        with pytest.raises(RuntimeError) as problem:
            run_here(main, *settings, *options, folder=tmp_path)
        assert explain(problem.value).startswith("the gradient is not finite: the training has diverged")


def test_images_of_other_classes_are_named(stage1, few_to_train_on, tmp_path):
    """Fails if stage 2 learns other images than the tokenizer without a word, as when --data is forgotten."""
    checkpoint = torch.load(stage1.removeprefix("--tokenizer="), weights_only=True)
    save_checkpoint(checkpoint | {"class_names": ["cat"]}, tmp_path / "cats.pt")
    finished = successful(run_here(train_fsdd.main, *TINY, "--tokenizer=cats.pt", "--steps=1", folder=tmp_path))
    assert "cats.pt was trained on images of other classes than digits" in finished.stdout


def test_the_code_embedding_starts_as_the_setting_says():
    """Fails if --code_start is not what training starts from."""
    sizes = dict(codebook_size=16, num_tokens=4, num_classes=10, width=64, layers=1, heads=1)
    cfg = SimpleNamespace(seed=0, denoiser="sparse", code_start="zeros")
    tokenizer = SetTokenizer(**SIZES)
    assert not train_fsdd.make_model(sizes, tokenizer, "cpu", cfg).code_embedding.any()
    cfg.code_start = "codebook"
    start, codes = train_fsdd.make_model(sizes, tokenizer, "cpu", cfg).code_embedding[0], tokenizer.quantizer.codes()
    assert torch.corrcoef(torch.stack([(codes @ codes.t()).flatten(), (start @ start.t()).flatten()]))[0, 1] > 0.5


def test_a_checkpoint_has_all_that_generation_needs(stage1, few_to_train_on, tmp_path):
    """Fails if fsdd.pt alone does not make images."""
    options = ["--steps=2", "--noise=masked", "--picture_every=2", "--ema=0"]
    finished = successful(run_here(train_fsdd.main, *TINY, stage1, *options, folder=tmp_path))
    assert "bits per image" in finished.stdout and "on the sets of 300 test images" in finished.stdout.splitlines()[-1]
    assert (tmp_path / "fsdd.png").stat().st_size > 1000
    checkpoint = torch.load(tmp_path / "fsdd.pt", weights_only=True)
    assert checkpoint["generation"] == {"prior": "masked", "sampler": "masked", "steps": 12, "times": "even",
                                        "guidance": "2.5", "top_p": 1.0, "top_k": 0}
    assert checkpoint["tokenizer"]["model_config"]["num_tokens"] == checkpoint["model_config"]["num_tokens"] == 4
    assert checkpoint["model_config"]["codebook_size"] == 1 + checkpoint["tokenizer"]["model_config"]["codebook_size"]
    assert checkpoint["training"]["n_averaged"] == 2  # the moving average, here the last step's weights
    assert all(torch.equal(w, checkpoint["training"]["model"][name]) for name, w in checkpoint["weights"].items())
    assert checkpoint["class_names"] == list("0123456789") and checkpoint["denoiser"] == "sparse"


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--tokenizer=none.pt"], ["no checkpoint none.pt", "python train_tokenizer.py"]),
    (["--tokenizer=wrong.pt"], ["wrong.pt is not a tokenizer checkpoint"]),
    (["--noise=white"], ["--noise", "masked"]), (["--tokens=no/t.npy"], ["no folder no"]),
    (["--heads=3"], ["width 16", "heads 3"]),
])
def test_mistakes_get_one_sentence(arguments, words, stage1, tmp_path):
    """Fails if a mistake on the command line ends in a traceback."""
    save_checkpoint({"something": 1}, tmp_path / "wrong.pt")
    assert_one_sentence(run_here(train_fsdd.main, *TINY, stage1, *arguments, folder=tmp_path), *words)
    assert os.listdir(tmp_path) == ["wrong.pt"]


@pytest.mark.parametrize("sizes, arguments, words", [
    ({}, [], "no folder nowhere"),  # what is checked next
    ({"codebook_size": 2 ** 16 + 1}, [], "up to 65535, the tokenizer has 65537"),
    ({"codebook_size": 3}, ["--noise=distinct"], "'distinct' needs num_tokens <= codebook_size, got 4 > 3"),
    ({"channels": 3}, ["--data=digits"], "images of digits have 1 channels, those of tokenizer.pt 3"),
])
def test_settings_are_checked_before_images_are_read(sizes, arguments, words):
    """Fails if codes beyond 65535 wrap around in the token file, or if settings that do not fit are found after an hour
    of encoding."""
    cfg, _ = parse(train_fsdd.HYPERPARAMETERS, "", None, ["--recipe=digits", "--data=nowhere", *arguments])
    stage1 = {"model_config": SIZES | sizes, "weights": SetTokenizer(**SIZES | sizes).state_dict()}
    with pytest.raises(ValueError, match=words):
        train_fsdd.prepare(stage1, torch.device("cpu"), cfg)
