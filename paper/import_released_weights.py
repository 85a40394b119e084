"""The authors' published weights (Sec. 4.1) -> tokenizer.pt and fsdd.pt, which every script here takes like its own.

    python -m paper.import_released_weights --tokenizer set_tokenizer_128_4096.pth --fsdd fsdd_small_128_4096.pth

tokenizer.pt stands beside fsdd.pt, or where --tokenizer_out says; without --fsdd it is all that is written. What stood
at either path is kept as .previous. The sizes are read off the tensors: small and base go the same way. Where to get
the files: paper/details.md.

The release's ways, and what becomes of them:
    M latents of length width are read as width rows of M    the flag reshaped_latents of SetTokenizer
    the count embedding has C + 1 rows, M + 1 are read       the flag unused_rows of Denoiser; all rows are kept
    time runs as s = 1 - t                                   nothing to convert: our denoiser is told s = 1 - t too
    X_1 is M distinct codes                                  generation settings, prior "distinct"
    linear maps stored as 1 x 1 convolutions                 two axes of length 1 go, see the tables
    pixels in [0, 1]                                         nothing to convert: SetTokenizer converts its [-1, 1]

Used is every tensor of both files. Not used: what an FSDD file holds beside "ema", such as "args", an
argparse.Namespace of the training's options, which says nothing that is not in the shapes; and
maskgit-vqgan-imagenet-f16-256.bin, which only training needs (published/maskgit_vqgan.py has its names): the published
tokenizer holds its own copy of the decoder, trained further.
"""
import argparse
import io
import math
import os
import re

import torch

import common
from data import files, records
from data.command_line import listed
from fsdd import Denoiser
from published.weights import check_tensors
from tokenizer import SetTokenizer

GENERATION = {  # the release's settings for its best FID, which become the checkpoint's
    "prior": "distinct",            # X_1: M distinct codes
    "sampler": "paper",             # Eq. 9-10; sample.py --sampler exchange takes the other
    "steps": 25,
    "guidance": [4.0, 50.0, 55.0],  # weight in the thirds of the steps
    "top_p": 0.8,
    "top_k": 0,
}
HEAD_WIDTH = 64  # of an attention head; shapes don't show the heads: all three published models have width / 64

# Our names <- theirs. * stands for our shape, so that "* 1 1" is a tensor with two more axes of length 1 in the
# release. {i} is a number, {end} is weight or bias, {side} is encoder or decoder, {rest} is any name.
TOKENIZER_NAMES = [
    # ours                                  the release's                                shape
    ("encoder.latents",                     "latent_tokens",                             "*"),
    ("encoder.patches.{end}",               "encoder.patch_embed.{end}",                 "*"),
    ("encoder.to_code.weight",              "encoder.conv_out.weight",                   "* 1 1"),
    ("encoder.to_code.bias",                "encoder.conv_out.bias",                     "*"),
    ("quantizer.codebook",                  "quantize.embedding.weight",                 "*"),
    ("decoder.from_code.{end}",             "decoder.decoder_embed.{end}",               "*"),
    ("decoder.mask_token",                  "decoder.mask_token",                        "1 1 *"),
    ("{side}.class_embedding",              "{side}.class_embedding",                    "1 *"),
    ("{side}.positions",                    "{side}.positional_embedding",               "*"),
    ("{side}.norm_in.{end}",                "{side}.ln_pre.{end}",                       "*"),
    ("{side}.blocks.{i}.norm1.{end}",       "{side}.transformer.{i}.ln_1.{end}",         "*"),
    ("{side}.blocks.{i}.attention.qkv.{end}",  "{side}.transformer.{i}.attn.in_proj_{end}",   "*"),
    ("{side}.blocks.{i}.attention.proj.{end}", "{side}.transformer.{i}.attn.out_proj.{end}",  "*"),
    ("{side}.blocks.{i}.norm2.{end}",       "{side}.transformer.{i}.ln_2.{end}",         "*"),
    ("{side}.blocks.{i}.mlp.0.{end}",       "{side}.transformer.{i}.mlp.c_fc.{end}",     "*"),
    ("{side}.blocks.{i}.mlp.2.{end}",       "{side}.transformer.{i}.mlp.c_proj.{end}",   "*"),
    ("{side}.norm_out.{end}",               "{side}.ln_post.{end}",                      "*"),
    ("pixel_head.mlp.{i}.weight",           "decoder.ffn.{i}.weight",                    "* 1 1"),
    ("pixel_head.mlp.{i}.bias",             "decoder.ffn.{i}.bias",                      "*"),
    ("pixel_decoder.{rest}",                "pixel_decoder.{rest}",                      "*"),  # the published names
]
FSDD_NAMES = [
    ("count_embedding.weight",              "x_embedder.embedding_table.weight",         "*"),
    ("code_embedding",                      "pos_embed",                                 "*"),
    ("time_mlp.{i}.{end}",                  "t_embedder.mlp.{i}.{end}",                  "*"),
    ("class_embedding.weight",              "y_embedder.embedding_table.weight",         "*"),
    ("blocks.{i}.attention.qkv.{end}",      "blocks.{i}.attn.qkv.{end}",                 "*"),
    ("blocks.{i}.attention.proj.{end}",     "blocks.{i}.attn.proj.{end}",                "*"),
    ("blocks.{i}.mlp.0.{end}",              "blocks.{i}.mlp.fc1.{end}",                  "*"),
    ("blocks.{i}.mlp.2.{end}",              "blocks.{i}.mlp.fc2.{end}",                  "*"),
    ("blocks.{i}.modulation.1.{end}",       "blocks.{i}.adaLN_modulation.1.{end}",       "*"),
    ("modulation_out.1.{end}",              "final_layer.adaLN_modulation.1.{end}",      "*"),
    ("to_logits.{end}",                     "final_layer.linear.{end}",                  "*"),
]
STANDS_FOR = {"i": r"\d+", "end": "weight|bias", "side": "encoder|decoder", "rest": ".+"}


