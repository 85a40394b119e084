"""Imports run one way, so that each lesson can be read without the ones after it."""
import ast
import glob
import os
from graphlib import TopologicalSorter

from tests.scripts import ROOT

LAYERS = ["support", "data", "published", "dual_transform", "tokenizer", "fsdd", "beyond", "sample",
          "train_tokenizer", "train_fsdd", "evaluate_fid", "paper"]


def imports(path, modules):
    """The modules of the project that a file imports when it is imported."""
    with open(os.path.join(ROOT, path)) as file:
        statements = [node for node in ast.parse(file.read()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names}
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & modules


def test_imports_run_one_way():
    """Broken: fsdd.py could not be understood without beyond.py, or `from fsdd import generate` would fail in a circle
    of imports."""
    paths = [path for layer in LAYERS for name in (f"{layer}.py", os.path.join(layer, "*.py"))
             for path in glob.glob(name, root_dir=ROOT)]
    modules = {path[:-3].replace(os.sep, ".").removesuffix(".__init__"): path for path in paths}
    graph = {module: imports(path, modules.keys()) for module, path in modules.items()}
    assert "fsdd" in graph["beyond"] and "support.files" in graph["support.training"]  # the test finds imports
    list(TopologicalSorter(graph).static_order())  # fails for a circle
    for module, imported in graph.items():
        layer = LAYERS.index(module.split(".")[0])
        assert all(LAYERS.index(name.split(".")[0]) <= layer for name in imported), (module, imported)
