"""Who may import whom, and what nobody may use: read from the sources, so that no lazy import escapes.

`cloud_server` and `edge_client` never import each other, `shared` imports neither, and nothing that
is installed unpickles: an adapter or a checkpoint is a file from a stranger.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared", "cloud_server", "edge_client")
FORBIDDEN_IMPORTS = {
    "shared": {"cloud_server", "edge_client", "benchmarks", "tests"},
    "cloud_server": {"edge_client", "benchmarks", "tests"},
    "edge_client": {"cloud_server", "benchmarks", "tests"},
}
# Modules that run code from the data they read.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of every module and name that is imported anywhere in the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"__import__", "importlib.import_module", "import_module"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def _complaints(source: str, package: str) -> list[str]:
    tree = ast.parse(source)
    complaints = []
    torch_names = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torch_names |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    for name in _imported(tree):
        top = name.split(".")[0]
        if top in FORBIDDEN_IMPORTS[package]:
            complaints.append(f"imports {name}")
        if top in UNSAFE_MODULES:
            complaints.append(f"imports {name}, which runs code from data")
        if name in {"torch.load", "torch.serialization", "numpy.load"}:
            complaints.append(f"imports {name}, which can unpickle")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if any(text in {f"{torch}.load", f"{torch}.serialization.load"} for torch in torch_names):
                complaints.append("uses torch.load, which can unpickle")
        if (
            isinstance(node, ast.keyword)
            and isinstance(node.value, ast.Constant)
            and node.value.value is True
        ):
            if node.arg == "allow_pickle":
                complaints.append("passes allow_pickle=True")
            if node.arg == "trust_remote_code":
                complaints.append("passes trust_remote_code=True")
    return complaints


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_to_its_side(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not _complaints(path.read_text(), package)


def test_all_packages_were_read() -> None:
    for package in PACKAGES:
        assert any(path.is_relative_to(ROOT / package) for path in SOURCES), f"no source found in {package}"


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import edge_client.session", "cloud_server"),
        ("def f():\n    from cloud_server import engine", "edge_client"),
        ("import importlib\nimportlib.import_module('cloud_server.engine')", "shared"),
        ("import pickle", "shared"),
        ("from torch import load", "edge_client"),
        ("import torch as t\nt.load('x')", "edge_client"),
        ("f(trust_remote_code=True)", "cloud_server"),
    ],
)
def test_the_check_itself_finds_each_fault(source: str, package: str) -> None:
    assert _complaints(source, package)
