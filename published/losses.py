"""The losses that TiTok's recipe adds to the squared error of pixels (arXiv 2406.07550): perceptual, and adversarial
with a discriminator that is trained at the same time. The digits do not use them."""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F

from published.convnext import load_convnext
from published.discriminator import Discriminator
from published.maskgit_vqgan import load_vqgan
from support.distributed import all_reduce, local_batch, rank_and_world_size
from support.hardware import parallel
from support.optimizers import make_optimizers, set_lr, warmup_cosine


class PixelLosses:
    """The perceptual loss, by ConvNeXt as published, and the adversarial loss, by a discriminator in training.

    convnext, discriminator: None leaves out its loss.  checkpoint: of train_tokenizer.py, or None.
    cfg: the settings of train_tokenizer.py.
    """

    def __init__(self, convnext, discriminator, checkpoint, cfg):
        self.cfg, self.convnext, self.discriminator, self.optimizers = cfg, convnext, discriminator, []
        self.first = cfg.proxy_steps + cfg.adversarial_from  # the first step with the adversarial loss
        self.lecam = torch.zeros(2)  # moving averages of the discriminator's mean logits for images and reconstructions
        self.recon, self.means = [], defaultdict(float)
        if not discriminator:
            return
        device = discriminator.conv_in.weight.device
        self.lecam = self.lecam.to(device)
        self.ddp = parallel(discriminator, device, cfg)
        self.optimizers = make_optimizers(discriminator, cfg, cfg.beta2)
        if checkpoint and checkpoint["step"] > cfg.proxy_steps:
            training = checkpoint["training"]
            self.lecam.copy_(training["lecam"])
            discriminator.load_state_dict(training["discriminator"])
            for optimizer, state in zip(self.optimizers, training["optimizers"][-len(self.optimizers):]):
                optimizer.load_state_dict(state)

    def state(self):
        """The state to save in a checkpoint, without the optimizers."""
        return {"lecam": self.lecam, "discriminator": self.discriminator.state_dict() if self.discriminator else None}

    def __call__(self, recon, images, step):
        """The weighted sum of the losses of reconstructions recon (B, ch, H, W) of images, for the tokenizer."""
        losses = {}
        if self.convnext:
            losses["perceptual"] = F.mse_loss(self.convnext.logits_of(recon), self.convnext.logits_of(images))
        if self.discriminator and step >= self.first:
            weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
            losses["adversarial"] = -torch.func.functional_call(self.discriminator, weights, (recon,)).mean()
            self.recon.append(recon.detach())
        for name, loss in losses.items():
            self.means[name] += loss.detach() * len(images) / self.cfg.batch_size
        return sum(getattr(self.cfg, name) * loss for name, loss in losses.items())

    def train_discriminator(self, images, step):
        """After a step of the tokenizer on this rank's images (rows, ch, H, W): one step of the discriminator on these
        and on the reconstructions since the last call. Returns this rank's part of the mean of each loss, by name."""
        means, self.means = self.means, defaultdict(float)
        if not self.discriminator or step < self.first:
            return means
        recon, self.recon = torch.cat(self.recon), []
        cfg, mean, logits = self.cfg, torch.zeros((), device=images.device), torch.zeros(2, device=images.device)
        _, micro_batches = local_batch(cfg.batch_size, cfg.device_batch)
        for part in micro_batches:
            self.ddp.require_backward_grad_sync = part is micro_batches[-1]
            real, fake = self.ddp(torch.cat([images[part], recon[part]])).flatten(1).chunk(2)  # (B, 256) each
            share = len(real) / cfg.batch_size
            loss = discriminator_loss(real, fake, self.lecam, cfg.lecam) * share
            (loss * rank_and_world_size()[1]).backward()
            mean += loss.detach()
            logits += torch.stack([real.mean(), fake.mean()]).detach() * share
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), cfg.clip or math.inf, error_if_nonfinite=True)
        set_lr(self.optimizers, warmup_cosine(step - self.first, cfg.steps - self.first, cfg.warmup, cfg.lr_end))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.lecam.lerp_(all_reduce(logits), 1 - cfg.lecam_ema)
        return means | {"discriminator": mean}


def discriminator_loss(real, fake, lecam, weight):
    """Hinge loss and LeCam regularization (arXiv 2104.03310) of the logits of images and of reconstructions, (B, 256)
    each.

    lecam: (2,), moving averages of the mean logits of both.  weight: of the regularization.
    """
    hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    # TiTok squares the mean logit of a device; that of an image does not depend on the number of devices
    margin = F.relu(real.mean(1) - lecam[1]).square().mean() + F.relu(lecam[0] - fake.mean(1)).square().mean()
    return hinge + weight * margin


def load_networks(cfg, checkpoint, device):
    """MaskGIT-VQGAN, None if it is not needed (any more), and the PixelLosses. ValueError if a file is missing or
    settings do not fit together."""
    vqgan, convnext, discriminator = None, None, None
    if cfg.proxy_steps > cfg.steps:
        raise ValueError(f"proxy_steps {cfg.proxy_steps} is more than all steps, {cfg.steps}")
    if cfg.proxy_steps and not cfg.vqgan:
        raise ValueError("proxy codes need MaskGIT-VQGAN: give its file as --vqgan, or --proxy_steps 0 to do without")
    if cfg.perceptual and not cfg.convnext:
        raise ValueError("the perceptual loss needs ConvNeXt-S: give its file as --convnext, or --perceptual 0")
    if cfg.adversarial and cfg.discriminator % 32:
        raise ValueError(f"discriminator must be a multiple of 32, got {cfg.discriminator}")
    if cfg.vqgan and (not checkpoint or checkpoint["step"] < cfg.proxy_steps):
        vqgan = load_vqgan(cfg.vqgan).to(device)
    if cfg.perceptual and cfg.proxy_steps < cfg.steps:
        convnext = load_convnext(cfg.convnext).to(device)
    if cfg.adversarial and cfg.proxy_steps < cfg.steps:
        torch.manual_seed(cfg.seed)
        discriminator = Discriminator(cfg.discriminator).to(device)
    return vqgan, PixelLosses(convnext, discriminator, checkpoint, cfg)
