"""The authors' weights: a literal transcription of the released models, on tensors with the released names, against
ours.

No published file is needed: weights are made by a rule from the list of tensors. With narrow models in pytest; at full
size, S and B, which takes some minutes and 8 GiB of memory, by a command that leaves the made files and checkpoints in
a folder:

    python -m tests.test_import_released_weights FOLDER
"""
import argparse
import math
import os
import sys
import zlib

import pytest
import torch
import torch.nn.functional as F

import generation
import sample
import train_fsdd
import train_tokenizer
from dual_transform import tokens_to_counts
from fsdd import Denoiser
from paper import import_released_weights
from tests.image_folder import make_image_folder
from tests.scripts import assert_one_sentence, run_here, successful
from tests.test_maskgit_vqgan import decoder_pixels
from tokenizer import SetTokenizer

PUBLISHED_TOKENIZER = dict(width=768, layers=12, num_tokens=128, codebook_size=4096, code_dim=12, grid=16,
                           vqgan_width=128, vqgan_dim=256)
PUBLISHED_FSDD = {"small": dict(width=384, layers=12, num_tokens=128, codebook_size=4096, num_classes=1000),
                  "base": dict(width=768, layers=12, num_tokens=128, codebook_size=4096, num_classes=1000)}
NARROW_TOKENIZER = dict(width=128, layers=2, num_tokens=24, codebook_size=40, code_dim=6, grid=3, vqgan_width=32,
                        vqgan_dim=20)
NARROW_FSDD = dict(width=128, layers=2, num_tokens=24, codebook_size=40, num_classes=30)

# --- the lists of tensors ------------------------------------------------------------------------------------


def both(name, *shape):
    """A weight and a bias of as many values as the weight has rows."""
    return {name + "weight": shape, name + "bias": shape[:1]}


def tokenizer_list(width, layers, num_tokens, codebook_size, code_dim, grid, vqgan_width, vqgan_dim):
    """The tensors of set_tokenizer_*.pth: {name: shape}."""
    shapes = {"latent_tokens": (num_tokens, width), "quantize.embedding.weight": (codebook_size, code_dim)}
    shapes |= both("encoder.patch_embed.", width, 3, 16, 16) | both("encoder.conv_out.", code_dim, width, 1, 1)
    shapes |= both("decoder.decoder_embed.", width, code_dim) | {"decoder.mask_token": (1, 1, width)}
    shapes |= both("decoder.ffn.0.", 2 * width, width, 1, 1) | both("decoder.ffn.2.", vqgan_dim, 2 * width, 1, 1)
    for side in ("encoder.", "decoder."):
        shapes |= {side + "class_embedding": (1, width), side + "positional_embedding": (grid ** 2 + 1, width)}
        shapes |= both(side + "ln_pre.", width) | both(side + "ln_post.", width)
        for i in range(layers):
            block = f"{side}transformer.{i}."
            shapes |= both(block + "ln_1.", width) | both(block + "ln_2.", width)
            shapes |= both(block + "attn.in_proj_", 3 * width, width) | both(block + "attn.out_proj.", width, width)
            shapes |= both(block + "mlp.c_fc.", 4 * width, width) | both(block + "mlp.c_proj.", width, 4 * width)
    return shapes | vqgan_decoder_list("pixel_decoder.", vqgan_width, vqgan_dim)


def residual_block_list(name, before, after):
    shapes = both(name + "norm1.", before) | both(name + "norm2.", after)
    shapes |= {name + "conv1.weight": (after, before, 3, 3), name + "conv2.weight": (after, after, 3, 3)}
    return shapes | ({} if before == after else {name + "nin_shortcut.weight": (after, after, 1, 1)})


