"""What the paper's training costs: parameters, FLOPs, memory and hours, as a Markdown table (Sec. 4.1).

    python -m paper.cost

torch.utils.flop_counter counts the FLOPs of the models and losses of the trainings, run on tensors without data, so it
takes seconds and little memory; a multiplication and an addition are two. Memory is weights, gradients and DDP's copy
of them, AdamW's two moments and the moving average in float32, and what the backward pass keeps, without torch.compile,
which keeps less. Hours follow from the FLOPs and the share of the peak below, which is an assumption: nothing here was
timed on a GPU.
"""
import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train_fsdd
import train_tokenizer
from beyond import SparseDenoiser
from fsdd import Denoiser
from paper.inputs import read_options
from published.convnext import ConvNeXt
from published.discriminator import Discriminator
from published.losses import PixelLosses, discriminator_loss
from published.maskgit_vqgan import VQGAN
from support.hardware import autocast
from tokenizer import Attention, SetTokenizer

BATCH = 32                # images on a GPU at once
GPUS = 8                  # H100 SXM
BF16, TF32 = 989e12, 495e12  # dense peak of one, FLOP/s: the models run in bfloat16, the networks of the losses in TF32
UTILIZATION = 0.35        # assumed share of that peak
STAGE1_IMAGES = 500_000 * 256    # in each of its phases
STAGE2_IMAGES = 200 * 1_281_167  # 200 epochs of ImageNet
LOSS_CODES = 384          # of the sparse denoiser: those that X_t and X_0 contain, at most 256, and at least M others
CPU = torch.device("cpu")


def main(argv=None):
    read_options([], "cost", __doc__, argv)  # there are none but --help
    print("| | parameters, trained | GFLOPs an image, forward | training "
          f"| GiB a GPU, batch {BATCH} | hours on {GPUS} H100 |\n|---|---|---|---|---|---|")
    print_cost("stage 1, proxy codes", tokenizer_cost(proxy=True), STAGE1_IMAGES)
    print_cost("stage 1, pixels", tokenizer_cost(proxy=False), STAGE1_IMAGES)
    for name in ("S", "B"):
        print_cost(f"stage 2, {name}", denoiser_cost(name), STAGE2_IMAGES)
        print_cost(f"stage 2, {name}, sparse, {LOSS_CODES} codes", denoiser_cost(name, LOSS_CODES), STAGE2_IMAGES)


