"""Muon against torch.optim.Muon and its formula, the groups of weights, the learning rate, exact resume."""
from types import SimpleNamespace

import pytest
import torch

from fsdd import Denoiser
from support.optimizers import Muon, make_optimizers, warmup_cosine

SHAPES = [(16, 16), (48, 16), (16, 64), (16, 16), (1, 8)]


def steps(optimizer_class, number, **settings):
    """The weights after a number of steps; starts and gradients are the same in every call."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = optimizer_class(weights, lr=0.03, weight_decay=0.1, **settings)
    for _ in range(number):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight) * (i < 4)  # the last one has a gradient of 0
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("bfloat16", [True, False])
def test_muon_is_pytorchs(bfloat16):
    """Fails if momentum, Nesterov's step, the iterations, weight decay or the scale of the step are not those of
    torch.optim.Muon, which multiplies in bfloat16, if weights of one shape mix, or if a gradient of 0 gives NaN."""
    start, ours = steps(Muon, 0), steps(Muon, 5, bf16=bfloat16)
    theirs = steps(torch.optim.Muon, 5, adjust_lr_fn="match_rms_adamw")
    for before, mine, other in zip(start, ours, theirs):
        assert (mine - other).norm() < 0.02 * (other - before).norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_one_optimizer(optimizer):
    """Fails if a weight is left out or stepped twice, or if norms, biases and embeddings decay."""
    cfg = SimpleNamespace(optimizer=optimizer, lr=0.2, muon_lr=0.1, weight_decay=0.5, bf16="auto")
    model = Denoiser(12, 6, 3, 32, 2, 2)
    model.class_embedding.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for decay_all in (False, True):
        made = make_optimizers(model, cfg, 0.99, decay_all)
        groups = [group for one in made for group in one.param_groups]
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, trained))
        decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        assert decay[id(model.to_logits.weight)] == decay[id(model.blocks[0].mlp[0].weight)] == 0.5
        for p in (model.to_logits.bias, model.code_embedding, model.count_embedding.weight):
            assert decay[id(p)] == (0.5 if decay_all else 0.0)
    with_muon = {id(p) for one in made if isinstance(one, Muon) for p in one.param_groups[0]["params"]}
    expected = {id(p) for p in model.blocks.parameters() if p.ndim == 2} if optimizer == "muon" else set()
    assert with_muon == expected


def test_warmup_and_cosine():
    """Fails if the learning rate does not rise over the warm-up and fall along a cosine to its end, or does not stay
    where the end is 1."""
    assert [warmup_cosine(step, 9, 0, 0.6) for step in (0, 3, 6, 9, 10)] == pytest.approx([1, 0.9, 0.7, 0.6, 0.6])
    assert [warmup_cosine(step, 1000000, 4, 0.1) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert [warmup_cosine(step, 10, 2, 1.0) for step in range(12)] == [0.5] + [1.0] * 11
