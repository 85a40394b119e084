"""README.md: short, and what it points at is there."""
import os
import re

from tests.test_common import ROOT


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def test_its_length_and_commands():
    """Broken: the README would no longer be read in one sitting, or .ci/run would not find its two commands."""
    text = read("README.md")
    assert len(text.splitlines()) <= 180
    commands = re.findall("^pip install -r requirements.txt && .*", text, re.M)
    assert len(commands) == 2 and commands[1].endswith("&& pytest")


def test_places_in_the_code():
    """Broken: `fsdd.py:120` (`name`) would send the reader to another line than the one that has the name."""
    places = re.findall(r"`([\w/]+\.py):(\d+)` \(`([^`]+)`\)", read("README.md"))
    assert len(places) > 10
    for path, line, text in places:
        assert text in read(path).splitlines()[int(line) - 1], f"{path}:{line} does not have {text}"


def test_links():
    """Broken: a picture or page that README.md or a page in paper/ links to would be missing."""
    for page in ("README.md", "paper/README.md", "paper/details.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read(page)):
            if not target.startswith("http"):
                assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), target)), f"{page} links to {target}"
