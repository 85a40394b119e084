"""Inception-v3 of 2015-12-05 (Szegedy et al., arXiv 1512.00567), whose features FID is defined in.

The tensors have the names of the published weight file, which therefore loads as it is.
"""
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from published.weights import check_tensors

ADDRESSES = (  # one network, the same tensors by the same names, published twice; either file will do
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth")

POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),  # as TensorFlow's
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}

# A block is a list of branches whose outputs are concatenated. A branch is a list of steps, one after the other: a
# pool, a convolution (name, channels, size, stride = 1), or a list of parallel convolutions.


def inception_a(pool_channels):  # 35 x 35
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            ["average", ("branch_pool", pool_channels, 1)]]


def inception_b():  # 35 x 35 -> 17 x 17
    return [[("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            ["halve"]]


def inception_c(c):  # 17 x 17
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
             ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            ["average", ("branch_pool", 192, 1)]]


def inception_d():  # 17 x 17 -> 8 x 8
    return [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
             ("branch7x7x3_4", 192, 3, 2)],
            ["halve"]]


def inception_e(pool):  # 8 x 8
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
            [pool, ("branch_pool", 192, 1)]]


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU. padded: keep the size, at stride 1."""

    def __init__(self, in_channels, out_channels, size, stride=1, padded=True):
        super().__init__()
        padding = "same" if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class Block(nn.Module):
    """A block made from a list of branches: (B, in_channels, H, W) -> (B, sum of the branches' channels, H', W')."""

    def __init__(self, in_channels, branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = in_channels
            for step in branch:
                if isinstance(step, str):
                    continue
                parallel = step if isinstance(step, list) else [step]
                for name, *shape in parallel:
                    self.add_module(name, Convolution(channels, *shape))
                channels = parallel[0][1]

    def forward(self, x):
        return torch.cat([self.run(branch, x) for branch in self.branches], dim=1)

    def run(self, branch, x):
        for step in branch:
            if isinstance(step, str):
                x = POOLS[step](x)
            elif isinstance(step, tuple):
                x = getattr(self, step[0])(x)
            else:
                x = torch.cat([getattr(self, name)(x) for name, *_ in step], dim=1)
        return x


class InceptionV3(nn.Module):
    """The network that FID is defined by: images (B, 3, H, W) uint8 -> features (B, 2048), logits (B, 1008).

    Grey images (B, 1, H, W) are taken as RGB with three equal channels. ValueError for another shape or dtype.
    weights: the tensors of the published file, by name; None for random ones (load_state_dict() takes the file's too).
    Always in evaluation mode. Differs from torchvision's in the pools and in its 1008 classes. Turn TF32 off before
    use: its rounding changes FIDs from one GPU to another.
    """

    name, dims = "Inception-v3 2015-12-05", 2048

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = Block(192, inception_a(32))
        self.Mixed_5c = Block(256, inception_a(64))
        self.Mixed_5d = Block(288, inception_a(64))
        self.Mixed_6a = Block(288, inception_b())
        self.Mixed_6b = Block(768, inception_c(128))
        self.Mixed_6c = Block(768, inception_c(160))
        self.Mixed_6d = Block(768, inception_c(160))
        self.Mixed_6e = Block(768, inception_c(192))
        self.Mixed_7a = Block(768, inception_d())
        self.Mixed_7b = Block(1280, inception_e("average"))
        self.Mixed_7c = Block(2048, inception_e("max"))  # as in the graph of 2015, which FID uses; unlike the paper
        self.fc = nn.Linear(2048, 1008)
        self.eval()
        if weights is not None:
            self.load(weights)

    def load(self, weights):
        """Load a published file's tensors; for speed, fold batch norm into the convolutions, with channels last."""
        ours, weights = ({name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
                         for tensors in (self.state_dict(), weights))
        check_tensors(weights, {name: tensor.shape for name, tensor in ours.items()}, "the file")
        self.load_state_dict(weights)
        for module in self.modules():
            if isinstance(module, Convolution):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (B, 3, H, W), uint8 in 0..255, got {images.dtype} {tuple(images.shape)}")
        x = (resize(images.float(), 299) - 128) / 128
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = POOLS["halve"](x)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = POOLS["halve"](x)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))
        return features, self.fc(features)


def resize(images, size):
    """TensorFlow 1's bilinear resize, (B, ch, H, W) -> (B, ch, size, size), float32.

    Unlike PyTorch's it has neither half-pixel centres nor antialiasing: output pixel i is read at i * (H / size),
    between the two pixels around that position.
    """
    for axis in (3, 2):
        length = images.shape[axis]
        step = torch.tensor(length / size, dtype=torch.float32)
        position = torch.arange(size, dtype=torch.float32, device=images.device) * step
        low = position.long()
        weight = (position - low).view(-1, *[1] * (3 - axis))
        left = images.index_select(axis, low)
        right = images.index_select(axis, (low + 1).clamp(max=length - 1))
        images = left + (right - left) * weight
    return images


def load_inception(path="", progress=False):
    """InceptionV3 with the weights in a file, or without a path with the published ones, which are downloaded once.

    progress: show a bar while downloading. Raises ValueError if there are no weights or they are not Inception's.
    """
    weights = read_weights(path) if path else download(progress)
    try:
        return InceptionV3(weights)
    except (ValueError, AttributeError) as problem:  # AttributeError: not a dict of names
        raise ValueError(f"{path or 'the downloaded file'} does not hold Inception's weights ({problem}); "
                         f"get them from {ADDRESSES[0]}") from None


def read_weights(path):
    """The tensors in a file of weights, by name."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}; get it from {ADDRESSES[0]}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch.load fails in many ways on other files
        raise ValueError(f"{path} can't be read as weights ({type(problem).__name__}); "
                         f"get the file from {ADDRESSES[0]}") from None


def download(progress=False):
    """The published weights, from torch's cache or, checked against their hash, from the network."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    cached = {os.path.join(folder, os.path.basename(address)): address for address in ADDRESSES}
    path = next((path for path in cached if os.path.isfile(path)), next(iter(cached)))
    try:
        return torch.hub.load_state_dict_from_url(cached[path], map_location="cpu", check_hash=True,
                                                  weights_only=True, progress=progress)
    except Exception as problem:  # no network, a full disk, another hash, a damaged file
        raise ValueError(f"Inception's weights could not be downloaded from {cached[path]} ({problem}); "
                         f"download that file on another machine and copy it to {path}") from None