def vqgan_decoder_list(name, width, dim):
    """The tensors of MaskGIT-VQGAN's decoder."""
    shapes = both(name + "conv_in.", 4 * width, dim, 3, 3) | both(name + "conv_out.", 3, width, 3, 3)
    shapes |= both(name + "norm_out.", width)
    for block in (0, 1):
        shapes |= residual_block_list(f"{name}mid.{block}.", 4 * width, 4 * width)
    before = 4 * width
    for level, after in ((4, 4 * width), (3, 2 * width), (2, 2 * width), (1, width), (0, width)):
        shapes |= residual_block_list(f"{name}up.{level}.block.0.", before, after)
        shapes |= residual_block_list(f"{name}up.{level}.block.1.", after, after)
        shapes |= both(f"{name}up.{level}.upsample_conv.", after, after, 3, 3) if level else {}
        before = after
    return shapes


def fsdd_list(width, layers, num_tokens, codebook_size, num_classes):
    """The tensors of fsdd_*.pth."""
    shapes = {"pos_embed": (1, codebook_size, width), "x_embedder.embedding_table.weight": (codebook_size + 1, width),
              "y_embedder.embedding_table.weight": (num_classes + 1, width)}
    shapes |= both("t_embedder.mlp.0.", width, 256) | both("t_embedder.mlp.2.", width, width)
    shapes |= both("final_layer.linear.", num_tokens + 1, width)
    shapes |= both("final_layer.adaLN_modulation.1.", 2 * width, width)
    for i in range(layers):
        block = f"blocks.{i}."
        shapes |= both(block + "attn.qkv.", 3 * width, width) | both(block + "attn.proj.", width, width)
        shapes |= both(block + "mlp.fc1.", 4 * width, width) | both(block + "mlp.fc2.", width, 4 * width)
        shapes |= both(block + "adaLN_modulation.1.", 6 * width, width)
    return shapes


# --- weights made by a rule ----------------------------------------------------------------------------------


SMALL = ("latent_tokens", "mask_token", "encoder.class_embedding", "decoder.class_embedding", "positional_embedding",
         # what a norm reads: its eps is felt
         "patch_embed", "decoder_embed", "ln_pre", "ffn.2", "pos_embed", "x_embedder")


def make(shapes):
    """A tensor for every name: normal, its seed the name's checksum, its scale such that no layer fades, bursts or
    saturates."""
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("bias"):
            values *= 0.1
        elif len(shape) == 1:  # of a norm
            values = 1 + 0.2 * values
        elif "embedding" not in name and "token" not in name and "pos_embed" not in name:
            # a matrix or convolution, outputs as large as inputs; attention is sharper; gates, shifts and scales are
            # about 0.7
            gain = 1.4 if "qkv" in name or "in_proj" in name else 0.7 if "adaLN" in name else 1.0
            values *= gain / math.sqrt(math.prod(shape[1:]))
        tensors[name] = values * 0.03 if any(part in name for part in SMALL) else values
    return tensors


def write_released(folder, tokenizer_sizes, fsdd_sizes):
    """The two files as the authors' repository has them. Returns their paths and tensors."""
    tokenizer, ema = make(tokenizer_list(**tokenizer_sizes)), make(fsdd_list(**fsdd_sizes))
    paths = os.path.join(folder, "set_tokenizer.pth"), os.path.join(folder, "fsdd.pth")
    torch.save(tokenizer, paths[0])
    torch.save({"ema": ema, "args": argparse.Namespace(model="DiT1D-S", lr=1e-4, results="results")}, paths[1])
    return paths, tokenizer, ema


# --- the released models, word for word ----------------------------------------------------------------------
# Plain operations on the released tensors w, in the order and under the names of the release. Images in [0, 1].


def layer_norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[name + "weight"], w[name + "bias"], 1e-5)


