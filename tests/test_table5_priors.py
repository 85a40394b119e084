"""Table 5: seven ways to model the sets, trained, tuned and measured alike."""
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generation
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import sample_noise
from paper import table5_priors
from paper.inputs import open_tokenizer
from tests.scripts import (assert_one_sentence, assert_same_checkpoint, run_here, run_ranks, send_sigterm,
                           successful)

SMALL = ["--width=16", "--layers=1", "--heads=2", "--batch_size=8", "--sample_steps=2", "--num_images=40",
         "--num_search=20", "--search_steps=2", "--device=cpu"]


@pytest.fixture
def few_settings(monkeypatch):
    """A search of two kinds of guidance and two kinds of truncation."""
    monkeypatch.setattr(table5_priors, "GUIDANCE", ("1", "4"))
    monkeypatch.setattr(table5_priors, "TRUNCATIONS", table5_priors.TRUNCATIONS[1:])


def table(capsys, ckpt, *options, steps=3, seeds=2):
    """The rows that are printed: {method: cells}."""
    table5_priors.main([f"--ckpt={ckpt}", *SMALL, f"--steps={steps}", f"--seeds={seeds}", *options])
    return rows_of(capsys.readouterr().out)


def rows_of(output):
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| ")][1:]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.slow
def test_the_table(digits, cache, few_settings, capsys, monkeypatch):
    """Fails if a method is left out, is given other models or searches than the rest, or gives wrong sums unnoticed."""
    monkeypatch.setattr(table5_priors, "LEARNING_RATES", ((1.0, 1.0), (2.0, 1.0)))
    rows = table(capsys, f"{digits}/tokenizer.pt")
    assert list(rows) == list(table5_priors.METHODS)
    for method, (*properties, paper, fid, classified, bits, broken, by, parameters, setting) in rows.items():
        assert "±" in fid and float(fid.split("±")[0]) > 0 and parameters.endswith(" M")
        assert setting.startswith(("x 1; ", "x 2 and 1; "))
        assert (bits != "") == (method.startswith("AR-") or method in ("SetAR", "FSDD (hidden)"))
        keeps = method.startswith("AR-") or properties[2] == "x"  # M tokens one by one, or a sum that the model knows
        assert (broken == "0.0%") == keeps and bool(by) != keeps
        # two learning rates, the best for longer, and with another seed
        assert len(list(cache.glob(f"{method.replace(' ', '')}-lr*-seed0-*.pt"))) == 3
        assert len(list(cache.glob(f"{method.replace(' ', '')}-lr*-seed1-*.pt"))) == 1
    monkeypatch.setattr(table5_priors, "train", None)  # nothing is trained or measured again
    monkeypatch.setattr(table5_priors.evaluate_fid, "frechet_distance", None)
    assert table(capsys, f"{digits}/tokenizer.pt") == rows


@pytest.mark.slow
@pytest.mark.parametrize("method", ["AR-random", "Continuous Diffusion"])
def test_an_interrupted_run_resumes(method, digits, cache, capsys, monkeypatch):
    """Fails if hours of training are lost, or continue in another way than without the interruption."""
    options = [f"--methods={method}", "--search_lr=no", "--save_every=2"]
    whole = table(capsys, f"{digits}/tokenizer.pt", *options, steps=4, seeds=1)
    path, = cache.glob("*-seed0-*.pt")
    path.rename("unbroken.pt")
    for file in cache.glob("*-seed0-*"):
        file.unlink()
    save = table5_priors.save_training

    def save_and_stop(*args, **state):
        save(*args, **state)
        send_sigterm()

    with monkeypatch.context() as interrupted, pytest.raises(SystemExit) as stopped:
        interrupted.setattr(table5_priors, "save_training", save_and_stop)
        table(capsys, f"{digits}/tokenizer.pt", *options, steps=4, seeds=1)
    assert stopped.value.code == 128 + signal.SIGTERM and torch.load(path, weights_only=True)["step"] < 4
    assert table(capsys, f"{digits}/tokenizer.pt", *options, steps=4, seeds=1) == whole
    assert_same_checkpoint(path, "unbroken.pt")


def test_counts_of_any_sum_are_decoded(digits):
    """Fails if samples with a wrong sum are left out, truncated, or change rows."""
    tokenizer = open_tokenizer(f"{digits}/tokenizer.pt", None, torch.device("cpu"))[0]
    counts = torch.cat([sample_noise(3, 64, M, "multinomial") for M in (5, 6, 0, 19, 6)])[torch.randperm(15)]
    one_by_one = [generation.decode(tokenizer, counts_to_tokens(row[None])) for row in counts]
    difference = table5_priors.decode(tokenizer, counts).int() - torch.cat(one_by_one).int()
    assert difference.abs().max() <= 1  # rounding


