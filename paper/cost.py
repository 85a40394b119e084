"""Parameters and FLOPs of the paper's models (Sec. 4.1), as a Markdown table.

    python -m paper.cost

torch.utils.flop_counter counts the models on tensors without data, which takes seconds and little memory. A
multiplication and an addition are two FLOPs. Training is the forward and backward pass of a model whose weights are all
trained; the networks of stage 1's losses are not counted.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from beyond import SparseDenoiser
from fsdd import Denoiser
from paper.inputs import read_options
from tokenizer import SetTokenizer

C, M = 4096, 128
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12)}  # of the denoiser: width, layers, heads
LOSS_CODES = 384  # of the sparse denoiser: those that X_t and X_0 contain, at most 256, and at least M others


def main(argv=None):
    read_options([], "cost", __doc__, argv)  # there are none but --help
    print("| | parameters | GFLOPs an image, forward | training |\n|---|---|---|---|")
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        print_cost("tokenizer", *tokenizer())
        for size in SIZES:
            print_cost(f"denoiser {size}", *denoiser(Denoiser, size))
            print_cost(f"denoiser {size}, sparse, trained on {LOSS_CODES} codes", *denoiser(SparseDenoiser, size))


def print_cost(name, model, forward, training):
    """A row of the table. forward: a forward pass as in generation.  training: as in training, returns a tensor."""
    parameters = sum(weight.numel() for weight in model.parameters())
    both = flops(forward), flops(lambda: training().sum().backward())
    print(f"| {name} | {parameters / 1e6:.1f} M | {' | '.join(f'{number / 1e9:.0f}' for number in both)} |", flush=True)


def tokenizer():
    """The tokenizer and its forward pass of one image, without the quantizer, which takes little."""
    model, images = SetTokenizer(256, 3, 16, M, C, 12, 768, 12, 12, 12, vqgan_width=128), torch.empty(1, 3, 256, 256)

    def forward():
        return model.pixel_decoder(model.pixel_head(model.decoder(model.latents(images))))

    return model, forward, forward


def denoiser(model_class, size):
    """A denoiser, its forward pass of all codes, and that of training."""
    model = model_class(C, M, 1000, *SIZES[size], unused_rows=True)
    labels = torch.zeros(1, dtype=torch.int64)
    inputs = labels.expand(1, C), torch.zeros(1), labels
    codes = [labels.expand(1, LOSS_CODES)] if model_class is SparseDenoiser else []
    return model, lambda: model(*inputs), lambda: model(*inputs, *codes)


def flops(function):
    """FLOPs of a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
