"""A small classifier of an embedded data set. It replaces Inception: digits FID or emoji FID is the Frechet distance
between its features, and it tells which class a sample shows."""
import hashlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import open_dataset
from data.loader import batch_indices
from support.files import check_outputs, load_checkpoint, save_checkpoint

STEPS = 1200


class Classifier(nn.Module):
    """A small convolutional network: images (B, channels, size, size) uint8 -> features (B, 128), logits (B, classes).

    data: the name of the data set.
    """

    dims = 128

    def __init__(self, data, channels, size, classes):
        super().__init__()
        self.data, self.channels, self.size = data, channels, size
        self.body = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * (size // 4) ** 2, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))  # on the test images
        self.eval()

    def forward(self, images):
        if (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] < self.channels
                or images.shape[2:] != (self.size, self.size)):
            raise ValueError(f"{self.data} must be (B, {self.channels}, {self.size}, {self.size}), uint8 in 0..255, "
                             f"got {images.dtype} {tuple(images.shape)}")
        features = self.body(images[:, :self.channels] / 127.5 - 1)
        return features, self.head(features)

    @property
    def name(self):
        """A name for these weights, as statistics of another network's features can't be compared."""
        weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in self.state_dict().values())
        return f"{self.data} classifier {hashlib.sha256(weights).hexdigest()[:8]}"


def open_classifier(data, path, device, rank):
    """The classifier in a file, the same on all ranks; trained if there is no such file (a minute on two
    cores)."""
    test_set = open_dataset(data, "test", None)
    net = classifier_of(test_set, data)
    if rank == 0 and os.path.exists(path):
        made_by = "this command, when the file is removed or --classifier names another one"
        net.load_state_dict(load_checkpoint(path, made_by, f"{data} classifier")["weights"])
    elif rank == 0:
        check_outputs(path)
        print(f"training the classifier for {data} FID, once; it is kept as {path}", flush=True)
        net = train_classifier(open_dataset(data, "train", None), data, STEPS)
        net.accuracy.fill_(share_classified_as(net, test_set.images, test_set.labels))
        save_checkpoint({"kind": f"{data} classifier", "weights": net.state_dict()}, path)
    net = net.to(device)
    if dist.is_initialized():  # the others wait here for rank 0
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, 0)
    return net


def classifier_of(dataset, data):
    """A Classifier of an embedded data set, not trained."""
    return Classifier(data, dataset.channels, dataset.image_size, len(dataset.class_names))


def train_classifier(train_set, data, steps, batch=200):
    """A Classifier trained on a training set; the same weights in every call on the same machine with the same number
    of threads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = classifier_of(train_set, data).train()
        optimizer = torch.optim.AdamW(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for step in tqdm(range(steps), desc="classifier", mininterval=5):
            i = batch_indices(len(train_set), batch, 0, step)
            loss = F.cross_entropy(net(train_set.images[i])[1], train_set.labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def share_classified_as(net, images, labels):
    """The share of images (N, ch, size, size) uint8 that net classifies as their labels (N,)."""
    device = net.head.weight.device
    classes = torch.cat([net(part.to(device))[1].argmax(1).cpu() for part in images.split(500)])
    return (classes == labels).double().mean().item()