def test_batches():
    """Fails if AR-order1 or 2 learns more than one order, AR-random only one, or if a method learns other images or
    labels than the rest, or other ones on several ranks."""
    tokens = torch.stack([torch.randperm(64)[:6] for _ in range(100)])
    cfg = SimpleNamespace(batch_size=20, seed=3, label_drop=0.1, prior="multinomial", training_times="uniform")
    task = SimpleNamespace(tokens=tokens.numpy().astype(np.uint16)[None], M=6, C=64, device=torch.device("cpu"),
                           size={"num_classes": 10}, first_axis=torch.rand(64),
                           train_set=SimpleNamespace(labels=torch.randint(10, (100,))))
    orders, rows = {}, slice(0, 20)
    expected = table5_priors.draw_batch("FSDD", task, rows, 5, cfg)
    for method in ("AR-order1", "AR-order2", "AR-random", "AR-sorted"):
        batch = table5_priors.draw_batch(method, task, rows, 5, cfg)
        assert torch.equal(tokens_to_counts(batch.x0, 64), expected.x0) and torch.equal(batch.labels, expected.labels)
        second_half = table5_priors.draw_batch(method, task, slice(10, 20), 5, cfg)
        assert torch.equal(second_half.x0, batch.x0[10:])
        if method == "AR-sorted":
            assert (task.first_axis[batch.x0].diff(dim=1) >= 0).all()
            continue
        images = [next(row for row in tokens.tolist() if sorted(row) == sorted(x)) for x in batch.x0.tolist()]
        orders[method] = {tuple(map(image.index, x)) for image, x in zip(images, batch.x0.tolist())}
    assert len(orders["AR-order1"]) == len(orders["AR-order2"]) == 1 < len(orders["AR-random"])
    assert orders["AR-order1"] != orders["AR-order2"]


def test_mistakes_get_one_sentence(digits, cache, tmp_path, monkeypatch):
    """Fails if a mistake ends in a traceback, or is found after hours."""
    main, ckpt = table5_priors.main, f"--ckpt={digits}/tokenizer.pt"
    monkeypatch.setattr(table5_priors, "encode_training_set", None)  # of ImageNet it takes an hour
    for arguments, words in (([], ["no checkpoint tokenizer.pt", "train_tokenizer.py"]),
                             ([ckpt, "--methods=FSDD,VAE"], ["--methods", "VAE", "SetAR"]),
                             ([ckpt, "--out=a.jpg"], ["--out", "a.jpg"]), ([ckpt, "--seeds=0"], ["--seeds"]),
                             ([ckpt, "--ref=none.npz"], ["there is no none.npz"])):
        assert_one_sentence(run_here(main, *SMALL, *arguments, folder=tmp_path), *words)


@pytest.mark.slow
def test_what_is_measured_depends_on_all_its_settings(digits, cache, few_settings, capsys):
    """Fails if a distance measured with one setting is shown for another, or that of the search for the table's."""
    options = ["--methods=FSDD", "--search_lr=no"]
    found = [table(capsys, f"{digits}/tokenizer.pt", *options, *more, seeds=1)["FSDD"][4]
             for more in ([], ["--num_images=20"], ["--sample_steps=3"], ["--batch=30"])]  # 20: as many as the search
    assert len(set(found)) == 4


@pytest.mark.slow
def test_the_same_table_from_two_ranks(digits, cache, few_settings, capsys, tmp_path, monkeypatch):
    """Fails if a rank under torchrun trains or measures something else, or waits for another forever."""
    script = tmp_path / "table5.py"
    script.write_text("from paper import table5_priors\nfrom support.training import run\nrun(table5_priors.main)\n")
    options = [f"--ckpt={digits}/tokenizer.pt", "--methods=AR-random,Continuous Diffusion", "--search_lr=no",
               "--bf16=off", "--batch=15"]
    with monkeypatch.context() as other_folder:
        other_folder.setattr(table5_priors.variants, "FOLDER", "cache2")
        finished = successful(run_ranks(script, *SMALL, "--steps=3", "--seeds=1", *options, folder=tmp_path,
                                        world_size=2))
    rows = rows_of(finished.stdout)
    assert len(rows) == 2 and rows == table(capsys, f"{digits}/tokenizer.pt", *options[1:], seeds=1)
