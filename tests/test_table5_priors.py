"""Table 5: ways to model the sets, trained, tuned and measured alike."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import sample_noise
from paper import table5_priors
from paper.inputs import open_tokenizer
from tests.scripts import read_table

SMALL = ["--num_images=40", "--num_search=20", "--search_steps=2", "--device=cpu"]


@pytest.fixture
def small(monkeypatch):
    """Tiny models, and a search of few settings."""
    for name, value in {"width": 16, "layers": 1, "heads": 2, "batch_size": 8}.items():
        monkeypatch.setitem(table5_priors.SETTINGS, name, value)
    monkeypatch.setattr(table5_priors, "SAMPLING", ({"steps": 2, "times": "even"}, {"steps": 3, "times": "middle"}))
    monkeypatch.setattr(table5_priors, "TRUNCATIONS", table5_priors.TRUNCATIONS[1:])
    monkeypatch.setattr(table5_priors, "GUIDANCE", ("4", "1.2,7"))
    monkeypatch.setattr(table5_priors, "LEARNING_RATES", ((2.0, 2.0), (4.0, 1.0)))
    monkeypatch.setitem(table5_priors.FIRST, "steps", 2)


def rows_of(capsys, ckpt, *options, seeds=2):
    """The rows that are printed: {method: cells}."""
    table5_priors.main([f"--ckpt={ckpt}", *SMALL, "--steps=3", f"--seeds={seeds}", *options])
    return {row[0]: row[1:] for row in read_table(capsys.readouterr().out)}


@pytest.mark.slow
def test_the_table(digits, cache, small, capsys, monkeypatch):
    """Fails if a method is left out, is given other models or searches than the rest, or has a wrong sum unnoticed."""
    rows = rows_of(capsys, f"{digits}/tokenizer.pt")
    assert list(rows) == list(table5_priors.METHODS)
    for method, (*properties, paper, fid, classified, wrong, error, parameters, rates, times, setting) in rows.items():
        assert "±" in fid and float(fid.split("±")[0]) > 0 and parameters.endswith(" M")
        assert rates in ("x 2", "x 4 and 1") and setting.split("; ")[2] in table5_priors.GUIDANCE
        assert (times == "") == table5_priors.is_autoregressive(method)
        keeps = method.startswith("AR-") or properties[2] == "x"  # M tokens one by one, or a sum that the model knows
        assert (wrong == "0.0%") == keeps and bool(error) != keeps
        # two learning rates, the best for longer, and with another seed
        name = method.replace(" ", "")
        assert len(list(cache.glob(f"{name}-lr*-seed0-*.pt"))) == (1 if method == "FSDD (paper)" else 3)
        assert len(list(cache.glob(f"{name}-lr*-seed1-*.pt"))) == 1
    monkeypatch.setattr(table5_priors, "train", None)  # nothing is trained or measured again
    monkeypatch.setattr(table5_priors, "measure_samples", None)
    assert rows_of(capsys, f"{digits}/tokenizer.pt") == rows


def test_counts_of_any_sum_are_decoded(digits):
    """Fails if samples of a wrong sum are left out, truncated, or change rows."""
    tokenizer = open_tokenizer(f"{digits}/tokenizer.pt", None, torch.device("cpu"))[0]
    counts = torch.cat([sample_noise(3, 64, M, "multinomial") for M in (5, 6, 0, 19, 6)])[torch.randperm(15)]
    one_by_one = [sample.decode(tokenizer, counts_to_tokens(row[None])) for row in counts]
    difference = table5_priors.decode(tokenizer, counts).int() - torch.cat(one_by_one).int()
    assert difference.abs().max() <= 1  # rounding


def test_batches():
    """Fails if AR-order1 and 2 learn more than one order, or AR-random only one, or a method learns other images or
    labels than the rest."""
    tokens = torch.stack([torch.randperm(64)[:6] for _ in range(100)])
    cfg = SimpleNamespace(batch_size=20, seed=3, label_drop=0.1, noise="multinomial", training_times="uniform")
    task = SimpleNamespace(tokens=tokens.numpy().astype(np.uint16)[None], M=6, C=64, device=torch.device("cpu"),
                           class_names=list("0123456789"), labels=torch.randint(10, (100,)),
                           first_axis=torch.rand(64))
    orders, expected = {}, table5_priors.draw_batch("FSDD", task, 5, cfg)
    for method in ("AR-order1", "AR-order2", "AR-random", "AR-sorted"):
        batch = table5_priors.draw_batch(method, task, 5, cfg)
        assert torch.equal(tokens_to_counts(batch.x0, 64), expected.x0) and torch.equal(batch.labels, expected.labels)
        if method == "AR-sorted":
            assert (task.first_axis[batch.x0].diff(dim=1) >= 0).all()
            continue
        images = [next(row for row in tokens.tolist() if sorted(row) == sorted(x)) for x in batch.x0.tolist()]
        orders[method] = {tuple(map(image.index, x)) for image, x in zip(images, batch.x0.tolist())}
    assert len(orders["AR-order1"]) == len(orders["AR-order2"]) == 1 < len(orders["AR-random"])
    assert orders["AR-order1"] != orders["AR-order2"]


@pytest.mark.parametrize("method", table5_priors.METHODS)
def test_training_lowers_the_loss(method, small, monkeypatch):
    """Fails if a method's batch, model and loss do not belong together, or the loop does not train."""
    task = SimpleNamespace(tokens=np.arange(6, dtype=np.uint16)[None, None].repeat(50, 1), M=6, C=20,
                           device=torch.device("cpu"), class_names=list("0123456789"),
                           labels=torch.zeros(50, dtype=torch.int64), first_axis=torch.arange(20.0))
    settings = table5_priors.SETTINGS | {"steps": 30, "warmup": 1, "ema": 0.5, "seed": 0, "bf16": "off"}
    cfg = SimpleNamespace(**settings | {"noise": "masked" if method == "masked tokens" else "multinomial"})
    model, batch = table5_priors.build(method, task), table5_priors.draw_batch(method, task, 40, cfg)

    def loss(model):
        torch.manual_seed(1)  # the same noise before and after
        return table5_priors.METHODS[method][-1](model, batch).item()

    before = loss(model)
    assert loss(table5_priors.train(method, model, task, cfg)) < 0.9 * before
