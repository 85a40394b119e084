"""The authors' weights become checkpoints that every script takes. What they compute: test_release.py"""
import os

import pytest
import torch

import sample
import train_fsdd
from fsdd import Denoiser
from paper import cost, import_released_weights
from paper.import_released_weights import FSDD_NAMES, TOKENIZER_NAMES, released_name
from tests.image_folder import make_image_folder
from tests.scripts import assert_one_sentence, names_and_shapes, run_here, successful
from tests.test_release import write_released_files
from tokenizer import SetTokenizer


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with the release's files of narrow models, set_tokenizer.pth and fsdd.pth, and what they become,
    tokenizer.pt and fsdd.pt."""
    folder = tmp_path_factory.mktemp("released")
    tokenizer_path, fsdd_path = write_released_files(folder)
    import_released_weights.main(["--tokenizer", tokenizer_path, "--fsdd", fsdd_path, "--out", str(folder / "fsdd.pt")])
    return folder


def test_the_published_files_are_taken():
    """Fails if the names and shapes of the published files are not the ones that are expected, or if S or B is not the
    paper's denoiser."""
    with torch.device("meta"):
        models = [SetTokenizer(256, 3, 16, 128, 4096, 12, 768, 12, 12, 12, vqgan_width=128, reshaped_latents=True),
                  *(Denoiser(4096, 128, 1000, *size, unused_rows=True) for size in cost.SIZES.values())]
    for attention in (model.blocks[0].attention for model in models[1:]):
        assert attention.heads * 64 == len(attention.proj.weight)
    published = [(401, 2581575422), (131, 2786568098), (131, 1741424252)]
    for model, table, expected in zip(models, (TOKENIZER_NAMES, FSDD_NAMES, FSDD_NAMES), published):
        released = [released_name(name, tensor.shape, table) for name, tensor in model.state_dict().items()]
        assert names_and_shapes(dict(released)) == expected


@pytest.mark.slow
def test_other_scripts_take_it(imported, tmp_path):
    """Fails if a script does not take an imported checkpoint as one of ours, or if sample.py draws with other settings
    than the release's best."""
    make_image_folder(tmp_path / "images", 40, classes=2)
    finished = run_here(sample.main, "--ckpt", imported / "fsdd.pt", "--labels=7,29", "--num=4", folder=tmp_path)
    settings = "prior distinct, sampler paper, steps 25, times even, guidance 4,50,55, top_p 0.8"
    assert settings in finished.stdout, finished.stderr
    successful(run_here(train_fsdd.main, "--recipe=imagenet256", "--data=images", "--tokenizer",
                        imported / "tokenizer.pt", "--steps=1", "--batch_size=2", "--width=64",
                        "--heads=1", "--layers=1", "--compile=false", "--workers=0", "--noise=distinct",
                        folder=tmp_path))


def test_what_exists_is_kept(imported, tmp_path):
    """Fails if an import overwrites what was trained here."""
    for name in ("fsdd", "tokenizer"):
        (tmp_path / f"{name}.pt").write_text("trained for weeks")
    import_released_weights.main([f"--tokenizer={imported}/set_tokenizer.pth", f"--fsdd={imported}/fsdd.pth"])
    for name in ("fsdd", "tokenizer"):
        assert (tmp_path / f"{name}.pt.previous").read_text() == "trained for weeks"
        assert torch.load(f"{name}.pt", weights_only=True)["kind"] == name


@pytest.mark.parametrize("name, wrong, words", [
    ("fsdd", lambda f: f["ema"], ["no weights under 'ema'", "pos_embed"]),
    ("fsdd", lambda f: f | {"args": torch.nn.Linear(2, 2)}, ["can't be read", "UnpicklingError"]),  # a program may run
    ("fsdd", lambda f: {"ema": f["ema"] | {"extra": torch.ones(2), "blocks.0.attn.proj.bias": torch.ones(128).half()}},
     ["unexpected extra", "blocks.0.attn.proj.bias", "float16"]),
    ("fsdd", lambda f: {"ema": f["ema"] | {"final_layer.linear.weight": torch.ones(21, 128),
                                           "final_layer.linear.bias": torch.ones(21)}},
     ["sets of 20 tokens", "takes 24"]),
    ("set_tokenizer", lambda t: {"ema": t}, ["latent_tokens", "holds ema"]),
])
def test_another_file_gets_one_sentence(name, wrong, words, imported, tmp_path):
    """Fails if a file that is not the published one is taken for it or ends in a traceback, or if anything is
    written."""
    path = str(tmp_path / "wrong.pth")
    torch.save(wrong(torch.load(imported / f"{name}.pth", weights_only=False)), path)
    files = {file: imported / f"{file}.pth" for file in ("set_tokenizer", "fsdd")} | {name: path}
    finished = run_here(import_released_weights.main, "--tokenizer", files["set_tokenizer"], "--fsdd", files["fsdd"],
                        folder=tmp_path)
    assert_one_sentence(finished, "error: ", path, *words)
    assert len(finished.stderr.splitlines()) == 1 and os.listdir(tmp_path) == ["wrong.pth"]


@pytest.mark.parametrize("arguments, words", [
    (["--tokenizer=none.pth"], ["no file none.pth", "paper/details.md"]),
    (["--tokenizer=text.pth"], ["text.pth", "can't be read"]),
    (["--tokenizer=text.pth", "--out=tokenizer.pt"], ["--out"]),
])
def test_mistakes_get_one_sentence(arguments, words, tmp_path):
    """Fails if a mistake on the command line ends in a traceback."""
    (tmp_path / "text.pth").write_text("<html>Google Drive - Virus scan warning</html>")
    assert_one_sentence(run_here(import_released_weights.main, *arguments, folder=tmp_path), *words)
    assert os.listdir(tmp_path) == ["text.pth"]
