"""Table 5: seven ways to model the sets, trained, tuned and measured alike."""
import signal

import pytest
import torch

import common
import sample
import train_fsdd
from data import records
from dual_transform import counts_to_tokens
from fsdd import sample_noise
from paper import table5_priors
from tests.test_common import ROOT, assert_one_sentence, run_here, run_ranks
from tests.test_train_tokenizer import assert_same_checkpoint

SMALL = ["--width=16", "--layers=1", "--heads=2", "--batch_size=8", "--sample_steps=2", "--num_images=40",
         "--num_search=20",
         "--search_steps=2", "--device=cpu"]


def table(capsys, ckpt, *options, steps=3, seeds=2):
    """The rows that are printed: {method: cells}."""
    table5_priors.main([f"--ckpt={ckpt}", *SMALL, f"--steps={steps}", f"--seeds={seeds}", *options])
    return rows_of(capsys.readouterr().out)


def rows_of(said):
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][1:]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_table(digits, cache, capsys, monkeypatch):
    """Broken: a method would be left out, be given other models or searches than the rest, or break the sum
    unnoticed."""
    monkeypatch.setattr(table5_priors, "LEARNING_RATES", ((1.0, 1.0), (2.0, 1.0)))
    monkeypatch.setattr(table5_priors, "GUIDANCE", ("1", "4"))
    monkeypatch.setattr(table5_priors, "CUTS", table5_priors.CUTS[1:])
    rows = table(capsys, f"{digits}/tokenizer.pt")
    assert list(rows) == list(table5_priors.METHODS)
    for method, (*priors, paper, fid, read, broken, by, parameters, setting) in rows.items():
        assert "±" in fid and float(fid.split("±")[0]) > 0 and parameters.endswith(" M")
        assert setting.startswith(("x 1; ", "x 2 and 1; "))
        keeps = method.startswith("AR-") or priors[2] == "x"  # M tokens one by one, or a sum that the model knows
        assert (broken == "0.0%") == keeps and bool(by) != keeps
        # two learning rates, the best for longer
        assert len(list(cache.glob(f"{method.replace(' ', '')}-lr*-seed0-*.pt"))) == 3
        assert len(list(cache.glob(f"{method.replace(' ', '')}-lr*-seed1-*.pt"))) == 1  # the best of them
    monkeypatch.setattr(table5_priors, "train", None)  # what is there is not trained or measured again
    monkeypatch.setattr(table5_priors.evaluate_fid, "frechet_distance", None)
    assert table(capsys, f"{digits}/tokenizer.pt") == rows


@pytest.mark.parametrize("method", ["AR-random", "Continuous Diffusion"])
def test_a_run_that_was_cut_off_goes_on(method, digits, cache, capsys, monkeypatch):
    """Broken: hours of training would be lost, or go on in another way than without the break."""
    options = [f"--methods={method}", "--search_lr=no", "--save_every=2"]
    whole = table(capsys, f"{digits}/tokenizer.pt", *options, steps=4, seeds=1)
    path, = cache.glob("*-seed0-*.pt")
    path.rename("unbroken.pt")
    for file in cache.glob("*-seed0-*"):
        file.unlink()
    save = records.save_training

    def save_and_stop(*args, **state):
        save(*args, **state)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(records, "save_training", save_and_stop)
    with pytest.raises(SystemExit) as stopped:
        table(capsys, f"{digits}/tokenizer.pt", *options, steps=4, seeds=1)
    assert stopped.value.code == 128 + signal.SIGTERM and torch.load(path, weights_only=True)["step"] < 4
    monkeypatch.setattr(records, "save_training", save)
    assert table(capsys, f"{digits}/tokenizer.pt", *options, steps=4, seeds=1) == whole
    assert_same_checkpoint(path, "unbroken.pt")


def test_counts_of_any_sum_are_decoded(digits):
    """Broken: samples that break the sum would be left out, cut, or change rows."""
    checkpoint = common.load_checkpoint(f"{digits}/tokenizer.pt", "", "tokenizer")
    tokenizer = table5_priors.train_fsdd.SetTokenizer(**checkpoint["model_config"])
    tokenizer.load_state_dict(checkpoint["weights"])
    tokenizer.eval()
    counts = torch.cat([sample_noise(3, 64, M, "multinomial") for M in (5, 6, 0, 19, 6)])[torch.randperm(15)]
    one_by_one = [sample.decode(tokenizer, counts_to_tokens(row[None])) for row in counts]
    difference = table5_priors.decode(tokenizer, counts).int() - torch.cat(one_by_one).int()
    assert difference.abs().max() <= 1  # rounding


