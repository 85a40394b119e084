import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers at every run."""
    torch.manual_seed(0)
