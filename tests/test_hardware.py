"""The device and how it is used."""
import pytest
import torch

from support import hardware
from support.hardware import autocast, init_distributed


@pytest.mark.parametrize("device, words", [
    ("meta", "--device must be auto, cpu, cuda or cuda:N, got meta"), ("mps", "got mps"), ("cuda:01", "got cuda:01"),
    ("cuda:99", "device cuda:99 is asked for, but PyTorch sees [0-9]* GPUs")])
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