def test_orders(digits, cache, monkeypatch):
    """Broken: AR-order1 and 2 would learn more than one order, or AR-random only one."""
    seen = []
    monkeypatch.setattr(table5_priors.baselines, "autoregressive_loss",
                        lambda model, x, labels, symbols: seen.append(x) or 0 * next(model.parameters()).sum())
    tokens = torch.arange(6).expand(8, 6)
    get_batch = train_fsdd.get_batch
    monkeypatch.setattr(train_fsdd, "get_batch", lambda *args: (tokens, *get_batch(*args)[1:]))
    orders = {}
    for method in ("AR-order1", "AR-order2", "AR-random"):
        table5_priors.main([f"--ckpt={digits}/tokenizer.pt", *SMALL, "--steps=2", "--seeds=1", "--search_lr=no",
                            f"--methods={method}"])
        orders[method] = {tuple(row.tolist()) for x in seen for row in x}
        seen.clear()
        assert all(sorted(order) == list(range(6)) for order in orders[method])
    assert len(orders["AR-order1"]) == len(orders["AR-order2"]) == 1 != len(orders["AR-random"])
    assert orders["AR-order1"] != orders["AR-order2"]


def test_mistakes_get_one_sentence(digits, cache, tmp_path, monkeypatch):
    """Broken: a mistake would end in a traceback, or be found after hours."""
    main = table5_priors.main
    assert_one_sentence(run_here(main, folder=tmp_path), "no checkpoint tokenizer.pt", "python train_tokenizer.py")
    ckpt = f"--ckpt={digits}/tokenizer.pt"
    assert_one_sentence(run_here(main, ckpt, "--methods=FSDD,VAE", folder=tmp_path), "--methods", "VAE", "SetAR")
    monkeypatch.setattr(train_fsdd, "encode_training_set", None)  # of ImageNet it takes an hour
    assert_one_sentence(run_here(main, ckpt, *SMALL, "--ref=none.npz", folder=tmp_path), "there is no none.npz")
    for option, words in {"--seeds=0": "--seeds", "--num_images=1": "--num_images", "--out=a.jpg": "--out"}.items():
        assert_one_sentence(run_here(main, ckpt, option, folder=tmp_path), words)
    checkpoint = torch.load(digits / "tokenizer.pt", weights_only=True)
    torch.save(checkpoint | {"kind": "grid tokenizer"}, tmp_path / "grid.pt")
    assert_one_sentence(run_here(main, "--ckpt=grid.pt", folder=tmp_path),
                        "not a tokenizer checkpoint but a grid tokenizer")


def test_what_is_measured_depends_on_all_its_settings(digits, cache, capsys, monkeypatch):
    """Broken: a distance measured with one setting would be shown for another; or that of the search for the
    table's."""
    monkeypatch.setattr(table5_priors, "GUIDANCE", ("1", "4"))
    options = ["--methods=FSDD", "--search_lr=no"]
    first = table(capsys, f"{digits}/tokenizer.pt", *options, seeds=1)["FSDD"]
    # as many as the search
    assert table(capsys, f"{digits}/tokenizer.pt", *options, "--num_images=20", seeds=1)["FSDD"] != first
    kept, = cache.glob("*.pt.json")
    before = len(records.read_json(kept))
    settings = len(table5_priors.GUIDANCE) * len(table5_priors.CUTS)
    assert before == settings + 2
    for more in ("--sample_steps=3", "--batch=30"):
        table(capsys, f"{digits}/tokenizer.pt", *options, more, seeds=1)
    assert len(records.read_json(kept)) == before + 2 * (settings + 1)


def test_the_same_table_from_two_processes(digits, cache, capsys, tmp_path, monkeypatch):
    """Broken: under torchrun a process would train or measure something else, or wait for another forever."""
    (tmp_path / "few.py").write_text(f"""import sys
sys.path.insert(0, {ROOT!r})
import common, data.digits_classifier, data.reading, evaluate_fid
from paper import table5_priors, variants
from tests.conftest import few_digits
table5_priors.GUIDANCE = ("1", "4")
variants.CLASSIFIER, variants.FOLDER = "{digits}/digits_classifier.pt", "cache2"
data.reading.open_dataset = lambda where, split, size, **training: few_digits(split, 300)
open_few = lambda where, split, size: few_digits(split, 600 if split == "train" else 400)
evaluate_fid.open_dataset = data.digits_classifier.open_dataset = open_few
common.run(table5_priors.main)
""")
    options = ["--methods=AR-random,Continuous Diffusion", "--search_lr=no", "--bf16=off", "--batch=15"]
    finished = run_ranks(tmp_path / "few.py", f"--ckpt={digits}/tokenizer.pt", *SMALL, "--steps=3", "--seeds=1",
                         *options, folder=tmp_path, processes=2)
    assert finished.returncode == 0, finished.stderr
    rows = rows_of(finished.stdout)
    monkeypatch.setattr(table5_priors, "GUIDANCE", ("1", "4"))
    assert len(rows) == 2 and rows == table(capsys, f"{digits}/tokenizer.pt", *options, seeds=1)
