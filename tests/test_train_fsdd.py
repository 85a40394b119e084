"""Stage 2 as it is run: the encoded training set, resumed runs, any number of processes, clear errors."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import train_fsdd
import train_tokenizer
from data import open_dataset, records
from data.digits import Digits
from fsdd import Denoiser
from tests.conftest import few_digits
from tests.image_folder import make_image_folder
from tests.test_common import assert_one_sentence, run_here, run_ranks
from tests.test_train_tokenizer import TINY as TINY_TOKENIZER
from tests.test_train_tokenizer import assert_same_checkpoint, assert_same_gradients, kill_in_the_middle, read_log
from tokenizer import SetTokenizer

TINY = ["--recipe=digits", "--width=16", "--heads=2", "--layers=1", "--batch_size=7", "--device_batch=3", "--steps=60",
        "--warmup=3", "--log_every=1", "--save_every=3", "--picture_every=100", "--bf16=off", "--device=cpu"]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A folder with a small tokenizer and the training set it encoded; returns its options for train_fsdd.py."""
    folder = tmp_path_factory.mktemp("stage1")
    finished = run_here(train_tokenizer.main, *TINY_TOKENIZER, "--steps=3", folder=folder)
    assert finished.returncode == 0, finished.stderr
    return [f"--tokenizer={folder}/tokenizer.pt", f"--tokens={folder}/tokens.npy"]


