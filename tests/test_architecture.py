"""Imports run one way, so that each lesson can be read, and beyond.py taken out, without the files above it."""
import ast
import glob
import os

import pytest

from tests.scripts import ROOT

SCRIPTS = ("train_tokenizer", "train_fsdd", "sample", "evaluate_fid")
LAYERS = [("support",), ("data", "published"), ("dual_transform",), ("tokenizer",), ("fsdd",), ("beyond",),
          ("generation",), SCRIPTS, ("paper",)]
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def project_files():
    """The names of all files of the project except tests, relative to its root. A reader's venv may lie there too."""
    names = ["*.py"] + [f"{name}/*.py" for name in LAYER]
    return [path for name in names for path in glob.glob(name, root_dir=ROOT)]


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def package(path):
    """data/digits.py -> data, fsdd.py -> fsdd"""
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
    """Broken: a file would need one above it: support the project, fsdd.py what is beyond the paper, a model a script.
    No script imports another, but for evaluate_fid.py, which measures the images of sample.py."""
    own = package(path)
    for other in imports(path):
        allowed = LAYER[other] < LAYER[own] or other == own and os.sep in path
        allowed |= (own, other) in {("published", "data"), ("evaluate_fid", "sample")}
        assert allowed, f"{path} imports {other}"


@pytest.mark.parametrize("path", ["dual_transform.py", "tokenizer.py", "fsdd.py", "beyond.py"])
def test_models_know_nothing_of_files_ranks_and_command_lines(path):
    """Broken: a model could not be used without the machinery of the scripts."""
    assert not imports(path) & {"support", "data"}
    assert not {"os", "sys", "argparse", "torch.distributed"} & {
        name.name for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.Import) for name in node.names}


def test_each_remedy_can_be_deleted_alone():
    """Broken: a section of beyond.py would use what another one defines."""
    sections = [ast.parse(text) for text in read("beyond.py").split("# " + "-" * 117)]
    assert len(sections) == 6  # imports, five remedies
    defined = [{node.name for node in section.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
               for section in sections]
    used = [{node.id for node in ast.walk(section) if isinstance(node, ast.Name)} for section in sections]
    assert all(defined[1:])
    for i in range(1, 6):
        others = set().union(*(names for j, names in enumerate(defined) if j != i))
        assert not used[i] & others
