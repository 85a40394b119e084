import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, which take many minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many minutes; runs only with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        deselected = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers at every run."""
    torch.manual_seed(0)
