"""Reading files of published weights, and checking that they hold the tensors that a network has."""
import os

import torch

from support.command_line import list_first
from support.files import not_finite


def load_published(path, what, address, build):
    """A network with the weights of a published file, in evaluation mode and without gradients.

    what, address: the network's name and where its file can be downloaded, for messages.
    build: the file's dict of tensors -> a network of its sizes, whose tensors have the same names.
    Raises ValueError if the file is missing or does not contain these tensors.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{what} is needed at {path} and is not there; get it from {address}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network = build(weights)
    except Exception as problem:  # both fail in many ways on other files
        raise ValueError(f"{path} can't be read as {what} ({type(problem).__name__}: {problem}); "
                         f"get it from {address}") from None
    check_tensors(weights, {name: weight.shape for name, weight in network.state_dict().items()}, path)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def check_tensors(found, shapes, path):
    """Raise ValueError unless a file contains exactly the tensors that are needed, float32 and finite.

    found: its contents by name.  shapes: the shapes needed by name.  path: the file, for the message.
    """
    missing = [name for name in shapes if name not in found]
    unexpected = [name for name in found if name not in shapes]
    wrong = [f"{name} ({kind_of(found[name])} instead of float32 {tuple(shape)})"
             for name, shape in shapes.items() if name in found and kind_of(found[name]) != f"float32 {tuple(shape)}"]
    if missing or unexpected or wrong:
        raise ValueError(f"{path} is not the file that is needed: missing {list_first(missing)}; "
                         f"unexpected {list_first(unexpected)}; of the wrong shape or type {list_first(wrong)}")
    if where := not_finite(found):
        raise ValueError(f"{path} is damaged: {where} holds numbers that are not finite")


def kind_of(value):
    """A tensor's dtype and shape as text."""
    return f"{str(value.dtype)[6:]} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