def attend(x, weight, bias, out_weight, out_bias, heads):
    """x (B, L, width): q, k, v stand one after the other in the rows of weight."""
    B, L, width = x.shape
    q, k, v = ((x @ part.T + shift).view(B, L, heads, -1)
               for part, shift in zip(weight.split(width), bias.split(width)))
    out = torch.empty_like(q)
    for h in range(heads):
        scores = torch.einsum("bld,bmd->blm", q[:, :, h], k[:, :, h]) / math.sqrt(width // heads)
        out[:, :, h] = scores.softmax(-1) @ v[:, :, h]
    return out.reshape(B, L, width) @ out_weight.T + out_bias


def vit(x, w, side):
    """LayerNorm, the pre-norm blocks with exact GELU, LayerNorm."""
    x = layer_norm(x, w, side + "ln_pre.")
    i = 0
    while f"{side}transformer.{i}.ln_1.weight" in w:
        block = f"{side}transformer.{i}."
        y = layer_norm(x, w, block + "ln_1.")
        names = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias")
        x = x + attend(y, *(w[block + name] for name in names), heads=x.shape[2] // 64)
        y = layer_norm(x, w, block + "ln_2.") @ w[block + "mlp.c_fc.weight"].T + w[block + "mlp.c_fc.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ w[block + "mlp.c_proj.weight"].T + w[block + "mlp.c_proj.bias"]
        i += 1
    return layer_norm(x, w, side + "ln_post.")


def encoder_latents(images, w):
    """Images (B, 3, H, W) in [0, 1] -> (B, M, code_dim), before the quantizer."""
    B, width = len(images), w["latent_tokens"].shape[1]
    x = F.conv2d(images, w["encoder.patch_embed.weight"], w["encoder.patch_embed.bias"], stride=16)
    x = x.reshape(B, width, -1).permute(0, 2, 1)
    x = torch.cat([w["encoder.class_embedding"].repeat(B, 1, 1), x], 1) + w["encoder.positional_embedding"]
    x = vit(torch.cat([x, w["latent_tokens"].repeat(B, 1, 1)], 1), w, "encoder.")
    M = len(w["latent_tokens"])
    x = x[:, len(w["encoder.positional_embedding"]):].contiguous().reshape(B, width, M, 1)  # the reshape
    x = F.conv2d(x, w["encoder.conv_out.weight"], w["encoder.conv_out.bias"])  # (B, code_dim, M, 1)
    return x[..., 0].permute(0, 2, 1)


def chosen_codes(latents, w):
    """(B, M): the nearest code, both sides on the unit sphere."""
    z, e = F.normalize(latents, dim=-1), F.normalize(w["quantize.embedding.weight"], dim=-1)
    return torch.stack([((row[:, None] - e) ** 2).sum(-1).argmin(-1) for row in z])


def decoded_pixels(tokens, w):
    """Tokens (B, M) -> images in [0, 1] but for overshoots."""
    codes = F.normalize(w["quantize.embedding.weight"][tokens], dim=-1)
    x = codes @ w["decoder.decoder_embed.weight"].T + w["decoder.decoder_embed.bias"]
    B, positions = len(tokens), len(w["decoder.positional_embedding"]) - 1
    masks = torch.cat([w["decoder.class_embedding"].repeat(B, 1, 1),
                       w["decoder.mask_token"].repeat(B, positions, 1)], 1)
    x = vit(torch.cat([masks + w["decoder.positional_embedding"], x], 1), w, "decoder.")[:, 1:1 + positions]
    side = math.isqrt(positions)
    x = x.permute(0, 2, 1).reshape(B, -1, side, side)
    x = torch.tanh(F.conv2d(x, w["decoder.ffn.0.weight"], w["decoder.ffn.0.bias"]))
    return decoder_pixels(F.conv2d(x, w["decoder.ffn.2.weight"], w["decoder.ffn.2.bias"]), w, "pixel_decoder")


def denoiser_logits(x_s, s, labels, w):
    """Counts (B, C), s (B,) with 1 = data, labels (B,) -> logits (B, C, M + 1)."""
    angles = s[:, None] * 10000 ** (-torch.arange(128, dtype=s.dtype) / 128)
    c = torch.cat([torch.cos(angles), torch.sin(angles)], 1)
    c = F.silu(c @ w["t_embedder.mlp.0.weight"].T + w["t_embedder.mlp.0.bias"])
    c = c @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"] + w["y_embedder.embedding_table.weight"][labels]
    x = w["x_embedder.embedding_table.weight"][x_s] + w["pos_embed"]

    def norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    i = 0
    while f"blocks.{i}.attn.qkv.weight" in w:
        attention = [w[f"blocks.{i}.attn.{name}"] for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")]
        shift1, scale1, gate1, shift2, scale2, gate2 = (F.silu(c) @ w[f"blocks.{i}.adaLN_modulation.1.weight"].T
                                                        + w[f"blocks.{i}.adaLN_modulation.1.bias"]).split(x.shape[2], 1)
        x = x + gate1[:, None] * attend(norm(x, shift1, scale1), *attention, heads=x.shape[2] // 64)
        y = norm(x, shift2, scale2) @ w[f"blocks.{i}.mlp.fc1.weight"].T + w[f"blocks.{i}.mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))
        x = x + gate2[:, None] * (y @ w[f"blocks.{i}.mlp.fc2.weight"].T + w[f"blocks.{i}.mlp.fc2.bias"])
        i += 1
    shift, scale = (F.silu(c) @ w["final_layer.adaLN_modulation.1.weight"].T
                    + w["final_layer.adaLN_modulation.1.bias"]).split(x.shape[2], 1)
    return norm(x, shift, scale) @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]


def doubled(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


# --- ours against them ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The narrow files, imported: folder, the released tensors of both, and what generation.load gives."""
    folder = tmp_path_factory.mktemp("released")
    (tokenizer_path, fsdd_path), tokenizer, ema = write_released(folder, NARROW_TOKENIZER, NARROW_FSDD)
    import_released_weights.main(["--tokenizer", tokenizer_path, "--fsdd", fsdd_path, "--out", str(folder / "fsdd.pt")])
    return folder, tokenizer, ema, generation.load(str(folder / "fsdd.pt"), torch.device("cpu"))


@torch.no_grad()
def compare_tokenizer(ours, w, images):
    """Largest differences of latents and pixels [0, 1], and the share of equal codes; checks that they are of some
    size."""
    latents, theirs = ours.encoder(images * 2 - 1), encoder_latents(images.to(w["latent_tokens"].dtype), w)
    tokens, codes = ours.encode(images * 2 - 1), chosen_codes(theirs, w)
    pixels, their_pixels = (ours.decode(codes) + 1) / 2, decoded_pixels(codes, w)
    # nothing fades or bursts
    assert 0.1 < theirs.std() < 10 and theirs.std((0, 1)).min() > 0.1 and 0.05 < their_pixels.std() < 5
    assert len(codes.unique()) > 0.1 * min(codes.numel(), ours.codebook_size)
    assert (their_pixels[0] - their_pixels[1]).std() > 0.01
    largest = [(x - y).abs().max().item() for x, y in ((latents, theirs), (pixels, their_pixels))]
    return largest[0], (tokens == codes).double().mean().item(), largest[1]


@torch.no_grad()
def compare_denoiser(ours, w, x, s, labels):
    """Largest difference of the logits; checks that they are of some size and depend on all three inputs."""
    theirs = denoiser_logits(x, s.to(w["pos_embed"].dtype), labels, w)
    assert 0.3 < theirs.std() < 10 and (theirs[0] - theirs[1]).std() > 0.1
    return (ours(x, 1 - s, labels) - theirs).abs().max().item()


def test_tokenizer_equals_the_release(imported):
    """Broken: a tensor would go to a wrong name, or a layer compute something else than the authors' does."""
    _, w, _, (_, ours, _) = imported
    latents, codes, pixels = compare_tokenizer(ours, doubled(w), torch.rand(6, 3, 48, 48))
    assert latents < 1e-4 and codes == 1 and pixels < 1e-4


def test_denoiser_equals_the_release(imported):
    """Broken: as above; or time would run the wrong way, or the null class be another row."""
    _, _, w, (ours, _, _) = imported
    x = torch.randint(25, (8, 40))
    s, labels = torch.linspace(0, 1, 8), torch.tensor([0, 29, 30, 3, 30, 7, 0, 1])
    w = doubled(w)
    assert compare_denoiser(ours, w, x, s, labels) < 1e-4
    alone = [denoiser_logits(x[:1], torch.tensor([s], dtype=torch.float64), torch.tensor([label]), w)
             for s, label in ((0, 0), (0.9, 0), (0, 30))]
    # time and label matter to what is compared
    assert (alone[1] - alone[0]).std() > 0.05 and (alone[2] - alone[0]).std() > 0.05


def test_lists_of_the_published_sizes():
    """Broken: the published files, 401 and 131 tensors of 203.3, 36.0 and 136.7 million values, would not be what is
    taken."""
    lists = [tokenizer_list(**PUBLISHED_TOKENIZER), *(fsdd_list(**sizes) for sizes in PUBLISHED_FSDD.values())]
    with torch.device("meta"):
        models = [SetTokenizer(256, 3, 16, 128, 4096, 12, 768, 12, 12, 12, vqgan_width=128, reshaped_latents=True),
                  Denoiser(4096, 128, 1000, 384, 12, 6, unused_rows=True),
                  Denoiser(4096, 128, 1000, 768, 12, 12, unused_rows=True)]
    assert [len(shapes) for shapes in lists] == [401, 131, 131]
    for shapes, model, millions in zip(lists, models, (203.3, 36.0, 136.7)):
        parameters = sum(map(math.prod, shapes.values()))
        assert sum(p.numel() for p in model.parameters()) == parameters and round(parameters / 1e6, 1) == millions


def test_checkpoint_has_the_releases_settings(imported):
    """Broken: sample.py would draw with other settings than the release's best."""
    folder, _, _, (_, _, checkpoint) = imported
    assert checkpoint["denoiser"] == "dense"
    assert checkpoint["generation"] == {"prior": "distinct", "sampler": "paper", "steps": 25, "guidance": "4,50,55",
                                        "top_p": 0.8, "top_k": 0}
    assert checkpoint["class_names"] == [str(i) for i in range(30)]
    alone = torch.load(folder / "tokenizer.pt", weights_only=True)
    assert alone["model_config"] == checkpoint["tokenizer"]["model_config"]


# --- the commands --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_scripts_take_it(imported, tmp_path):
    """Broken: a script would not take an imported checkpoint as one of ours; --resume on it would end in a
    traceback."""
    folder = imported[0]
    make_image_folder(tmp_path / "images", 40, classes=2)
    finished = run_here(sample.main, "--ckpt", folder / "fsdd.pt", "--labels=7,29", "--num=4", folder=tmp_path)
    assert "prior distinct, sampler paper, steps 25, guidance 4,50,55, top_p 0.8" in finished.stdout, finished.stderr
    successful(run_here(train_fsdd.main, "--recipe=imagenet256", "--data=images", "--tokenizer",
                        folder / "tokenizer.pt", "--steps=1", "--sample_steps=2", "--batch_size=2", "--width=64",
                        "--heads=1", "--layers=1", "--compile=false", "--workers=0", "--prior=distinct",
                        folder=tmp_path))
    for main, path in ((train_tokenizer.main, "tokenizer.pt"), (train_fsdd.main, "fsdd.pt")):
        assert_one_sentence(run_here(main, "--resume", "--out", folder / path, folder=tmp_path), path, "--resume")


def test_what_exists_is_kept(imported, tmp_path, capsys):
    """Broken: an import would overwrite what was trained here, or write more than it should."""
    for path in ("fsdd.pt", "tokenizer.pt"):
        (tmp_path / path).write_text("trained for weeks")
    command = ["--tokenizer", str(imported[0] / "set_tokenizer.pth")]
    import_released_weights.main(command)
    assert sorted(os.listdir()) == ["fsdd.pt", "tokenizer.pt", "tokenizer.pt.previous"]
    os.remove("tokenizer.pt")
    import_released_weights.main([*command, "--fsdd", str(imported[0] / "fsdd.pth")])
    assert "it is kept as fsdd.pt.previous" in capsys.readouterr().out
    for name in ("fsdd", "tokenizer"):
        assert (tmp_path / f"{name}.pt.previous").read_text() == "trained for weeks"
        assert torch.load(f"{name}.pt", weights_only=True)["kind"] == name


def change(tensors, **changes):
    """The tensors without those named (None) and with those given, dots written as __."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (tensors | changes).items() if value is not None}


@pytest.mark.parametrize("name, wrong, words", [
    ("fsdd", lambda f: f["ema"], ["no weights under 'ema'", "pos_embed"]),
    ("fsdd", lambda f: f | {"args": torch.nn.Linear(2, 2)}, ["can't be read", "UnpicklingError"]),  # not allowed
    ("fsdd", lambda f: {"ema": change(f["ema"], blocks__1__mlp__fc1__bias=None, extra=torch.ones(2),
                                      blocks__0__attn__proj__bias=torch.ones(128).half())},
     ["missing blocks.1.mlp.fc1.bias", "unexpected extra", "blocks.0.attn.proj.bias", "float16"]),
    ("fsdd", lambda f: {"ema": make(fsdd_list(**NARROW_FSDD | {"num_tokens": 20}))}, ["sets of 20 tokens", "takes 24"]),
    ("set_tokenizer", lambda t: change(t, latent_tokens=torch.ones(3)), ["sizes", "too few axes"]),
    ("set_tokenizer", lambda t: {"ema": t}, ["latent_tokens", "holds ema"]),
])
def test_another_file_gets_one_sentence(name, wrong, words, imported, tmp_path):
    """Broken: a file that is not the published one would be taken for it, or end in a traceback; or something be
    written."""
    path = str(tmp_path / "wrong.pth")
    torch.save(wrong(torch.load(imported[0] / f"{name}.pth", weights_only=False)), path)
    files = {file: imported[0] / f"{file}.pth" for file in ("set_tokenizer", "fsdd")} | {name: path}
    finished = run_here(import_released_weights.main, "--tokenizer", files["set_tokenizer"], "--fsdd", files["fsdd"],
                        folder=tmp_path)
    assert_one_sentence(finished, "error: ", path, *words)
    assert len(finished.stderr.splitlines()) == 1 and os.listdir(tmp_path) == ["wrong.pth"]


def test_mistakes_get_one_sentence(imported, tmp_path):
    """Broken: a mistake on the command line would end in a traceback; a file that is a program would be run."""
    tokenizer = imported[0] / "set_tokenizer.pth"
    (tmp_path / "text.pth").write_text("<html>Google Drive - Virus scan warning</html>")

    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"ema": Program()}, tmp_path / "program.pth")
    for arguments, words in [
        (["--tokenizer=none.pth"], ["no file none.pth", "paper/details.md"]),
        (["--tokenizer=text.pth"], ["text.pth", "can't be read"]), (["--fsdd=text.pth"], ["--tokenizer"]),
        (["--tokenizer", tokenizer, "--fsdd=program.pth"], ["program.pth", "can't be read"]),
        (["--tokenizer", tokenizer, "--out=nowhere/a.pt"], ["nowhere"]),
        (["--tokenizer", tokenizer, "--out=tokenizer.pt"], ["--out"]),
    ]:
        assert_one_sentence(run_here(import_released_weights.main, *arguments, folder=tmp_path), *words)
    assert sorted(os.listdir(tmp_path)) == ["program.pth", "text.pth"]


# --- at full size --------------------------------------------------------------------------------------------


def main(folder):
    """Make files of the published sizes in a folder, import them, and compare the functions on two images and one
    set."""
    for name, sizes in PUBLISHED_FSDD.items():
        (tokenizer_path, fsdd_path), tokenizer, ema = write_released(folder, PUBLISHED_TOKENIZER, sizes)
        out = os.path.join(folder, f"fsdd_{name}.pt")
        import_released_weights.main(["--tokenizer", tokenizer_path, "--fsdd", fsdd_path, "--out", out])
        denoiser, ours, _ = generation.load(out, torch.device("cpu"))
        torch.manual_seed(0)
        if name == "small":  # base has the same tokenizer
            latents, codes, pixels = compare_tokenizer(ours, tokenizer, torch.rand(2, 3, 256, 256))
            print(f"tokenizer: latents differ by at most {latents:.1e}, pixels by {pixels:.1e}, "
                  f"{codes:.2%} of codes are equal")
        x = tokens_to_counts(torch.randint(4096, (2, 128)), 4096)
        logits = compare_denoiser(denoiser, ema, x, torch.tensor([0.1, 0.8]), torch.tensor([207, 1000]))
        print(f"{name}: logits differ by at most {logits:.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
