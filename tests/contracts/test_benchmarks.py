"""The benchmarks, which no suite runs whole: what they import is there, whatever has moved since they were written."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"app", "retrieval", "finetune", "observability", "tests"}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Each module of ours that a file takes a name from, with the name."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OURS:
            yield from ((node.module, alias.name) for alias in node.names)


def offers(module: str, name: str) -> bool:
    """Whether a module has a name: one of its own top level, or a module inside it."""
    place = ROOT.joinpath(*module.split("."))
    if place.joinpath(f"{name}.py").is_file() or place.joinpath(name, "__init__.py").is_file():
        return True
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.is_file() and name in set(_names(ast.parse(file.read_bytes())))


def _names(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (alias.asname or alias.name for alias in aliases)
            case ast.Assign() | ast.AnnAssign():
                yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_what_a_benchmark_imports_is_there(file: Path) -> None:
    missing = [f"{module}.{name}" for module, name in imports(file) if not offers(module, name)]

    assert not missing, f"{file.name} imports what has moved or gone: {', '.join(missing)}"
