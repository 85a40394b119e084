"""The authors' published weights (Sec. 4.1) -> tokenizer.pt and fsdd.pt, which every script here takes like its own.

    python -m paper.import_released_weights --tokenizer set_tokenizer_128_4096.pth --fsdd fsdd_small_128_4096.pth

tokenizer.pt is written to the folder of fsdd.pt (--out); without --fsdd it is the only file. A file that exists already
at either path is kept as .previous. The sizes are read off the tensors, so small and base are imported in the same way.
paper/details.md says where to get the files.

How the release differs, and what this becomes:
    M latents of length width are read as width rows of M    the flag reshaped_latents of SetTokenizer
    the count embedding has C + 1 rows, M + 1 are read       the flag unused_rows of Denoiser; all rows are kept
    time runs as s = 1 - t                                   nothing to convert: our denoiser embeds 1 - t
    X_1 is M distinct codes                                  generation settings, prior "distinct"
    linear maps stored as 1 x 1 convolutions                 two axes of length 1 are removed, see the tables
    pixels in [0, 1]                                         nothing to convert: SetTokenizer converts its [-1, 1]

Every tensor of both files is used. Not used: what an FSDD file holds besides "ema", such as "args", an
argparse.Namespace of the training's options, which says nothing that the shapes do not; and
maskgit-vqgan-imagenet-f16-256.bin, which only training needs (published/maskgit_vqgan.py has its names): the published
tokenizer holds its own copy of the decoder, trained further.
"""
import argparse
import math
import os
import re

import torch

from fsdd import Denoiser
from published.weights import check_tensors
from sample import default_settings
from support.command_line import Parser, list_first, stop
from support.files import check_outputs, save_checkpoint
from support.training import keep_previous, run
from tokenizer import SetTokenizer

HEAD_WIDTH = 64  # of an attention head; shapes don't show the number of heads: all published models have width / 64

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
        config, weights = import_tokenizer(args.tokenizer)
        tokenizer = {"model_config": config, "weights": weights}
        if args.fsdd:
            model_config, weights = import_fsdd(args.fsdd)
            if any(model_config[size] != config[size] for size in ("num_tokens", "codebook_size")):
                raise ValueError(f"{args.fsdd} makes sets of {model_config['num_tokens']} tokens out of "
                                 f"{model_config['codebook_size']} codes, {args.tokenizer} takes "
                                 f"{config['num_tokens']} out of {config['codebook_size']}: they don't fit together")
    except ValueError as problem:
        stop(str(problem))
    write({"kind": "tokenizer"} | tokenizer, tokenizer_path(args.out),
          "{image_size} x {image_size} pixels <-> {num_tokens} tokens out of {codebook_size} codes")
    if args.fsdd:
        names = [str(label) for label in range(model_config["num_classes"])]  # the release knows its classes by number
        write({"kind": "fsdd", "denoiser": "dense", "model_config": model_config, "weights": weights,
               "class_names": names, "generation": default_settings("imagenet256", "distinct"),
               "tokenizer": tokenizer}, args.out,
              "{num_classes} classes, {layers} blocks of width {width}")


def parse(argv):
    parser = Parser(prog="python -m paper.import_released_weights", description=__doc__)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="set_tokenizer_128_4096.pth")
    parser.add_argument("--fsdd", metavar="FILE",
                        help="fsdd_small_128_4096.pth or fsdd_base_128_4096.pth; without it, the tokenizer only")
    parser.add_argument("--out", default="fsdd.pt", help="the checkpoint that sample.py takes (%(default)s)")
    args = parser.parse_args(argv)
    if os.path.basename(args.out) == "tokenizer.pt":
        parser.error("--out can't be tokenizer.pt, which the tokenizer is written to")
    check_outputs(args.out, tokenizer_path(args.out))
    return args


def tokenizer_path(out):
    return os.path.join(os.path.dirname(out), "tokenizer.pt")


