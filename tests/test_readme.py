"""The commands and links on the pages work."""
import functools
import importlib
import os
import re

import pytest

from tests.scripts import ROOT, run_here, successful
from tests.test_architecture import read

PAGES = ["README.md", "CONTRIBUTING.md", "beyond.md", "paper/README.md", "paper/details.md"]


@functools.lru_cache
def help_of(module, *words):
    """What a script prints for --help. words: what comes before the options."""
    return successful(run_here(importlib.import_module(module).main, *words, "--help", folder=ROOT)).stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_options_that_exist(page):
    """Fails if a command on the page ends in an error about its options."""
    commands = re.findall(r"(?:python|torchrun --\S+) (?:-m )?(paper\.\w+|\w+\.py)\b([^`|#&\n]*)",
                          read(page).replace("\\\n", " "))
    assert commands
    for script, arguments in commands:
        words = arguments.split(" --")[0].split()
        text = help_of(script.removesuffix(".py"), *words)
        for option in re.findall(r"--\w+", arguments):
            assert re.search(rf"{option}\b", text), f"{script} has no option {option}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Fails if a picture, file or page that the page links to is missing."""
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", read(page)) if not link.startswith("http")]
    assert links
    for link in links:
        assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), link)), f"{page} links to {link}"
