"""What TiTok's recipe trains the pixels with beside the squared error (arXiv 2406.07550): a perceptual loss, and an
adversarial loss whose discriminator learns at the same time. The digits do without."""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F

import common
from data import records
from published.convnext import load_convnext
from published.discriminator import Discriminator
from published.maskgit_vqgan import load_vqgan


class Critics:
    """Two networks that see reconstructions: one as published, ConvNeXt, and one in training, the discriminator.

    convnext, discriminator: or None.  checkpoint: of train_tokenizer.py, or None.  cfg: the settings of
    train_tokenizer.py.
    """

    def __init__(self, convnext, discriminator, checkpoint, cfg):
        self.cfg, self.convnext, self.discriminator, self.optimizers = cfg, convnext, discriminator, []
        self.first = cfg.proxy_steps + cfg.adversarial_from  # the step at which the discriminator comes in
        self.lecam = torch.zeros(2)  # moving averages of the discriminator's mean logits, of images and reconstructions
        self.recon, self.means = [], defaultdict(float)
        if not discriminator:
            return
        device = discriminator.conv_in.weight.device
        self.lecam = self.lecam.to(device)
        self.ddp = common.parallel(discriminator, device, cfg)
        steps = max(1, cfg.steps - self.first)
        self.optimizers = common.make_optimizers(discriminator, cfg, steps, cfg.warmup, cfg.beta2)
        if checkpoint and checkpoint["step"] > cfg.proxy_steps:
            training = checkpoint["training"]
            self.lecam.copy_(training["lecam"])
            discriminator.load_state_dict(training["discriminator"])
            records.restore_optimizers(self.optimizers, training["optimizers"][-len(self.optimizers):])

    def state(self):
        """What a checkpoint holds of this beside the optimizers."""
        return {"lecam": self.lecam, "discriminator": self.discriminator.state_dict() if self.discriminator else None}

    def loss(self, recon, images, step):
        """The weighted losses of reconstructions recon (B, ch, H, W) of images, for the tokenizer."""
        losses = {}
        if self.convnext:
            losses["perceptual"] = F.mse_loss(self.convnext.see(recon), self.convnext.see(images))
        if self.discriminator and step >= self.first:
            weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
            losses["adversarial"] = -torch.func.functional_call(self.discriminator, weights, (recon,)).mean()
            self.recon.append(recon.detach())
        for name, loss in losses.items():
            self.means[name] += loss.detach() * len(images) / self.cfg.batch_size
        return sum(getattr(self.cfg, name) * loss for name, loss in losses.items())

    def step(self, images, step):
        """After a step of the tokenizer on this rank's images (rows, ch, H, W): one of the discriminator, on these and
        the reconstructions that loss() was given. Returns this rank's part of the mean of each loss, by name."""
        means, self.means = self.means, defaultdict(float)
        if self.discriminator and step >= self.first:
            recon, self.recon = torch.cat(self.recon), []
            means["discriminator"] = self.train_discriminator(images, recon, step)
        return means

    def train_discriminator(self, images, recon, step):
        """One step on images and reconstructions (rows, ch, H, W), as the steps of train_tokenizer.py."""
        cfg = self.cfg
        _, micro_batches, world_size = common.shares(cfg.batch_size, cfg.device_batch)
        mean, logits = torch.zeros((), device=images.device), torch.zeros(2, device=images.device)
        for part in micro_batches:
            self.ddp.require_backward_grad_sync = part is micro_batches[-1]
            real, fake = self.ddp(torch.cat([images[part], recon[part]])).flatten(1).chunk(2)  # (B, 256) each
            weight = len(real) / cfg.batch_size
            loss = discriminator_loss(real, fake, self.lecam, cfg.lecam) * weight
            (loss * world_size).backward()
            mean += loss.detach()
            logits += torch.stack([real.mean(), fake.mean()]).detach() * weight
        norm = torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), cfg.clip or math.inf)
        records.check_finite(norm, step, cfg)
        for optimizer, schedule in self.optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.lecam.lerp_(common.all_reduce(logits), 1 - cfg.lecam_ema)
        return mean


def discriminator_loss(real, fake, lecam, weight):
    """Hinge loss and LeCam regularization (arXiv 2104.03310) of the logits of images and of reconstructions, (B, 256)
    each.

    lecam: (2,), moving averages of the mean logits of both.  weight: of the regularization.
    """
    hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    # TiTok squares the mean logit of a device; that of an image does not depend on the number of devices
    reach = F.relu(real.mean(1) - lecam[1]).square().mean() + F.relu(lecam[0] - fake.mean(1)).square().mean()
    return hinge + weight * reach


def load_networks(cfg, checkpoint, device):
    """MaskGIT-VQGAN and the Critics of the paper's recipe, each None where it is not needed (any more). ValueError
    where a file is."""
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
    return vqgan, Critics(convnext, discriminator, checkpoint, cfg) if convnext or discriminator else None