def import_tokenizer(path):
    """The published tokenizer -> (the arguments of SetTokenizer, its weights). ValueError for any other file."""
    tensors = read(path)
    config = read_sizes(tensors, path, num_tokens=("latent_tokens", 0), width=("latent_tokens", 1),
                        codebook_size=("quantize.embedding.weight", 0), code_dim=("quantize.embedding.weight", 1),
                        channels=("encoder.patch_embed.weight", 1), patch_size=("encoder.patch_embed.weight", 2),
                        vqgan_width=("pixel_decoder.norm_out.weight", 0), vqgan_dim=("decoder.ffn.2.weight", 0),
                        positions=("decoder.positional_embedding", 0))
    side = math.isqrt(config.pop("positions") - 1)  # in patches
    config |= {"image_size": side * config["patch_size"], "heads": config["width"] // HEAD_WIDTH,
               "encoder_layers": count_layers(tensors, "encoder.transformer"),
               "decoder_layers": count_layers(tensors, "decoder.transformer"), "reshaped_latents": True}
    return config, convert(tensors, SetTokenizer, config, TOKENIZER_NAMES, path)


def import_fsdd(path):
    """A published denoiser -> (the arguments of Denoiser, its averaged weights). ValueError for any other file."""
    found = read(path)
    if not isinstance(found.get("ema"), dict):
        raise ValueError(f"{path} has no weights under 'ema', where the published denoisers have them; it holds "
                         f"{list_first(found)}")
    tensors = found["ema"]
    config = read_sizes(tensors, path, codebook_size=("pos_embed", 1), width=("pos_embed", 2),
                        num_tokens=("final_layer.linear.weight", 0),
                        num_classes=("y_embedder.embedding_table.weight", 0))
    config["num_tokens"] -= 1   # counts run from 0 to M
    config["num_classes"] -= 1  # the last row is the null class
    config |= {"layers": count_layers(tensors, "blocks"), "heads": config["width"] // HEAD_WIDTH, "unused_rows": True}
    return config, convert(tensors, Denoiser, config, FSDD_NAMES, path)


def read(path):
    """The dict in a file of PyTorch's. argparse.Namespace is the only Python class allowed: no code can run."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}; paper/details.md says where the published weights are")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as problem:  # torch.load fails in many ways
        raise ValueError(f"{path} can't be read as published weights ({type(problem).__name__}): it is damaged, not a "
                         f"file of PyTorch's, or holds more than tensors, plain values and an argparse.Namespace")


def read_sizes(tensors, path, **where):
    """The sizes of a model. where: name=(tensor, axis). ValueError if there is no such tensor or axis."""
    try:
        return {size: tensors[name].shape[axis] for size, (name, axis) in where.items()}
    except (KeyError, IndexError, AttributeError) as problem:
        raise ValueError(f"{path} is not the file that is needed: the tensors that show its sizes are missing or have "
                         f"too few axes ({problem}); the file holds {list_first(tensors)}") from None


def count_layers(tensors, prefix):
    """How many blocks there are under a prefix: PREFIX.0., PREFIX.1., ..."""
    return len({found[1] for name in tensors if (found := re.match(re.escape(prefix) + r"\.(\d+)\.", str(name)))})


def convert(tensors, model_class, config, names, path):
    """The release's tensors with our names and shapes; ValueError names what is missing, unexpected or of the wrong
    shape."""
    with torch.device("meta"):  # shapes without values
        shapes = {name: tensor.shape for name, tensor in model_class(**config).state_dict().items()}
    released = {ours: released_name(ours, shape, names) for ours, shape in shapes.items()}  # name and shape there
    check_tensors(tensors, dict(released.values()), path)
    return {ours: tensors[name].reshape(shapes[ours]) for ours, (name, _) in released.items()}


def released_name(ours, shape, names):
    """Our name and shape of a tensor -> the release's, by the table names."""
    for pattern, released, axes in names:
        pattern = re.sub(r"\\{(\w+)\\}", lambda part: f"(?P<{part[1]}>{STANDS_FOR[part[1]]})", re.escape(pattern))
        if found := re.fullmatch(pattern, ours):
            before, after = axes.split("*")
            shape = (1,) * before.count("1") + tuple(shape) + (1,) * after.count("1")
            return released.format(**found.groupdict()), shape
    raise KeyError(f"the table has no row for {ours}")


def write(checkpoint, path, description):
    """Write a checkpoint. Another one at the path is kept as PATH.previous."""
    keep_previous(path)
    save_checkpoint(checkpoint, path)
    parameters = sum(tensor.numel() for tensor in checkpoint["weights"].values())
    print(f"{path}: {description.format(**checkpoint['model_config'])}, {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    run(main)