def test_a_killed_run_resumes_exactly(stage1, tmp_path):
    """Broken: after a kill at any moment, --resume would not give the very numbers of the unbroken run (two processes:
    test_imagenet256.py)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    finished = run_here(train_fsdd.main, *TINY, *stage1, folder=whole)
    assert finished.returncode == 0, finished.stderr
    kill_in_the_middle("train_fsdd.py", [*TINY, *stage1], killed, killed / "fsdd.csv", 1)
    assert 3 <= torch.load(killed / "fsdd.pt", weights_only=True)["step"] < 60
    finished = run_here(train_fsdd.main, "--resume", folder=killed)
    assert finished.returncode == 0, finished.stderr
    assert read_log(whole / "fsdd.csv") == read_log(killed / "fsdd.csv")
    assert_same_checkpoint(whole / "fsdd.pt", killed / "fsdd.pt")


def test_any_number_of_processes_trains_alike(stage1, tmp_path):
    """Broken: the tokens, the global batch, its noise and times, or the average of the gradients would depend on the
    number of processes."""
    alone, three = tmp_path / "1", tmp_path / "3"  # unequal shares of the batch
    alone.mkdir(), three.mkdir()
    options = [*TINY, stage1[0], "--steps=4", "--optimizer=adamw"]
    for finished in (run_here(train_fsdd.main, *options, stage1[1], folder=alone),
                     run_ranks("train_fsdd.py", *options, folder=three, processes=3)):
        assert finished.returncode == 0, finished.stderr
    assert np.array_equal(np.load(stage1[1].split("=")[1]), np.load(three / "tokens.npy"))
    logs = [read_log(folder / "fsdd.csv") for folder in (alone, three)]
    assert len(logs[0]) == len(logs[1]) == 4
    for ours, theirs in zip(*logs):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_accumulated_gradients_are_the_batchs(stage1, few_to_train_on, tmp_path):
    """Broken: the gradient would depend on how many sets a device takes at once."""
    for size in (7, 3, 1):
        (tmp_path / str(size)).mkdir()
        once = ["--steps=1", "--warmup=0", "--optimizer=adamw", f"--device_batch={size}"]
        assert not run_here(train_fsdd.main, *TINY, stage1[0], *once, folder=tmp_path / str(size)).returncode
        assert_same_gradients(tmp_path / "7" / "fsdd.pt", tmp_path / str(size) / "fsdd.pt")


def test_tokens_are_encoded_once(stage1, few_to_train_on, tmp_path):
    """Broken: the training set would be encoded again for nothing, or tokens of another tokenizer would be taken for
    these."""
    tokenizer_path, tokens_path = (option.split("=")[1] for option in stage1)
    checkpoint = torch.load(tokenizer_path, weights_only=True)
    own = ["--tokens", tmp_path / "tokens.npy", "--steps=1"]
    first = run_here(train_fsdd.main, *TINY, *stage1, *own, folder=tmp_path)
    assert first.returncode == 0 and "used again" not in first.stdout, first.stderr
    tokens = np.load(tmp_path / "tokens.npy")
    assert tokens.shape == (1, 300, 4) and tokens.dtype == np.uint16
    model = SetTokenizer(**checkpoint["model_config"])
    model.load_state_dict(checkpoint["weights"])
    images = few_digits("train", 300).images / 127.5 - 1
    for part in (slice(0, 250), slice(250, 300)):  # the batches that were encoded; others round otherwise
        assert torch.equal(model.encode(images[part]), torch.from_numpy(tokens[0, part].astype(np.int64)))

    again = run_here(train_fsdd.main, *TINY, *stage1, *own, folder=tmp_path)
    assert again.returncode == 0 and "used again" in again.stdout, again.stderr
    checkpoint["weights"]["encoder.to_code.bias"][0] += 1e-3
    torch.save(checkpoint, tmp_path / "other.pt")
    other = run_here(train_fsdd.main, *TINY, f"--tokenizer={tmp_path}/other.pt", *own, "--flip=true", folder=tmp_path)
    assert other.returncode == 0 and "used again" not in other.stdout, other.stderr
    flipped = np.load(tmp_path / "tokens.npy")
    assert flipped.shape == (2, 300, 4) and (flipped[0] != flipped[1]).any()
    model.load_state_dict(checkpoint["weights"])
    for version, of_version in enumerate((images[:250], images[:250].flip(3))):
        assert torch.equal(model.encode(of_version), torch.from_numpy(flipped[version, :250].astype(np.int64)))


def test_tokens_of_another_encoding_are_not_used(tmp_path, monkeypatch):
    """Broken: tokens of other images, by another tokenizer, or cut off by a kill would be taken for these; or a mirror
    image's tokens would be another image's."""
    monkeypatch.chdir(tmp_path)
    make_image_folder("images", 100)
    dataset = open_dataset("images", "train", 24)
    dataset.drop(["d0/cut.jpg"])
    model = SetTokenizer(channels=3, image_size=24, num_tokens=4, codebook_size=16, code_dim=4, patch_size=8, width=16,
                         heads=2, encoder_layers=1, decoder_layers=1, commitment=0.25).eval()
    cfg = SimpleNamespace(tokens="tokens.npy", flip=True, workers=0, bf16="off")
    encode = lambda: train_fsdd.encode_training_set(model, dataset, torch.device("cpu"), cfg)  # noqa: E731
    tokens, note = np.array(encode()), records.read_json("tokens.json")
    images = dataset.__getitems__([(i, 0) for i in range(100)])[0] / 127.5 - 1
    for version, x in enumerate((images, images.flip(3))):
        assert np.array_equal(tokens[version], model.encode(x).numpy())
    for wrong in ({"made_from": "a"}, {"shape": [1]}, None):  # None: killed between the renaming and the note
        np.save("tokens.npy", np.zeros_like(tokens))
        os.remove("tokens.json") if wrong is None else records.write_json(note | wrong, "tokens.json")
        assert np.array_equal(encode(), tokens) and records.read_json("tokens.json") == note

    def killed(*_):
        raise KeyboardInterrupt

    np.save("tokens.npy", other := np.zeros_like(tokens))
    records.write_json({"made_from": "other"}, "tokens.json")
    for step in ("save", "replace"):
        with monkeypatch.context() as kill, pytest.raises(KeyboardInterrupt):
            kill.setattr(np if step == "save" else os, step, killed)
            encode()
        assert np.array_equal(np.load("tokens.npy"), other) and records.read_json("tokens.json") != note
    assert np.array_equal(encode(), tokens)


def test_every_rank_must_see_the_tokens(tmp_path, monkeypatch):
    """Broken: a machine that does not share the folder would train on whatever it has there, or end in a traceback."""
    monkeypatch.chdir(tmp_path)
    model = SetTokenizer(channels=1, image_size=28, num_tokens=4, codebook_size=16, code_dim=4, patch_size=7, width=16,
                         heads=2, encoder_layers=1, decoder_layers=1)
    cfg = SimpleNamespace(tokens="tokens.npy", flip=False, workers=0, bf16="off")
    monkeypatch.setattr(common, "all_gather", lambda thing: [True, thing])  # rank 0 has the file, this rank has not
    with pytest.raises(ValueError, match="tokens.npy .* a folder they share"):
        train_fsdd.encode_training_set(model, Digits("test"), torch.device("cpu"), cfg)


def test_training_reads_no_image(stage1, few_to_train_on, tmp_path, monkeypatch):
    """Broken: after the encoding, stage 2 would still touch images."""
    monkeypatch.chdir(tmp_path)
    assert run_here(train_fsdd.main, *TINY, stage1[0], "--steps=1", folder=tmp_path).returncode == 0
    read = []
    monkeypatch.setattr(train_fsdd, "evaluate", lambda *args: 0.0)  # the loss on test images, after the training
    monkeypatch.setattr("data.digits.Digits.__getitems__", lambda self, items: read.append(items))
    train_fsdd.main([*TINY, stage1[0]])
    assert read == [] and torch.load("fsdd.pt", weights_only=True)["step"] == 60


def test_a_checkpoint_has_all_that_generation_needs(stage1, few_to_train_on, tmp_path):
    """Broken: fsdd.pt alone would not make images."""
    finished = run_here(train_fsdd.main, *TINY, stage1[0], "--steps=2", "--guidance=1,2,3", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "bits an image" in finished.stdout and "on the sets of 300 test images" in finished.stdout.splitlines()[-1]
    assert (tmp_path / "fsdd.png").stat().st_size > 1000
    checkpoint = torch.load(tmp_path / "fsdd.pt", weights_only=True)
    config = checkpoint["config"]
    assert checkpoint["generation"] == {"prior": "multinomial", "sampler": "exchange", "steps": config["sample_steps"],
                                        "guidance": [1.0, 2.0, 3.0], "top_p": config["top_p"],
                                        "top_k": config["top_k"]}
    assert checkpoint["tokenizer"]["model_config"]["num_tokens"] == checkpoint["model_config"]["num_tokens"] == 4
    assert checkpoint["class_names"] == list("0123456789")


@pytest.mark.parametrize("arguments, expected", [([], (True, 12)), (["--loss_codes=5"], (True, 20)),
                                                 (["--denoiser=dense"], (False, 0))])
def test_codes_that_are_trained_on(arguments, expected, stage1, few_to_train_on, tmp_path, monkeypatch):
    """Broken: training would compute the loss of other codes than it says, or a dense denoiser of some only."""
    monkeypatch.chdir(tmp_path)
    seen = []
    loss = train_fsdd.fsdd_loss

    def spy(model, x0, labels, t, x1, uniform, num_codes=0, order=None):
        if torch.is_grad_enabled():
            seen.append((model.sparse, num_codes))
        return loss(model, x0, labels, t, x1, uniform, num_codes, order)

    monkeypatch.setattr(train_fsdd, "fsdd_loss", spy)
    train_fsdd.main([*TINY, stage1[0], "--steps=1", *arguments])
    assert set(seen) == {expected}


def test_code_embedding_starts_from_the_codebook(stage1, few_to_train_on, tmp_path):
    """Broken: --code_start would not be what training starts with. (After one step of learning rate 1e-9.)"""
    tokenizer = torch.load(stage1[0].split("=")[1], weights_only=True)
    start = {}
    for name in ("zeros", "codebook"):
        options = ["--steps=1", "--lr=1e-9", "--warmup=0", f"--code_start={name}", f"--out={name}.pt"]
        finished = run_here(train_fsdd.main, *TINY, stage1[0], *options, folder=tmp_path)
        assert finished.returncode == 0, finished.stderr
        start[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)["weights"]["code_embedding"][0]
    assert start["zeros"].abs().max() < 1e-6
    codes = torch.nn.functional.normalize(tokenizer["weights"]["quantizer.codebook"], dim=1)
    closeness, products = codes @ codes.t(), start["codebook"] @ start["codebook"].t()
    assert torch.corrcoef(torch.stack([closeness.flatten(), products.flatten()]))[0, 1] > 0.5


@pytest.mark.parametrize("arguments, words", [
    (["--tokenizer=none.pt"], ["no checkpoint none.pt", "python train_tokenizer.py"]),
    (["--prior=uniform"], ["prior", "'uniform'"]),
    (["--guidance=1,2,3,4"], ["guidance"]),
    (["--top_k=-1"], ["top_k"]),
    (["--top_p=2"], ["top_p"]),
    (["--tokens=no/t.npy"], ["no folder no"]),
    (["--heads=3"], ["width 16", "heads 3"]),
    (["--model=L"], ["--model", "digits, S, B"]),
    (["--code_start=ones"], ["--code_start", "zeros, codebook"]),
    (["--batch_size=70000"], ["batch_size 70000"]),
])
def test_mistakes_get_one_sentence(arguments, words, stage1, tmp_path):
    """Broken: a mistake on the command line would end in a traceback."""
    assert_one_sentence(run_here(train_fsdd.main, *TINY, *stage1, *arguments, folder=tmp_path), *words)
    assert os.listdir(tmp_path) == []


def prepare(model_config, *arguments):
    """train_fsdd.prepare() for a tokenizer made here, with the digits' settings but for these arguments."""
    cfg, _ = common.parse(train_fsdd.HYPERPARAMETERS, "", None, ["--recipe=digits", *arguments])
    stage1 = {"model_config": model_config, "weights": SetTokenizer(**model_config).state_dict()}
    return train_fsdd.prepare(stage1, torch.device("cpu"), cfg)


