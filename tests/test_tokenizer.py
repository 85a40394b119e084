"""The set tokenizer: what makes its tokens a set, and its quantizer a quantizer (Sec. 3.1)."""
import pytest
import torch
import torch.nn.functional as F

from tokenizer import VQGAN, Attention, PatchPixels, Quantizer, SetTokenizer


def small_tokenizer(channels=1, random=True, **settings):
    """A tokenizer of 8 x 8 images, 6 tokens, 10 codes; with random weights, as the blocks of a fresh one are the identity."""
    torch.manual_seed(0)
    defaults = dict(image_size=8, channels=channels, patch_size=4, num_tokens=6, codebook_size=10, code_dim=5, width=32,
                    heads=2, encoder_layers=2, decoder_layers=2)
    model = SetTokenizer(**defaults | settings)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_ranges(channels):
    """Broken: the public shapes; one class serves grey and colour images."""
    model, images = small_tokenizer(channels), torch.rand(7, channels, 8, 8) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (7, 6) and tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < 10
    assert model.decode(tokens).shape == images.shape
    reconstructions, same, latents, loss = model(images)
    assert reconstructions.shape == images.shape and torch.equal(same, tokens)
    assert latents.shape == (7, 6, 5) and torch.allclose(latents.norm(dim=2), torch.ones(7, 6)) and loss.shape == ()
    assert torch.allclose(reconstructions, model.decode(tokens), atol=1e-5)


def test_decoding_does_not_depend_on_order():
    """Broken: the tokens would be a sequence and not a set (Tab. 1): original, reversed, shuffled, ascending, descending."""
    model = small_tokenizer(num_tokens=40)
    tokens = torch.randint(10, (9, 40), generator=torch.Generator().manual_seed(1))
    pixels = model.decode(tokens)
    assert pixels.std(0).mean() > 0.005  # different sets do give different images
    orders = [tokens.flip(1), tokens[:, torch.randperm(40)], tokens.sort(1).values, tokens.sort(1, descending=True).values]
    for order in orders:
        assert (model.decode(order) - pixels).abs().max() < 1e-5


def test_training_shuffles_the_tokens():
    """Broken: the decoder would see tokens in the encoder's order in training; or the shuffle would lose or mix up tokens."""
    model, images, seen = small_tokenizer(), torch.rand(5, 1, 8, 8), []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    plain = model(images)[0]
    shuffled = model(images, torch.rand(5, 6, generator=torch.Generator().manual_seed(2)))[0]
    assert not torch.equal(seen[0], seen[1])
    for before, after in zip(*seen):
        match = torch.cdist(before, after) < 1e-6
        assert match.any(1).all() and match.any(0).all()
        assert torch.allclose(before.sum(0), after.sum(0), atol=1e-5)
    assert (plain - shuffled).abs().max() < 1e-5  # for the decoder cannot tell the difference


@pytest.mark.parametrize("number", [1, 3, 20])
def test_decoder_takes_any_number_of_tokens(number):
    """Broken: sets of a wrong size, which other generative models make, could not be looked at."""
    assert small_tokenizer().decode(torch.zeros(2, number, dtype=torch.int64)).shape == (2, 1, 8, 8)


def test_repeated_tokens_count():
    """Broken: {a, a, b} and {a, b, b} would decode alike, and counts above one would carry nothing."""
    one, two = small_tokenizer().decode(torch.tensor([[1, 1, 1, 1, 1, 2], [1, 2, 2, 2, 2, 2]]))
    assert (one - two).abs().max() > 1e-2


def test_encoding_an_image_ignores_its_neighbours():
    """Broken: an image's tokens would depend on what else is in the batch."""
    model, images = small_tokenizer(), torch.rand(6, 1, 8, 8) * 2 - 1
    alone = torch.cat([model.encode(image[None]) for image in images])
    assert torch.equal(model.encode(images), alone)
    assert len(alone.unique(dim=0)) > 1


