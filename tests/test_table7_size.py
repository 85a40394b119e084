"""Table 7: the size of the denoiser against generation."""
import pytest
import torch

from paper import table7_size, variants
from support.files import load_checkpoint, save_checkpoint
from tests.scripts import assert_one_sentence, read_table, run_here
from tests.test_sample import save_random_checkpoint
from tests.test_variants import DENOISER, SET, TOKENIZER


def table(capsys, *options):
    table7_size.main([*options, "--device=cpu"])
    return read_table(capsys.readouterr().out)


@pytest.mark.slow
def test_the_digits_two_sizes(cache, capsys, monkeypatch):
    """Fails if the smaller denoiser differs in more than its size, or stands in the other's row."""
    save_checkpoint(load_checkpoint(variants.tokenizer(**SET, **TOKENIZER), "", "tokenizer"), "tokenizer.pt")
    own = load_checkpoint(variants.fsdd("tokenizer.pt", **DENOISER, lr=1e-3), "", "fsdd")
    save_checkpoint(own, "fsdd.pt")
    monkeypatch.setattr(variants, "fid", lambda path, *args, num, **_: ("digits FID", num + (path == "fsdd.pt")))
    rows = table(capsys, "--num=30")
    smaller = torch.load(next(cache.glob("fsdd-*-width8-*.pt")), weights_only=True)
    millions = [sum(weight.numel() for weight in checkpoint["weights"].values()) / 1e6 for checkpoint in (smaller, own)]
    assert rows == [["4", "16", "1", "8", f"{millions[0]:.2f} M", "30.0"],
                    ["4", "16", "1", "16", f"{millions[1]:.2f} M", "31.0"]]
    differ = {name for name in own["config"] if own["config"][name] != smaller["config"][name]}
    assert differ - variants.NOT_THE_MODEL == {"width", "heads"} and smaller["config"]["heads"] == 1


@pytest.mark.slow
def test_checkpoints_that_are_given(cache, digits, capsys):
    """Fails if something is trained with --ckpt, or if a row is missing."""
    rows = table(capsys, "--ckpt", f"{digits}/fsdd.pt", f"{digits}/fsdd.pt", "--num=30")
    assert len(rows) == 2 and rows[0] == rows[1] and not cache.exists()


def test_mistakes_get_one_sentence(digits):
    """Fails if a mistake ends in a traceback, or if denoisers of two tokenizers are compared."""
    save_random_checkpoint("fsdd.pt")
    assert_one_sentence(run_here(table7_size.main, folder="."), "no checkpoint tokenizer.pt", "train_tokenizer.py")
    tokenizer, fsdd = (torch.load(digits / name, weights_only=True) for name in ("tokenizer.pt", "fsdd.pt"))
    save_checkpoint(tokenizer, "tokenizer.pt")
    assert_one_sentence(run_here(table7_size.main, folder="."), "fsdd.pt was not trained on the digits", "--ckpt")
    fsdd["tokenizer"]["weights"]["quantizer.codebook"] += 1
    save_checkpoint(fsdd, "fsdd.pt")
    assert_one_sentence(run_here(table7_size.main, folder="."), "another tokenizer than tokenizer.pt", "train_fsdd.py")
