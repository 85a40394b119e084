"""The device and how it is used: process group, number formats, torch.compile, memory."""
import ctypes
import os
import re
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.command_line import stop
from support.distributed import rank_and_world_size


def init_distributed(device, tf32=True):
    """Choose the device from "auto", "cpu", "cuda" or "cuda:N", and join the process group if torchrun started this
    process. Returns (device, rank, world size)."""
    missing = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    tasks = {os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")}
    if missing and ("RANK" in os.environ or tasks != {"1"}):
        stop("by RANK, Slurm or MPI this is one of several processes, but torchrun has not started it; start torchrun, "
             "with Slurm by srun --ntasks-per-node=1 torchrun ..., or ask for a single task")
    gpus = torch.cuda.device_count()
    device = ("cuda" if gpus else "cpu") if device == "auto" else device
    if not re.fullmatch("cpu|cuda(:[1-9]?[0-9])?", device):
        stop(f"--device must be auto, cpu, cuda or cuda:N, got {device}")
    device = torch.device(device)
    if device.type == "cuda" and "RANK" in os.environ:
        if device.index is not None:
            stop(f"each process needs its own GPU; under torchrun, use --device cuda, not {device}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= gpus:
        stop(f"device {device} is asked for, but PyTorch sees {gpus} GPUs; use --device cpu, or fewer processes")
    set_tf32(tf32)
    keep_freed_memory()
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, *rank_and_world_size()


def set_tf32(on):
    """Turn TF32 on or off for float32 products, on GPUs that have it."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def keep_freed_memory():
    """Have glibc keep the memory that PyTorch frees. By default it returns large blocks to the system, and the page
    faults of the next step's tensors take up to a tenth of the digits' training. No effect with other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: blocks of any size come from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def fast_bf16(device):
    """Whether the processor multiplies bfloat16 fast. Many CPUs only emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def use_bf16(device, bf16):
    """Whether to multiply in bfloat16. bf16: "on", "off", or "auto", on where it is fast."""
    return bf16 == "on" or bf16 == "auto" and fast_bf16(device)


def autocast(device, bf16):
    """Automatic mixed precision in bfloat16, see use_bf16()."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device, bf16))


def parallel(model, device, cfg):
    """The model as the training loop calls it: compiled if cfg.compile, in DDP if there is a process group."""
    model = torch.compile(model) if cfg.compile else model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids) if dist.is_initialized() else model
