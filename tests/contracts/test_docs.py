"""The documents say what the code does: every setting, error code, module and decision is in them, and no others."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from app import errors
from app.cli import app as cli
from app.routes import errors as route_errors
from app.settings import Settings
from tests.service import description

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HANDBOOK = sorted((ROOT / "examples" / "handbook").glob("*.md"))
# What the command line, as a client, reads: where the service runs and the key to send.
NOT_SETTINGS = {"HALLMARK_URL", "HALLMARK_API_KEY"}
PAPERS = [
    *HANDBOOK,
    *sorted(DOCS.rglob("*.md")),
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "Dockerfile",
            "deploy/compose.yaml",
            "deploy/kubernetes.yaml",
        )
    ),
]


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def setting_rows() -> Iterator[tuple[str, object]]:
    """Give each variable's name and default."""
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, BaseModel):
            for inner, inner_field in type(field.default).model_fields.items():
                yield f"HALLMARK_{name}_{inner}".upper(), inner_field.default
        else:
            yield f"HALLMARK_{name}".upper(), field.default


def error_codes() -> dict[str, int]:
    classes = [
        kind
        for module in (errors, route_errors)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, errors.ServiceError)
    ]
    return {kind.code: kind.status for kind in classes}


def shown(default: object) -> str:
    """How the table writes a default."""
    if default is None:
        return "unset"
    if default == "":
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{default}`"


@pytest.mark.parametrize(("variable", "default"), list(setting_rows()), ids=[name for name, _ in setting_rows()])
def test_every_setting_is_documented_with_its_default(variable: str, default: object) -> None:
    assert f"| `{variable}` | {shown(default)} |" in read("docs", "configuration.md")


def test_every_variable_that_a_paper_names_is_a_setting() -> None:
    known = {variable for variable, _ in setting_rows()} | NOT_SETTINGS
    for paper in PAPERS:
        named = set(re.findall(r"\bHALLMARK_[A-Z_]*[A-Z]\b(?!<)", paper.read_text(encoding="utf-8")))
        assert not named - known, f"{paper.relative_to(ROOT)} names {sorted(named - known)}"


@pytest.mark.parametrize("paper", [("docs", "errors.md"), ("examples", "handbook", "errors.md")], ids=lambda p: p[0])
def test_every_error_code_is_documented_with_its_status_and_no_other_is(paper: tuple[str, ...]) -> None:
    found = {code: int(status) for status, code in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", read(*paper), re.MULTILINE)}
    assert found == error_codes()


def test_handbook_lists_the_routes_there_are() -> None:
    listed = set(
        re.findall(r"^\| `(\w+) (/v1/\S+)` \|", read("examples", "handbook", "generated-clients.md"), re.MULTILINE)
    )
    described = {
        (method.upper(), re.sub(r"\{\w*id\}", "{id}", path))
        for path, methods in description()["paths"].items()
        for method in methods
        if path.startswith("/v1/")
    }
    assert listed == described


def test_every_command_that_a_paper_names_exists() -> None:
    known = {command.name or command.callback.__name__ for command in cli.registered_commands if command.callback}
    known |= {group.name for group in cli.registered_groups if group.name}
    for paper in PAPERS:
        named = set(
            re.findall(
                r"(?:^|[`/ ])hallmark (?!serve\b)([a-z]{3,})\b(?=[^`]*`| [A-Z\"~-])", paper.read_text(encoding="utf-8")
            )
        )
        assert not named - known, f"{paper.relative_to(ROOT)} names {sorted(named - known)}"


def test_every_make_target_that_a_paper_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.MULTILINE))
    for paper in PAPERS:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)(?:`|$| +#)", paper.read_text(encoding="utf-8"), re.MULTILINE))
        assert not named - targets, f"{paper.relative_to(ROOT)} names {sorted(named - targets)}"


def test_readme_tree_names_every_module_of_the_packages() -> None:
    readme = read("README.md")
    for package in ("app", "retrieval", "observability", "finetune"):
        for path in sorted((ROOT / package).glob("*.py")):
            if path.name != "__init__.py":
                assert re.search(rf"^ +{path.name} +\S", readme, re.MULTILINE), f"README.md has no line for {path.name}"
        for folder in sorted((ROOT / package).iterdir()):
            if folder.is_dir() and (folder / "__init__.py").exists():
                assert f"{folder.name}/" in readme, f"README.md has no line for {package}/{folder.name}/"


def test_readme_tree_names_no_file_that_is_gone() -> None:
    tree = read("README.md").split("```text")[1].split("```")[0]
    names = set(re.findall(r"^ +(\w+\.py) ", tree, re.MULTILINE))
    existing = {
        path.name
        for package in ("app", "retrieval", "observability", "finetune", "examples")
        for path in (ROOT / package).rglob("*.py")
    }
    assert names
    assert not names - existing


def test_every_module_says_what_it_is_for() -> None:
    for package in ("app", "retrieval", "observability", "finetune"):
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.relative_to(ROOT)}"


def test_decisions_are_numbered_dated_and_listed() -> None:
    decisions = sorted((DOCS / "decisions").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{n:04d}" for n in range(1, len(decisions) + 1)]
    listed = read("docs", "architecture.md")
    for path in decisions:
        text = path.read_text(encoding="utf-8")
        assert re.match(rf"# {path.name[:4]}: \S", text), path.name
        assert re.search(r"^Status: (accepted|superseded by \d{4})\. Date: 20\d\d-\d\d-\d\d\.$", text, re.MULTILINE)
        for heading in ("## Context", "## Decision", "## Consequences"):
            assert heading in text, f"{path.name} has no {heading!r}"
        assert f"decisions/{path.name}" in listed, f"docs/architecture.md does not list {path.name}"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_papers_lead_somewhere(paper: Path) -> None:
    if paper.suffix == ".md":
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", paper.read_text(encoding="utf-8")):
            if "gateway/..." not in target:
                assert (paper.parent / target).exists(), f"{paper.name} links to {target}"
