"""A small classifier of digits. It replaces Inception: digits FID is the Frechet distance between its features, and it
tells which digit a sample shows."""
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

FILE = "digits_classifier.pt"  # the trained classifier, in the folder of the checkpoint that is evaluated
EPOCHS = 4


class DigitsClassifier(nn.Module):
    """A small convolutional network: images (B, ch, 28, 28) uint8 -> features (B, 128), logits (B, 10)."""

    dims = 128

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * 49, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))  # on the test digits
        self.eval()

    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2:] != (28, 28):
            raise ValueError("digits must be (B, 1, 28, 28), uint8 in 0..255, "
                             f"got {images.dtype} {tuple(images.shape)}")
        features = self.body(images[:, :1] / 127.5 - 1)
        return features, self.head(features)

    @property
    def name(self):
        """A name for these weights, as statistics of another network's features can't be compared."""
        weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in self.state_dict().values())
        return f"digits classifier {hashlib.sha256(weights).hexdigest()[:8]}"


def open_classifier(path, device, rank):
    """The classifier in a file, the same on all ranks; trained if there is no such file (a minute on two cores)."""
    net = DigitsClassifier()
    if rank == 0 and os.path.exists(path):
        made_by = "this command, when the file is removed or --classifier names another one"
        net.load_state_dict(load_checkpoint(path, made_by, "digits classifier")["weights"])
    elif rank == 0:
        check_outputs(path)
        print(f"training the classifier for digits FID, once; it is kept as {path}", flush=True)
        net = train_classifier(open_dataset("digits", "train", 28))
        test = open_dataset("digits", "test", 28)
        net.accuracy.fill_(share_classified_as(net, test.images, test.labels))
        save_checkpoint({"kind": "digits classifier", "weights": net.state_dict()}, path)
    net = net.to(device)
    if dist.is_initialized():  # the others wait here for rank 0
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, 0)
    return net


def train_classifier(digits, batch=200):
    """A DigitsClassifier trained on the training digits; the same weights in every call on the same machine with the
    same number of threads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitsClassifier().train()
        optimizer = torch.optim.AdamW(net.parameters())
        steps = EPOCHS * len(digits) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for step in tqdm(range(steps), desc="classifier", mininterval=5):
            i = batch_indices(len(digits), batch, 0, step)
            loss = F.cross_entropy(net(digits.images[i])[1], digits.labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def share_classified_as(net, images, labels):
    """The share of images (N, ch, 28, 28) uint8 that net classifies as their labels (N,)."""
    device = net.head.weight.device
    classes = torch.cat([net(part.to(device))[1].argmax(1).cpu() for part in images.split(500)])
    return (classes == labels).double().mean().item()
