"""Imports run one way, so that each lesson can be read, and what is beyond the paper taken out, without the files above
it."""
import ast
import glob
import os

import pytest

from tests.scripts import ROOT

SCRIPTS = ("train_tokenizer", "train_fsdd", "evaluate_fid", "play")
LAYERS = [("support",), ("data", "published"), ("dual_transform",), ("tokenizer",), ("fsdd",), ("beyond", "masked"),
          ("sample",), SCRIPTS, ("paper",)]
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def project_files():
    """The names of all files of the project except tests, relative to its root. A reader's venv may lie there too."""
    names = ["*.py"] + [f"{name}/*.py" for name in LAYER]
    return [path for name in names for path in glob.glob(name, root_dir=ROOT)]


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def package(path):
    """data/loader.py -> data, fsdd.py -> fsdd"""
    return path.split("/")[0].removesuffix(".py")


def imports(path):
    """The project's packages and files that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
    return found & LAYER.keys()


@pytest.mark.parametrize("path", project_files())
def test_imports_run_one_way(path):
    """Fails if a file imports one above it or beside it: support the project, fsdd.py what is beyond the paper, a model
    a script, a script another one than sample.py, which loads models and draws images."""
    own = package(path)
    for other in imports(path):
        allowed = LAYER[other] < LAYER[own] or other == own and os.sep in path or (own, other) == ("published", "data")
        assert allowed, f"{path} imports {other}"


@pytest.mark.parametrize("path", [path for path in project_files()
                                  if package(path) in ("dual_transform", "tokenizer", "fsdd", "beyond", "masked")])
def test_models_know_nothing_of_files_ranks_and_command_lines(path):
    """Fails if a model can't be used without the machinery of the scripts."""
    assert not imports(path) & {"support", "data"}
    assert not {"os", "sys", "argparse", "torch.distributed"} & {
        name.name for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.Import) for name in node.names}


def test_each_section_of_beyond_can_be_deleted_alone():
    """Fails if a section of beyond.py uses what another one defines."""
    sections = [ast.parse(text) for text in read("beyond.py").split("# " + "-" * 117)][1:]  # without the imports
    defined = [{node.name for node in section.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
               for section in sections]
    assert len(sections) > 3 and all(defined)
    for section, own in zip(sections, defined):
        used = {node.id for node in ast.walk(section) if isinstance(node, ast.Name)}
        assert not used & set().union(*defined) - own
