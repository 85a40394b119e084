"""The device and how it is used."""
import pytest
import torch

from support import hardware
from support.hardware import autocast, init_distributed


@pytest.mark.parametrize("device, words", [
    ("meta", "--device must be auto, cpu, cuda or cuda:N, got meta"), ("mps", "got mps"), ("cuda:01", "got cuda:01"),
    ("cuda:99", "device cuda:99 is asked for, but PyTorch sees [0-9]* GPUs")])
def test_devices_that_do_not_exist(device, words):
    """Fails if a device that does not exist ends in a traceback."""
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
        init_distributed(device)


@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, {"OMPI_COMM_WORLD_SIZE": "2"},
                                       {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}])
def test_processes_that_torchrun_has_not_started(variables, monkeypatch):
    """Fails if each task of srun trains alone and writes the same file, or RANK alone ends in a traceback."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="^error: [^\n]*torchrun has not started it[^\n]*$"):
        init_distributed("cpu")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    for name in variables.keys() - {"SLURM_NTASKS"}:
        monkeypatch.delenv(name)
    assert init_distributed("cpu")[1:] == (0, 1)


def test_autocast(monkeypatch):
    """Fails if --bf16 has no effect, or if "auto" emulates bfloat16, which is many times slower than float32."""
    for fast in (True, False):
        monkeypatch.setattr(hardware, "fast_bf16", lambda device: fast)
        for bf16, dtype in (("on", torch.bfloat16), ("off", torch.float32),
                            ("auto", torch.bfloat16 if fast else torch.float32)):
            with autocast(torch.device("cpu"), bf16):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