def print_cost(name, cost, images):
    """A row of the table. images: number of images in the training.

    The models run in bfloat16; the rest of a step, the networks of the losses, in TF32.
    """
    seconds = images * (cost.training / BF16 + (cost.step - cost.training) / TF32) / UTILIZATION / GPUS
    memory = cost.state_bytes + cost.fixed_bytes + BATCH * cost.image_bytes
    print(f"| {name} | {cost.trained / 1e6:.1f} M | {cost.forward / 1e9:.0f} | {cost.step / 1e9:.0f} "
          f"| {memory / 2 ** 30:.1f} | {seconds / 3600:.0f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The trainings, on tensors without data


def tokenizer_cost(proxy):
    """What measure_cost() returns for a phase of stage 1."""
    cfg = settings(train_tokenizer.HYPERPARAMETERS, adversarial_from=0)
    vqgan = VQGAN().requires_grad_(False) if proxy else None
    convnext = None if proxy else ConvNeXt().requires_grad_(False)
    discriminator = None if proxy else Discriminator(cfg.discriminator)
    pixel_losses = PixelLosses(convnext, discriminator, None, cfg)
    model = SetTokenizer(channels=3, vqgan_width=128, **{name: getattr(cfg, name) for name in train_tokenizer.MODEL})
    train_tokenizer.start_phase(model, None, cfg, proxy)
    networks = list(filter(None, (vqgan, convnext, discriminator)))
    with FakeTensorMode():
        drop_data(model, *networks)

        def images(number):
            return torch.zeros(number, 3, cfg.image_size, cfg.image_size)

        def forward(number=1):
            with autocast(CPU, cfg.bf16):
                return model(images(number), proxy=proxy)

        def step(number):
            decoded, _, latents, loss = forward(number)
            loss = loss + cfg.uniformity * train_tokenizer.uniformity(latents)
            if proxy:
                loss = loss + F.cross_entropy(vqgan.logits(decoded), vqgan.encode(images(number)))
            else:
                loss = loss + F.mse_loss(decoded.float(), images(number))
                loss = loss + pixel_losses(decoded.float(), images(number), pixel_losses.first)
            loss.backward()

        def train_discriminator():
            if discriminator:
                real, fake = discriminator(images(2)).flatten(1).chunk(2)
                discriminator_loss(real, fake, torch.zeros(2), cfg.lecam).backward()

        return measure_cost(model, networks, lambda: forward()[0], step, train_discriminator)


def denoiser_cost(name, num_codes=0):
    """What measure_cost() returns for a model of stage 2; with num_codes a sparse one, trained on so many codes."""
    cfg, C, M = settings(train_fsdd.HYPERPARAMETERS), 4096, 128
    model_class = SparseDenoiser if num_codes else Denoiser
    model = model_class(C, M, 1000, *train_fsdd.MODELS[name], unused_rows=cfg.unused_rows)
    integers = functools.partial(torch.zeros, dtype=torch.int64)
    with FakeTensorMode():
        drop_data(model)

        def logits(number, num_codes):
            codes = (integers(number, num_codes),) if num_codes else ()
            with autocast(CPU, cfg.bf16):
                return model(integers(number, C), torch.zeros(number), integers(number), *codes)

        def step(number):
            of_codes = logits(number, num_codes).float().flatten(0, 1)
            F.cross_entropy(of_codes, torch.zeros(len(of_codes), dtype=torch.int64)).backward()

        return measure_cost(model, [], lambda: logits(1, 0), step, training=lambda: logits(1, num_codes))


def settings(table, **changes):
    """The column imagenet256 of a script's table, with changes."""
    return SimpleNamespace(**{row[0]: row[-3] for row in table} | {"bf16": "on", "compile": False} | changes)


def drop_data(*networks):
    """Replace weights by tensors that have a shape and no data; call it inside of a FakeTensorMode."""
    for module in nn.ModuleList(networks).modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape), weight.requires_grad))


def measure_cost(model, networks, forward, step, train_discriminator=lambda: None, training=None):
    """The cost of a training.

    networks: of the losses.  forward: the model on one image -> a tensor.  training: the same in training, if that
    differs.  step: number of images -> losses and their backward pass.
    train_discriminator: the same for the discriminator and one image. By then nothing of step() is kept, and it keeps
    less.

    Returns trained: number of trained weights; FLOPs for an image: forward; training, the model's forward and backward
    pass; step, a whole step; bytes: state_bytes of weights, moving average, gradients, DDP's copy and AdamW's moments;
    fixed_bytes and image_bytes that the backward pass keeps, once and for each image.
    """
    training = training or forward
    weights = [weight for network in (model, *networks) for weight in network.parameters()]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    averaged = sum(weight.numel() for weight in model.parameters())
    cost = SimpleNamespace(trained=trained)
    cost.state_bytes = 4 * (sum(weight.numel() for weight in weights) + averaged + 4 * trained)
    Attention.fused = "off"  # the fused kernel of a CPU is not counted
    with torch.no_grad():
        cost.forward = flops(forward)
    cost.training = flops(lambda: training().sum().backward())
    cost.step = flops(lambda: (step(1), train_discriminator()))
    Attention.fused = "on"
    for module in model.modules():  # autocast leaves norms in float32 on a GPU, not on a CPU
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.forward = functools.partial(norm_in_float32, module.forward)
    one, two = kept_bytes(model, lambda: step(1)), kept_bytes(model, lambda: step(2))
    Attention.fused = "auto"
    cost.fixed_bytes, cost.image_bytes = 2 * one - two, two - one
    return cost


def norm_in_float32(norm, x):
    with torch.autocast("cpu", enabled=False):
        return norm(x.float())


def flops(function):
    """FLOPs of a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def kept_bytes(model, function):
    """Bytes that a function keeps for its backward pass, without the weights."""
    kept, weights = {}, {weight.untyped_storage()._cdata for weight in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # the tensor is held, so that no other gets its storage's number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for number, tensor in kept.items() if number not in weights)


if __name__ == "__main__":
    main()