def test_nearest_code():
    """Broken: the token would not be the nearest code on the unit sphere."""
    quantizer = Quantizer(50, 12, 0.25)
    torch.nn.init.normal_(quantizer.codebook, std=3)  # lengths must not matter
    latents = F.normalize(torch.randn(8, 9, 12), dim=2)
    q, tokens, _ = quantizer(latents)
    codes = quantizer.codebook / quantizer.codebook.norm(dim=1, keepdim=True)
    distances = (latents[:, :, None] - codes).square().sum(3)  # (8, 9, 50)
    assert torch.equal(tokens, distances.argmin(2))
    assert torch.allclose(q, codes[tokens], atol=1e-6)


def test_straight_through_gradient():
    """Broken: the encoder would not get the decoder's gradient as it is, or the codebook would get some of it."""
    quantizer = Quantizer(50, 12, 0.25)
    latents = F.normalize(torch.randn(8, 9, 12), dim=2).requires_grad_()
    q, _, _ = quantizer(latents)
    gradient = torch.randn_like(q)
    q.backward(gradient)
    assert torch.equal(latents.grad, gradient)
    assert quantizer.codebook.grad is None or not quantizer.codebook.grad.any()


def test_quantizer_loss():
    """Broken: codes must move to their latents with weight 1, latents to their codes with the commitment's weight."""
    quantizer = Quantizer(50, 12, 0.25)
    latents = F.normalize(torch.randn(8, 9, 12), dim=2).requires_grad_()
    _, tokens, loss = quantizer(latents)
    codes = quantizer.codes()[tokens]
    assert loss.item() == pytest.approx(1.25 * (latents - codes).square().mean().item(), rel=1e-5)
    loss.backward()
    assert torch.allclose(latents.grad, 0.25 * 2 * (latents - codes).detach() / latents.numel(), atol=1e-7)
    assert quantizer.codebook.grad[tokens.unique()].abs().sum() > 0


@pytest.mark.parametrize("settings", [{}, {"layout": "sequence"}, {"layout": "grid", "num_tokens": 4}])
def test_every_weight_is_trained(settings):
    """Broken: some weight would never get a gradient."""
    model = small_tokenizer(**settings)
    reconstructions, _, _, loss = model(torch.rand(6, 1, 8, 8) * 2 - 1)
    (reconstructions.square().mean() + loss).backward()
    assert [name for name, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())] == []


def test_patches_go_to_their_places():
    """Broken: a patch's pixels would land at another place, or mixed up within it."""
    head = PatchPixels(grid=3, channels=2, patch_size=4, width=32)
    with torch.no_grad():
        head.to_pixels.weight.copy_(torch.eye(32))
        head.to_pixels.bias.zero_()
    features = torch.arange(9 * 32.0).view(1, 9, 32)
    images = head(features)
    assert images.shape == (1, 2, 12, 12)
    for place in range(9):
        row, column = place // 3 * 4, place % 3 * 4
        assert torch.equal(images[0, :, row:row + 4, column:column + 4].flatten(), features[0, place])


@pytest.mark.parametrize("length", [5, 64, 300])
def test_attention_is_attention(length):
    """Broken: the written-out attention for short sequences would differ from PyTorch's."""
    ours, theirs = Attention(24, 3), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x = torch.randn(2, length, 24)
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-5)


@pytest.mark.parametrize("wrong, words", [
    (lambda: small_tokenizer(image_size=9), "image_size 9 is not a multiple of patch_size 4"),
    (lambda: small_tokenizer(heads=3), "width 32 is not a multiple of heads 3"),
    (lambda: small_tokenizer().decode(torch.tensor([[1, 10]])), r"tokens\[0, 1\] = 10 is outside \[0, 10\)"),
    (lambda: small_tokenizer().decode(torch.tensor([[-1]])), r"tokens\[0, 0\] = -1 is outside"),
    (lambda: small_tokenizer().decode(torch.tensor([[1.0]])), "int64 tensor, got torch.float32"),
    (lambda: small_tokenizer(layout="bag"), "layout must be set, sequence or grid, got 'bag'"),
    (lambda: small_tokenizer(layout="grid"), "each of the 4 patches, got num_tokens 6"),
    (lambda: small_tokenizer(layout="sequence").decode(torch.zeros(2, 5, dtype=torch.int64)), "a sequence has 6 tokens, got 5"),
    (lambda: small_tokenizer(layout="grid", num_tokens=4).decode(torch.tensor([[0] * 5])), "a grid has 4 tokens, got 5"),
])
def test_bad_input_is_refused(wrong, words):
    """Broken: bad input would fail somewhere inside, or not at all."""
    with pytest.raises(ValueError, match=words):
        wrong()