def main(argv=None):
    args = parse(argv)
    try:
        tokenizer_config, tokenizer_weights = import_tokenizer(args.tokenizer)
        tokenizer = {"model_config": tokenizer_config, "weights": tokenizer_weights}
        if args.fsdd:
            model_config, weights = import_fsdd(args.fsdd)
            check_pair(tokenizer_config, model_config, args)
    except ValueError as problem:
        common.stop(str(problem))
    sizes = "{image_size} x {image_size} pixels <-> {num_tokens} tokens out of {codebook_size} codes"
    write({"kind": "tokenizer"} | tokenizer, args.tokenizer_out, sizes.format(**tokenizer_config))
    if args.fsdd:
        names = [str(label) for label in range(model_config["num_classes"])]  # the release knows its classes by number
        write({"kind": "fsdd", "model_config": model_config, "weights": weights, "class_names": names,
               "generation": GENERATION, "tokenizer": tokenizer}, args.out,
              "{num_classes} classes, {layers} blocks of width {width}".format(**model_config))


def parse(argv):
    parser = common.Parser(prog="python -m paper.import_released_weights", description=__doc__)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="set_tokenizer_128_4096.pth")
    parser.add_argument("--fsdd", metavar="FILE",
                        help="fsdd_small_128_4096.pth or fsdd_base_128_4096.pth; none: tokenizer only")
    parser.add_argument("--out", default="fsdd.pt", help="the checkpoint that sample.py takes (fsdd.pt)")
    parser.add_argument("--tokenizer_out", help="the tokenizer by itself (tokenizer.pt, beside --out)")
    args = parser.parse_args(argv)
    args.tokenizer_out = args.tokenizer_out or os.path.join(os.path.dirname(args.out), "tokenizer.pt")
    if os.path.abspath(args.out) == os.path.abspath(args.tokenizer_out):
        parser.error(f"--out and --tokenizer_out are both {args.out}")
    common.check_output(args.out, args.tokenizer_out)
    return args


def import_tokenizer(path):
    """The published tokenizer -> (the arguments of SetTokenizer, its weights). ValueError for any other file."""
    tensors = read(path)
    config = read_sizes(tensors, path, num_tokens=("latent_tokens", 0), width=("latent_tokens", 1),
                        codebook_size=("quantize.embedding.weight", 0), code_dim=("quantize.embedding.weight", 1),
                        channels=("encoder.patch_embed.weight", 1), patch_size=("encoder.patch_embed.weight", 2),
                        vqgan_width=("pixel_decoder.norm_out.weight", 0), vqgan_dim=("decoder.ffn.2.weight", 0),
                        positions=("decoder.positional_embedding", 0))
    grid = math.isqrt(config.pop("positions") - 1)
    config |= {"image_size": grid * config["patch_size"], "heads": heads(config["width"], path),
               "encoder_layers": count_layers(tensors, "encoder.transformer"),
               "decoder_layers": count_layers(tensors, "decoder.transformer"), "reshaped_latents": True}
    return config, convert(tensors, SetTokenizer, config, TOKENIZER_NAMES, path)


