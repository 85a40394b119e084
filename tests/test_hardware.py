"""The device and how it is used."""
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fsdd import Denoiser
from support import hardware
from support.hardware import autocast, init_distributed, parallel, set_switches
from tests.scripts import ROOT


@pytest.mark.parametrize("device, words", [
    ("meta", "--device must be auto, cpu, cuda or cuda:N, got meta"), ("mps", "got mps"), ("cuda:01", "got cuda:01"),
    ("cuda:99", "--device cuda:99 was given, but PyTorch sees [0-9]* GPUs")])
def test_devices_that_do_not_exist(device, words):
    """Broken: a device that PyTorch does not have would end in a traceback."""
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
        init_distributed(device)


def test_autocast(monkeypatch):
    """Broken: --bf16 would have no effect, or "auto" would emulate bfloat16, many times slower than float32."""
    for fast in (True, False):
        monkeypatch.setattr(hardware, "fast_bf16", lambda device: fast)
        for bf16, dtype in (("on", torch.bfloat16), ("off", torch.float32),
                            ("auto", torch.bfloat16 if fast else torch.float32)):
            with autocast(torch.device("cpu"), bf16):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_switches_reach_all_parts_of_a_model():
    """Broken: --fused_attention or --recompute would have no effect on some blocks."""
    model = Denoiser(6, 3, 2, 16, 2, 2)
    set_switches(model, SimpleNamespace(fused_attention="on", recompute=True))
    assert model.recompute is True and [block.attention.fused_attention for block in model.blocks] == ["on", "on"]
    assert parallel(model, torch.device("cpu"), SimpleNamespace(compile=False)) is model  # without a process group


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no effect with other C libraries")
def test_freed_memory_is_kept():
    """Broken: every large tensor of every step would come from the system, page by page."""
    code = """import resource, torch
from support.hardware import init_distributed
init_distributed("cpu")
for _ in range(40):  # in the first turns an aligned block may not fit into the one that was freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)  # 64 MiB, freed at once
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    faults = [int(number) for number in finished.stdout.split()]
    assert len(faults) == 40 and sorted(faults)[20] < 16, finished  # of 16384 pages of 4 KiB, or 32 of 2 MiB