# --- the layouts that the paper compares the set with ----------------------------------------------------------------

LAYOUTS = {"set": {}, "sequence": {"layout": "sequence"}, "grid": {"layout": "grid", "num_tokens": 4}}  # for small_tokenizer()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_sees_the_order(layout):
    """Broken: a sequence or a grid would be a set in disguise, or the set a sequence."""
    model = small_tokenizer(**LAYOUTS[layout])
    M = model.num_tokens
    tokens = torch.stack([torch.randperm(10)[:M] for _ in range(20)])  # no token twice, so that every order is another one
    pixels = model.decode(tokens)
    for order in (tokens.flip(1), tokens.roll(1, 1)):
        change = (model.decode(order) - pixels).abs().amax((1, 2, 3))
        assert change.max() < 1e-5 if layout == "set" else change.min() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_sees_what_decoding_sees(layout):
    """Broken: the tokens of a sequence or a grid would be shuffled in training, or forward() and decode() would differ."""
    model, images = small_tokenizer(**LAYOUTS[layout]), torch.rand(7, 1, 8, 8) * 2 - 1
    assert model.encode(images).shape == (7, model.num_tokens)
    latents = torch.randn(7, model.num_tokens, 5)  # this encoder's own tell few tokens apart
    model.encoder.forward = lambda images: latents
    trained, tokens, _, _ = model(images, torch.rand(7, model.num_tokens))
    assert torch.equal(tokens, model.encode(images)) and all(len(row.unique()) > 1 for row in tokens)
    assert torch.allclose(trained, model.decode(tokens), atol=1e-5)


def test_tokens_of_a_grid_stand_at_their_places():
    """Broken: token p of a grid would not be that of patch p, row by row."""
    model = small_tokenizer(**LAYOUTS["grid"])
    for block in [*model.encoder.blocks, *model.decoder.blocks]:  # without attention a place sees only itself
        torch.nn.init.zeros_(block.attention.proj.weight)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    latents = model.encoder(images)
    for p, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        changed = images.clone()
        changed[:, :, row:row + 4, column:column + 4] *= -1
        moved = (model.encoder(changed) - latents).abs().amax(2) > 1e-6
        assert moved.tolist() == [[place == p for place in range(4)]] * 4


def test_layouts_differ_only_in_their_positions():
    """Broken: checkpoints of sets would no longer load, or the layouts compared would differ in more than what they say."""
    shapes = {layout: {name: tuple(weight.shape) for name, weight in small_tokenizer(**LAYOUTS[layout]).state_dict().items()}
              for layout in LAYOUTS}
    assert "decoder.token_positions" not in shapes["set"] and small_tokenizer().layout == "set"
    assert shapes["sequence"] == shapes["set"] | {"decoder.token_positions": (6, 32)}
    assert shapes["grid"] == shapes["set"] | {"decoder.token_positions": (4, 32), "encoder.latents": (0, 32)}


# --- MaskGIT-VQGAN ---------------------------------------------------------------------------------------------------


def random_vqgan(num_codes=20):
    model = VQGAN(32, 8, num_codes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3) + ("norm" in name))
    return model