def import_fsdd(path):
    """A published denoiser -> (the arguments of Denoiser, its averaged weights). ValueError for any other file."""
    found = read(path)
    if not isinstance(found.get("ema"), dict):
        raise ValueError(f"{path} has no weights under 'ema', where the published denoisers have them; it holds "
                         f"{listed(found)}")
    tensors = found["ema"]
    config = read_sizes(tensors, path, codebook_size=("pos_embed", 1), width=("pos_embed", 2),
                        num_tokens=("final_layer.linear.weight", 0),
                        num_classes=("y_embedder.embedding_table.weight", 0))
    config["num_tokens"] -= 1   # counts run from 0 to M
    config["num_classes"] -= 1  # the last row is the null class
    config |= {"layers": count_layers(tensors, "blocks"), "heads": heads(config["width"], path), "unused_rows": True}
    return config, convert(tensors, Denoiser, config, FSDD_NAMES, path)


def read(path):
    """The dict in a file of PyTorch's. argparse.Namespace is the only class of Python's let in: no code can run."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}; paper/details.md says where the published weights are")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch.load fails in many ways
        raise ValueError(f"{path} can't be read as published weights ({type(problem).__name__}): it is damaged, no "
                         f"file of PyTorch's, or holds more than tensors, plain values and an argparse.Namespace")
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} and not a dict of tensors, as the published files do")
    return found


def read_sizes(tensors, path, **where):
    """The sizes that a model is made from. where: name=(tensor, axis). ValueError where a tensor is missing or
    has no such axis."""
    wrong = dict.fromkeys(name for name, axis in where.values() if not torch.is_tensor(tensors.get(name))
                          or tensors[name].ndim <= axis or tensors[name].numel() == 0)
    if wrong:
        raise ValueError(f"{path} is not the file that is needed: missing, empty or of too few axes is what shows the "
                         f"sizes, {listed(wrong)}; the file holds {listed(tensors)}")
    return {size: tensors[name].shape[axis] for size, (name, axis) in where.items()}


def heads(width, path):
    """Attention heads of a transformer of this width."""
    if not width or width % HEAD_WIDTH:
        raise ValueError(f"{path} has width {width}, which is not a multiple of {HEAD_WIDTH}, the width of a head")
    return width // HEAD_WIDTH


def count_layers(tensors, prefix):
    """How many blocks there are under a prefix: PREFIX.0., PREFIX.1., ..."""
    return len({found[1] for name in tensors if (found := re.match(re.escape(prefix) + r"\.(\d+)\.", str(name)))})


def convert(tensors, model_class, config, names, path):
    """The release's tensors with our names and shapes; ValueError names what is missing, unexpected or misshapen."""
    try:
        with torch.device("meta"):  # shapes without values
            shapes = {name: tensor.shape for name, tensor in model_class(**config).state_dict().items()}
    except (ValueError, ZeroDivisionError) as problem:
        raise ValueError(f"{path} has sizes that don't fit: {problem}")
    theirs = {ours: released_name(ours, shape, names) for ours, shape in shapes.items()}  # ours: (theirs, shape there)
    check_tensors(tensors, dict(theirs.values()), path)
    return {ours: tensors[name].reshape(shapes[ours]) for ours, (name, _) in theirs.items()}


def released_name(ours, shape, names):
    """Our name and shape of a tensor -> the release's, by the table names."""
    for pattern, released, axes in names:
        pattern = re.sub(r"\\{(\w+)\\}", lambda part: f"(?P<{part[1]}>{STANDS_FOR[part[1]]})", re.escape(pattern))
        if found := re.fullmatch(pattern, ours):
            before, after = axes.split("*")
            shape = (1,) * before.count("1") + tuple(shape) + (1,) * after.count("1")
            return released.format(**found.groupdict()), shape
    raise KeyError(f"the table has no row for {ours}")


def check_pair(tokenizer_config, model_config, args):
    """ValueError where the denoiser was not made for this tokenizer's sets."""
    theirs, ours = ((config["num_tokens"], config["codebook_size"]) for config in (tokenizer_config, model_config))
    if theirs != ours:
        raise ValueError(f"{args.fsdd} makes sets of {ours[0]} tokens out of {ours[1]} codes, {args.tokenizer} takes "
                         f"{theirs[0]} out of {theirs[1]}: they don't belong together")


def write(checkpoint, path, what):
    """Write a checkpoint, whole or not at all. Another one that stands there is kept as PATH.previous."""
    new, old = io.BytesIO(), None
    torch.save(checkpoint, new)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            old = file.read()
    if old != new.getvalue():  # else the same already: what .previous holds is worth more than a second copy
        records.keep_previous(path)
        with files.written(path) as file:
            file.write(new.getbuffer())
    parameters = sum(tensor.numel() for tensor in checkpoint["weights"].values())
    print(f"{path}: {what}, {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    common.run(main)