SIZES = dict(channels=1, image_size=28, num_tokens=4, codebook_size=16, code_dim=2, patch_size=7, width=16, heads=2,
             encoder_layers=1, decoder_layers=1)


@pytest.mark.parametrize("sizes, arguments, words", [
    ({"codebook_size": 2 ** 16}, [], "no folder nowhere"),
    ({"codebook_size": 2 ** 16 + 1}, [], "up to 65535, the tokenizer has 65537"),
    ({"codebook_size": 3}, ["--unused_rows=yes"], "unused_rows needs num_tokens <= codebook_size, got 4 > 3"),
    ({"codebook_size": 3}, ["--prior=distinct"], "'distinct' needs num_tokens <= codebook_size, got 4 > 3"),
    ({}, ["--width=30", "--heads=4"], "width 30 is not a multiple of heads 4"),
    ({}, ["--denoiser=thin"], "--denoiser must be dense or sparse, got 'thin'"),
    ({}, ["--loss_codes=2"], "at least 3, as X_t and X_0 hold up to 2 M codes, got 2"),
    ({}, ["--times=later"], "times must be"), ({}, ["--sampler=best"], "sampler must be"),
    ({}, ["--tokens=fsdd.pt"], "--tokens must end in .npy"),
])
def test_settings_are_checked_before_images_are_read(sizes, arguments, words):
    """Broken: codes beyond 65535 would wrap around in the token file; or what doesn't fit would be found after an hour
    of reading images, or in the first step."""
    with pytest.raises(ValueError, match=words):
        prepare(SIZES | sizes, "--data=nowhere", *arguments)


def test_a_tokenizer_of_colour_images_gets_one_sentence():
    """Broken: grey images would go into a tokenizer of colour images, and end in a traceback."""
    with pytest.raises(ValueError, match="images of digits have 1 channels, those of colour.pt 3"):
        prepare(SIZES | {"channels": 3}, "--tokenizer=colour.pt")


def test_broken_tokenizer_gets_one_sentence(tmp_path):
    """Broken: stage 2 on something that is no tokenizer would end in a traceback."""
    common.save_checkpoint({"something": 1}, str(tmp_path / "tokenizer.pt"))
    assert_one_sentence(run_here(train_fsdd.main, *TINY, folder=tmp_path), "tokenizer.pt is not a tokenizer checkpoint")


@pytest.mark.parametrize("name, millions", [("S", 36.0), ("B", 136.7)])
def test_models_by_name(name, millions):
    """Broken: --model S or B would not be the paper's denoiser."""
    width, layers, heads = train_fsdd.MODELS[name]
    with torch.device("meta"):
        model = Denoiser(4096, 128, 1000, width, layers, heads, unused_rows=True)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
    assert width // heads == 64