def test_vqgan_has_the_published_sizes():
    """Broken: the published file would not load."""
    with torch.device("meta"):
        model = VQGAN()
    weights = model.state_dict()
    assert len(weights) == 168 and sum(weight.numel() for weight in weights.values()) == 54515587
    for name, shape in {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down.2.block.0.nin_shortcut.weight": (256, 256, 1, 1),
                        "encoder.down.4.block.1.conv2.weight": (512, 512, 3, 3), "encoder.conv_out.bias": (256,),
                        "decoder.conv_in.weight": (512, 256, 3, 3), "decoder.up.3.block.0.conv1.weight": (256, 512, 3, 3),
                        "decoder.up.1.upsample_conv.bias": (128,), "decoder.conv_out.weight": (3, 128, 3, 3),
                        "quantize.embedding.weight": (1024, 256)}.items():
        assert weights[name].shape == shape, name
    assert not {"encoder.conv_in.bias", "decoder.up.0.upsample_conv.weight", "decoder.up.4.block.0.nin_shortcut.weight"} & set(weights)


def test_vqgan_encoder_is_that_of_the_published_weights():
    """Broken: the proxy codes would not be MaskGIT-VQGAN's."""
    model = random_vqgan()
    w = {name.removeprefix("encoder."): weight for name, weight in model.state_dict().items() if name.startswith("encoder.")}
    norm = lambda x, name: F.silu(F.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], 1e-6))  # noqa: E731

    def residual(x, name):
        y = F.conv2d(norm(x, name + ".norm1"), w[name + ".conv1.weight"], padding=1)
        y = F.conv2d(norm(y, name + ".norm2"), w[name + ".conv2.weight"], padding=1)
        return y + (F.conv2d(y, w[name + ".nin_shortcut.weight"]) if name + ".nin_shortcut.weight" in w else x)

    images = torch.rand(2, 3, 48, 32) * 2 - 1
    with torch.no_grad():
        x = F.conv2d(images / 2 + 0.5, w["conv_in.weight"], padding=1)
        for level in range(5):
            x = residual(residual(x, f"down.{level}.block.0"), f"down.{level}.block.1")
            if level < 4:
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        x = norm(residual(residual(x, "mid.0"), "mid.1"), "norm_out")
        x = F.conv2d(x, w["conv_out.weight"], w["conv_out.bias"])
        assert torch.allclose(model.encoder(images), x, atol=1e-4) and x.std() > 0.1
    codes = model.quantize["embedding"].weight
    nearest = torch.cdist(x.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(1).view(2, 3, 2)
    assert torch.equal(model.encode(images), nearest) and len(nearest.unique()) > 1


def test_vqgan_logits_are_negative_squared_distances():
    """Broken: cross-entropy would not pull the map to the codes that the VQGAN's decoder draws."""
    model = random_vqgan()
    code_map = torch.randn(2, 8, 3, 3)
    codes = model.quantize["embedding"].weight
    expected = -(code_map[:, None] - codes[None, :, :, None, None]).square().sum(2)
    assert torch.allclose(model.logits(code_map), expected, atol=1e-4)
    drawn = codes[torch.randint(20, (1, 3, 3))].permute(0, 3, 1, 2)
    assert model.logits(drawn).amax(1).abs().max() < 1e-4  # a code itself is at distance 0


def test_recomputed_activations_change_nothing():
    """Broken: activation checkpointing would train another model."""
    model = SetTokenizer(32, 3, 16, 6, 12, 4, 32, 2, 2, 2, vqgan_width=32, vqgan_dim=8)
    images, gradients = torch.rand(2, 3, 32, 32) * 2 - 1, []
    for recompute in (False, True):
        model.encoder.recompute = model.decoder.recompute = recompute
        model.zero_grad()
        reconstructions, _, _, loss = model(images)
        (reconstructions.square().mean() + loss).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for ours, theirs in zip(*gradients):
        assert torch.equal(ours, theirs)


def test_the_proxy_map_is_what_the_vqgan_draws():
    """Broken: the pixel phase would not go on from where the proxy phase ended."""
    model = SetTokenizer(32, 3, 16, 6, 12, 4, 32, 2, 1, 1, vqgan_width=32, vqgan_dim=8)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    code_map, tokens = model(images, proxy=True)[:2]
    assert code_map.shape == (2, 8, 2, 2)
    assert torch.allclose(model.pixel_decoder(code_map), model.decode(tokens), atol=1e-5)
