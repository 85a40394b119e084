"""The set tokenizer: what makes its tokens a set, and its quantizer a quantizer (Sec. 3.1)."""
import pytest
import torch
import torch.nn.functional as F

from tokenizer import Attention, Quantizer, SetTokenizer


def small_tokenizer(channels=1, model_class=SetTokenizer, seed=0, **settings):
    """A tokenizer of 8 x 8 images, 6 tokens, 10 codes, with large random matrices, as the blocks of a new one are the
    identity."""
    torch.manual_seed(seed)
    defaults = dict(image_size=8, channels=channels, patch_size=4, num_tokens=6, codebook_size=10, code_dim=5, width=32,
                    heads=2, encoder_layers=2, decoder_layers=2)
    model = model_class(**defaults | settings)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def decoder_inputs(model):
    """A list to which every later call of the decoder appends the codes (B, M, code_dim) that it receives."""
    received = []
    model.decoder.register_forward_pre_hook(lambda module, args: received.append(args[0].detach()))
    return received


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_ranges(channels):
    """Fails if a public shape or range is wrong. One class serves grey and colour images."""
    model, images = small_tokenizer(channels), torch.rand(7, channels, 8, 8) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (7, 6) and tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < 10
    assert model.decode(tokens).shape == images.shape
    reconstructions, same, latents, loss = model(images)
    assert reconstructions.shape == images.shape and torch.equal(same, tokens)
    assert latents.shape == (7, 6, 5) and torch.allclose(latents.norm(dim=2), torch.ones(7, 6)) and loss.shape == ()
    assert torch.allclose(reconstructions, model.decode(tokens), atol=1e-5)


def test_decoding_does_not_depend_on_the_order_of_tokens():
    """Fails if the tokens are a sequence and not a set (Table 1): original, reversed, shuffled, ascending,
    descending."""
    model = small_tokenizer(num_tokens=40)
    tokens = torch.randint(10, (9, 40))
    pixels = model.decode(tokens)
    assert pixels.std(0).mean() > 0.005  # different sets do give different images
    orders = [tokens.flip(1), tokens[:, torch.randperm(40)], tokens.sort(1).values,
              tokens.sort(1, descending=True).values]
    for order in orders:
        assert (model.decode(order) - pixels).abs().max() < 1e-5


def test_training_shuffles_the_tokens():
    """Fails if the decoder receives tokens in the encoder's order in training, or if the shuffle loses or mixes up
    tokens."""
    model, images = small_tokenizer(), torch.rand(5, 1, 8, 8)
    received = decoder_inputs(model)
    plain = model(images)[0]
    shuffled = model(images, torch.rand(5, 6))[0]
    assert not torch.equal(received[0], received[1])
    for before, after in zip(*received):
        match = torch.cdist(before, after) < 1e-6
        assert match.any(1).all() and match.any(0).all()
        assert torch.allclose(before.sum(0), after.sum(0), atol=1e-5)
    assert (plain - shuffled).abs().max() < 1e-5  # the decoder cannot tell the difference


def test_unquantized_images_skip_the_quantizer():
    """Fails if the decoder does not learn from exact latents, other images than those chosen skip the quantizer, or
    tokens and losses depend on it."""
    model, images = small_tokenizer(), torch.rand(3, 1, 8, 8) * 2 - 1
    received = decoder_inputs(model)
    plain, *rest = model(images)
    skipped, *same = model(images, unquantized=torch.tensor([False, True, False]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest, same))
    codes, latents = received[0], rest[1]
    assert torch.equal(received[1], torch.stack([codes[0], latents[1], codes[2]])) and not torch.equal(codes, latents)
    assert torch.allclose(plain[::2], skipped[::2], atol=1e-5) and (plain[1] - skipped[1]).abs().max() > 1e-3


