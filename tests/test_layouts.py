"""The tokenizers whose tokens have an order, which the paper compares the set with."""
import pytest
import torch

from paper import layouts
from paper.layouts import GridTokenizer, SequenceTokenizer
from tests.conftest import few_digits
from tests.scripts import assert_one_sentence, run_here, successful
from tests.test_tokenizer import small_tokenizer
from tests.test_train_tokenizer import TINY

LAYOUTS = {"set": {}, "sequence": {"model_class": SequenceTokenizer},  # for small_tokenizer()
           "grid": {"model_class": GridTokenizer, "num_tokens": 4}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_matters_but_to_a_set(layout):
    """Fails if a sequence or a grid is a set in disguise, or the set a sequence."""
    model = small_tokenizer(**LAYOUTS[layout])
    M = model.num_tokens
    tokens = torch.stack([torch.randperm(10)[:M] for _ in range(20)])  # no token twice, so that every order is another
    pixels = model.decode(tokens)
    for order in (tokens.flip(1), tokens.roll(1, 1)):
        change = (model.decode(order) - pixels).abs().amax((1, 2, 3))
        assert change.max() < 1e-5 if layout == "set" else change.min() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_decodes_as_decode_does(layout):
    """Fails if the tokens of a sequence or a grid are shuffled in training, or forward() and decode() differ."""
    model, images = small_tokenizer(**LAYOUTS[layout]), torch.rand(7, 1, 8, 8) * 2 - 1
    assert model.encode(images).shape == (7, model.num_tokens)
    latents = torch.randn(7, model.num_tokens, 5)  # this encoder's own give few different tokens
    model.encoder.forward = lambda images: latents
    reconstructions, tokens, _, _ = model(images, torch.rand(7, model.num_tokens))
    assert torch.equal(tokens, model.encode(images)) and all(len(row.unique()) > 1 for row in tokens)
    assert torch.allclose(reconstructions, model.decode(tokens), atol=1e-5)


def test_tokens_of_a_grid_have_their_positions():
    """Fails if token p of a grid is not that of patch p, row by row."""
    model = small_tokenizer(**LAYOUTS["grid"])
    for block in model.encoder.blocks:  # without attention a position depends on its own patch only
        torch.nn.init.zeros_(block.attention.proj.weight)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    latents = model.encoder(images)
    for p, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        changed = images.clone()
        changed[:, :, row:row + 4, column:column + 4] *= -1
        moved = (model.encoder(changed) - latents).abs().amax(2) > 1e-6
        assert moved.tolist() == [[position == p for position in range(4)]] * 4


@pytest.mark.slow
@pytest.mark.parametrize("layout, M", [("sequence", 5), ("grid", 16)])
def test_both_are_trained(layout, M, few_to_train_on, tmp_path):
    """Fails if what the paper compares with can't be trained or resumed, or is a set again in a checkpoint."""
    for arguments in ([*TINY, f"--num_tokens={M}", "--steps=2"], ["--resume", "--steps=3"]):
        successful(run_here(layouts.main, layout, *arguments, folder=tmp_path))
    checkpoint = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    assert (checkpoint["step"], checkpoint["kind"]) == (3, f"{layout} tokenizer")
    model = layouts.KINDS[checkpoint["kind"]](**checkpoint["model_config"])
    model.load_state_dict(checkpoint["weights"])
    assert model.encode(few_digits("test", 3).images / 127.5 - 1).shape == (3, M)


def test_mistakes_get_one_sentence(tmp_path):
    """Fails if a mistake on the command line ends in a traceback."""
    assert_one_sentence(run_here(layouts.main, "grid", *TINY, folder=tmp_path), "each of the 16 patches")
