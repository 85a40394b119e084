"""Optimizers and the learning rate: AdamW, Muon, warm-up and cosine decay."""
import math

import torch

from support.hardware import use_bf16

NEWTON_SCHULZ = 5 * [(3.4445, -4.7750, 2.0315)]  # coefficients (a, b, c) of each iteration


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) for weight matrices.

    The step is the momentum (Nesterov's), replaced by a matrix with the same singular vectors and singular values near
    1, and scaled to the size of AdamW's steps (arXiv 2502.16982). This is torch.optim.Muon with adjust_lr_fn
    "match_rms_adamw", except that it multiplies in float32 without bf16, and all matrices of one shape together.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, bf16=True):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # of the products

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum, by_shape = group["momentum"], {}
            for weight in group["params"]:
                if weight.grad is not None:
                    average = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                    average.lerp_(weight.grad, 1 - momentum)
                    update = weight.grad.lerp(average, momentum)
                    by_shape.setdefault(weight.shape, []).append((weight, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]), self.dtype)  # (N, rows, columns)
                for (weight, _), update in zip(pairs, updates):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonalize(matrices, dtype):
    """Matrices (N, rows, columns) with their singular values moved close to 1, by Newton-Schulz iterations in dtype."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value exceeds 1
    for a, b, c in NEWTON_SCHULZ:  # every singular value s becomes a s + b s^3 + c s^5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(model, cfg, beta2, decay_all=False):
    """A list of optimizers: AdamW, or Muon for the blocks' matrices and AdamW for the rest.

    cfg: optimizer, lr, muon_lr, weight_decay and bf16. Weight decay does not apply to norms, biases and embeddings,
    except with decay_all.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = {m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    for_muon = [w for name, w in trained.items() if cfg.optimizer == "muon" and "blocks." in name and w.ndim == 2]
    rest = {*trained.values()} - {*for_muon}
    groups = [{"params": [w for w in trained.values() if w in rest & matrices], "weight_decay": cfg.weight_decay},
              {"params": [w for w in trained.values() if w in rest - matrices],
               "weight_decay": cfg.weight_decay if decay_all else 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, beta2), fused=True)]
    if for_muon:
        bf16 = use_bf16(for_muon[0].device, cfg.bf16)
        optimizers.append(Muon(for_muon, cfg.muon_lr, cfg.weight_decay, bf16=bf16))
    return optimizers


def warmup_cosine(step, steps, warmup, end):
    """The learning rate at a step, counted from 0, as a share of its peak: linear warm-up, then cosine decay to end.
    The cosine includes the warm-up's steps."""
    cosine = (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2
    return min(1.0, (step + 1) / max(1, warmup)) * (end + (1 - end) * cosine)


def set_lr(optimizers, scale):
    """Set every learning rate to a share of its peak, which the optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * optimizer.defaults["lr"]