def test_repeated_tokens_count():
    """Fails if {a, a, b} and {a, b, b} decode alike, so that counts above one carry no information, or if sets of
    another size, which other generative models make, can't be decoded."""
    for number in (3, 6, 20):
        tokens = torch.ones(2, number, dtype=torch.int64)
        tokens[0, -1], tokens[1, 1:] = 2, 2
        one, two = small_tokenizer().decode(tokens)
        assert (one - two).abs().max() > 1e-2


def test_the_token_is_the_nearest_code():
    """Fails if the token is not the nearest code on the unit sphere."""
    quantizer = Quantizer(50, 12, 0.25)
    torch.nn.init.normal_(quantizer.codebook, std=3)  # lengths must not matter
    latents = F.normalize(torch.randn(8, 9, 12), dim=2)
    q, tokens, _ = quantizer(latents)
    codes = quantizer.codebook / quantizer.codebook.norm(dim=1, keepdim=True)
    distances = (latents[:, :, None] - codes).square().sum(3)  # (8, 9, 50)
    assert torch.equal(tokens, distances.argmin(2))
    assert torch.allclose(q, codes[tokens], atol=1e-6)


def test_straight_through_gradient():
    """Fails if the encoder does not receive the decoder's gradient as it is, or if the codebook receives some."""
    quantizer = Quantizer(50, 12, 0.25)
    latents = F.normalize(torch.randn(8, 9, 12), dim=2).requires_grad_()
    q, _, _ = quantizer(latents)
    gradient = torch.randn_like(q)
    q.backward(gradient)
    assert torch.equal(latents.grad, gradient)
    assert quantizer.codebook.grad is None or not quantizer.codebook.grad.any()


def test_quantizer_loss():
    """Fails if codes do not move to their latents with weight 1, or latents to their codes with the commitment's
    weight."""
    quantizer = Quantizer(50, 12, 0.25)
    latents = F.normalize(torch.randn(8, 9, 12), dim=2).requires_grad_()
    _, tokens, loss = quantizer(latents)
    codes = quantizer.codes()[tokens]
    assert loss.item() == pytest.approx(1.25 * (latents - codes).square().mean().item(), rel=1e-5)
    loss.backward()
    assert torch.allclose(latents.grad, 0.25 * 2 * (latents - codes).detach() / latents.numel(), atol=1e-7)
    assert quantizer.codebook.grad[tokens.unique()].abs().sum() > 0


@pytest.mark.parametrize("length", [5, 300])
def test_attention_is_pytorchs(length):
    """Fails if the plain formula, for few keys, or the fused kernel, for many, computes another attention than
    PyTorch's module."""
    ours, theirs = Attention(24, 3), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x = torch.randn(2, length, 24)
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-5)


@pytest.mark.parametrize("wrong, words", [
    (lambda: small_tokenizer(image_size=9), "image_size 9 is not a multiple of patch_size 4"),
    (lambda: small_tokenizer(heads=3), "width 32 is not a multiple of heads 3"),
    (lambda: small_tokenizer().decode(torch.tensor([[1, 10]])), r"token 10 is outside \[0, 10\)"),
    (lambda: small_tokenizer().decode(torch.tensor([[-1]])), r"token -1 is outside"),
    (lambda: small_tokenizer(vqgan_width=32), "patches of 16 pixels in 3 channels, not of 4 in 1"),
])
def test_bad_input_is_refused(wrong, words):
    """Fails if bad input raises no error, or another one."""
    with pytest.raises(ValueError, match=words):
        wrong()


def test_the_vqgan_decodes_the_proxy_map():
    """Fails if the pixel phase does not start from the map of codes that the proxy phase learned."""
    model = SetTokenizer(32, 3, 16, 6, 12, 4, 32, 2, 1, 1, vqgan_width=32, vqgan_dim=8)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    code_map, tokens = model(images, proxy=True)[:2]
    assert code_map.shape == (2, 8, 2, 2)
    assert torch.allclose(model.pixel_decoder(code_map), model.decode(tokens), atol=1e-5)
