"""No pattern's time grows faster than its text: while a pattern is looked for, nothing else in the process runs."""

import ast
import importlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("app", "retrieval", "observability", "finetune")
_METHODS = ("search", "match", "fullmatch", "findall", "finditer", "sub", "split")
# These are given no more than another pattern let through: a marker's ten numbers of three digits.
_BOUNDED = frozenset(("retrieval.markers._RANGE",))
_UNITS = (
    *("a", "a ", "a-", "a.", "a/", "a\n", "a@", "a_", "a'", "A", "A ", "aB", "é", "1", "1 ", "1,", "1.", "1\n", "1-"),
    *(
        " 1 2",
        ",1 ",
        "- ",
        "-",
        "--",
        "_",
        "*",
        "**",
        "**a",
        "_a",
        "`",
        "` ",
        "`a``a```a",
        "'",
        '"',
        "…",
        "…)",
        ".",
        "!",
    ),
    *(
        " ",
        "\t",
        "\n",
        " \n",
        "\r",
        "\r\n",
        "\n ",
        "\n- ",
        "\x00",
        "\x00 ",
        "\xad",
        "#",
        "# ",
        ">",
        "> ",
        "~",
        "|",
        "| ",
    ),
    *("[", "[1", "[1]", "](", "](a", "](a ", '](a "', "[1](", "(", "((", "()", "{", "{}", "【1†", "<", "<a", "<!--"),
    *("<!---->", "</", "<|", "&", "&#", "=", "=a", ":", "a:", "::", ";", ", ", "%", "http://a.", "www.", "://", "@"),
    *(
        "for ",
        "for a ",
        "no ",
        "not ",
        "one ",
        "and ",
        "or ",
        "I ",
        "the ",
        "ok ",
        "is the ",
        "is the a ",
        "in ",
        "5 may ",
    ),
    *(
        "passage 1 ",
        "from source ",
        "sorry ",
        "title: ",
        "-----BEGIN ",
        "charset=",
        "PK\x03\x04",
        "wait = ",
        "style=",
        "d:",
    ),
)
_BEGINNINGS = ("", "x ", "for ", "<!-- ", "[1](", '"', "```", "From the text ", "title: ", "---\n", "[a](b ", "<a ")
_ENDINGS = ("\x01!", " \x01a")
_SUSPICIOUS_SECONDS = 0.004
"""For 2,000 characters: what goes over them once takes a fiftieth of it, what does so for each of them more."""


@dataclass(frozen=True, slots=True)
class _Use:
    """A pattern, and by which of its methods the package asks it."""

    name: str
    pattern: re.Pattern[Any]
    method: str

    def seconds(self, text: str, *, tries: int = 1) -> float:
        """CPU time of this thread, which other processes do not lengthen: the shortest of the tries."""
        said: Any = text.encode() if isinstance(self.pattern.pattern, bytes) else text
        times = []
        for _ in range(tries):
            began = time.thread_time()
            if self.method == "sub":
                self.pattern.sub(said[:0], said)
            elif self.method == "finditer":
                list(self.pattern.finditer(said))
            else:
                getattr(self.pattern, self.method)(said)
            times.append(time.thread_time() - began)
        return min(times)


def _worst(use: _Use) -> str | None:
    """The attack whose time grows faster than itself, if there is one."""
    for unit in _UNITS:
        for beginning in _BEGINNINGS:
            for ending in _ENDINGS:
                if _grows(use, beginning, unit, ending):
                    return f"{beginning!r} + {unit!r} * n + {ending!r}"
    return None


def _grows(use: _Use, beginning: str, unit: str, ending: str) -> bool:
    # What is exponential is seen before it takes minutes.
    for count in (16, 20, 24, 28):
        if use.seconds(beginning + unit * count + ending) > 0.05:
            return True
    count = 2_000 // len(unit)
    if use.seconds(beginning + unit * (count // 8) + ending) > 0.05:
        return True
    if use.seconds(beginning + unit * count + ending) < _SUSPICIOUS_SECONDS:
        return False
    once = use.seconds(beginning + unit * count + ending, tries=3)
    return use.seconds(beginning + unit * 2 * count + ending, tries=3) > 3 * once


def _uses() -> Iterator[_Use]:
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            source = path.read_text()
            if "re." not in source or path.name == "__main__.py":
                continue
            tree = ast.parse(source)
            module = ".".join(path.relative_to(_ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield from _literals(module, tree)
            if any(_compiles(node) for statement in tree.body for node in _outside_functions(statement)):
                yield from _compiled(module, tree)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _outside_functions(child)


def _compiles(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "re.compile"


def _compiled(module: str, tree: ast.Module) -> Iterator[_Use]:
    """The patterns a module keeps, by themselves or in a table."""
    asked: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _METHODS and isinstance(node.value, ast.Name):
            asked.setdefault(node.value.id, set()).add(node.attr)
    for name, value in vars(importlib.import_module(module)).items():
        for pattern in _patterns_in(value):
            for method in sorted(asked.get(name, {"search"})):
                yield _Use(f"{module}.{name}", pattern, method)


def _patterns_in(value: Any) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _patterns_in(inner)
    elif isinstance(value, tuple | list | frozenset):
        for inner in value:
            yield from _patterns_in(inner)


def _literals(module: str, tree: ast.Module) -> Iterator[_Use]:
    """The patterns written where they are asked."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        of_re = isinstance(node.func.value, ast.Name) and node.func.value.id == "re" and node.func.attr in _METHODS
        if of_re and isinstance(first := node.args[0], ast.Constant):
            yield _Use(f"{module}:{first.value}", re.compile(first.value), node.func.attr)


@lru_cache(maxsize=1)
def _every_use() -> dict[str, _Use]:
    return {f"{use.name}.{use.method}": use for use in _uses() if use.name not in _BOUNDED}


def test_a_pattern_that_grows_faster_than_its_text_is_found() -> None:
    for pattern in (r"(?:a\s*)*\Z", r"[\w-]*@", r"\bfor\s+(?:\w+\s*){1,4}\Z", r"\s*(?:<!--.{0,2000}?-->\s*)*<html"):
        assert _worst(_Use("bad", re.compile(pattern), "search")) is not None
    for pattern in (r"\w+", r"[\w-]{0,64}+@", r"\s*+x"):
        assert _worst(_Use("good", re.compile(pattern), "match")) is None


@pytest.mark.slow
@pytest.mark.alone
def test_no_pattern_of_the_package_grows_faster_than_its_text() -> None:
    uses = _every_use()
    assert len(uses) > 150
    found = {name: worst for name, use in uses.items() if (worst := _worst(use)) is not None}
    assert not found
