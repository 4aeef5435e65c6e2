"""`hallmark datasets ...`: build, import, compare, tag and export datasets, by the public API."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from tomllib import TOMLDecodeError, loads
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from app.client import Client, ServiceFailure
from app.terminal import Key, Url, err, explained, out, whole

datasets = typer.Typer(help="Datasets: build, import, compare, tag, export.", no_args_is_help=True)

URL = "http://127.0.0.1:8080"
POLL_SECONDS = 0.5
SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".parquet"})
"""What `import` picks from a folder."""
SPLITS = ("train", "heldout")

Name = Annotated[str, typer.Argument(help="The dataset's name.")]
Label = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A dataset, or a version of it by number or tag.")]
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, in TOML or JSON.", exists=True, dir_okay=False)]
Purpose = Annotated[Literal["training", "evaluation"], typer.Option(help="What the dataset is for.")]
Wait = Annotated[bool, typer.Option(help="Wait for the build, and tell what came of it.")]


@datasets.command("build")
def build(
    name: Name, recipe: RecipeFile, key: Key, url: Url = URL, purpose: Purpose = "training", wait: Wait = True
) -> None:
    """Build the next version of predictions and what was said of them."""
    given = {"recipe": recipe_of(recipe), "purpose": purpose}
    with explained(), Client(url, key) as client:
        content = msgspec.json.encode(given)
        started = client.call("POST", f"/v1/datasets/{name}/builds", content=content, headers=_JSON)
        _tell(ended(client, started) if wait else started)


@datasets.command("import")
def bring(
    name: Name,
    recipe: RecipeFile,
    paths: Annotated[list[Path], typer.Argument(help="Files, and folders to search for them.", exists=True)],
    key: Key,
    url: Url = URL,
    purpose: Purpose = "training",
    wait: Wait = True,
) -> None:
    """Make the next version of files: JSON lines, CSV, Parquet, or a folder of them; all rows are taken or none."""
    given = {"recipe": msgspec.json.encode(recipe_of(recipe)).decode(), "purpose": purpose}
    with explained(), ExitStack() as opened, Client(url, key) as client:
        found = list(_files(paths))
        if not found:
            raise ServiceFailure(f"There is no file to read; {', '.join(sorted(SUFFIXES))} are read.")
        files = [("files", (quoted, opened.enter_context(path.open("rb")))) for path, quoted in found]
        started = client.call("POST", f"/v1/datasets/{name}/imports", data=given, files=files)
        _tell(ended(client, started) if wait else started)


@datasets.command("list")
def show_all(key: Key, url: Url = URL) -> None:
    """List the datasets."""
    table = Table("dataset", "task", "purpose", "version", "created")
    with explained(), Client(url, key) as client:
        for each in client.call("GET", "/v1/datasets", params={"limit": 200})["data"]:
            table.add_row(each["name"], each["task"], each["purpose"], str(each["version"]), each["created_at"][:19])
    out.print(table)


@datasets.command("show")
def show(label: Label, key: Key, url: Url = URL) -> None:
    """Show a version: what it has, and what each step of its build dropped."""
    name, version = _parts(label)
    with explained(), Client(url, key) as client:
        found = client.call("GET", f"/v1/datasets/{name}/versions/{version}")
    tags = f" ({', '.join(found['tags'])})" if found["tags"] else ""
    out.print(f"{name}@{found['version']}{escape(tags)}, {found['manifest']['task']}, {found['manifest']['purpose']}")
    out.print(f"digest {found['digest']}, {found['rows']} rows, {found['erased']} erased", soft_wrap=True)
    _show_report(found["report"])


@datasets.command("diff")
def diff(
    name: Name,
    old: Annotated[str, typer.Argument(help="A version by number or tag.")],
    key: Key,
    new: Annotated[str, typer.Argument(help="Another.")] = "latest",
    url: Url = URL,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many rows at most.")] = 20,
) -> None:
    """Show how two versions differ, row by row."""
    with explained(), Client(url, key) as client:
        given = {"old": old, "new": new, "limit": limit}
        found = client.call("GET", f"/v1/datasets/{name}/diff", params=given)
    out.print(f"{found['added']} added, {found['removed']} removed, {found['changed']} of them changed")
    for each in found["data"]:
        said = each["content"] or {}
        mark = "+" if each["change"] == "added" else "-"
        asked = " ".join(str(said.get("question", "erased")).split())[:60]
        line = f"{mark} {each['digest'][:12]} {each['split']:7} {said.get('label', '')} {asked}"
        out.print(escape(line), soft_wrap=True)


@datasets.command("tag")
def tag(label: Label, name_of_tag: Annotated[str, typer.Argument(metavar="TAG")], key: Key, url: Url = URL) -> None:
    """Give a version a name, which moves there from wherever it was."""
    name, version = _parts(label)
    with explained(), Client(url, key) as client:
        found = client.call("GET", f"/v1/datasets/{name}/versions/{version}")
        client.call("PUT", f"/v1/datasets/{name}/tags/{quote(name_of_tag)}", json={"version": found["version"]})
    out.print(f"{name}@{found['version']} is {escape(name_of_tag)}")


@datasets.command("export")
def export(
    label: Label,
    target: Annotated[Path, typer.Option("--out", help="The folder to write; it is made.", file_okay=False)],
    key: Key,
    url: Url = URL,
    kind: Annotated[Literal["jsonl", "parquet"], typer.Option("--format", help="What rows are written as.")] = "jsonl",
) -> None:
    """Write a version into a folder: its manifest, and a file for each side of the split; checked by their digests."""
    with explained(), Client(url, key) as client:
        number, manifest = export_version(client, label, target, kind=kind)
    rows = " and ".join(f"{manifest['splits'][split]['rows']} {split}" for split in SPLITS)
    out.print(f"{label.partition('@')[0]}@{number}: {rows} rows in {escape(str(target))}", soft_wrap=True)


def export_version(client: Client, label: str, target: Path, *, kind: str = "jsonl") -> tuple[int, dict[str, Any]]:
    """Write a version into a folder, checked by its digests; gives the version's number and manifest.

    Raises:
        ServiceFailure: there is no such version, or rows of it were erased meanwhile.
    """
    name, version = _parts(label)
    # By its number: a tag might move meanwhile.
    found = client.call("GET", f"/v1/datasets/{name}/versions/{version}")
    path = f"/v1/datasets/{name}/versions/{found['version']}/files"
    target.mkdir(parents=True, exist_ok=True)
    digests = {split: _fetch(client, f"{path}/{split}.{kind}", target / f"{split}.{kind}") for split in SPLITS}
    manifest = client.call("GET", f"{path}/manifest.json")
    said = {split: manifest["splits"][split]["sha256"] for split in SPLITS}
    if kind == "jsonl" and digests != said:
        raise ServiceFailure("Rows were erased while the files were written. Export them again.")
    _fetch(client, f"{path}/manifest.json", target / "manifest.json")
    return found["version"], manifest


_JSON = {"content-type": "application/json"}


def recipe_of(file: Path) -> Any:
    """Read the file of a recipe."""
    try:
        text = file.read_text(encoding="utf-8")
        return msgspec.json.decode(text) if file.suffix.lower() == ".json" else loads(text)
    except (UnicodeDecodeError, TOMLDecodeError, msgspec.DecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}") from None


def _files(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each file, with its name within the folder that was given."""
    for path in paths:
        if path.is_file():
            yield path, path.name
            continue
        for found in sorted(path.rglob("*")):
            if found.is_file() and found.suffix.lower() in SUFFIXES and found.name != "dataset_infos.json":
                yield found, found.relative_to(path).as_posix()


def _parts(label: str) -> tuple[str, str]:
    name, _, version = label.partition("@")
    return quote(name, safe=""), quote(version or "latest", safe="")


def ended(client: Client, started: dict[str, Any], pause: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Wait for the end of a build, telling its steps."""
    build, last = started, ""
    while build["state"] in ("waiting", "running"):
        if build["step"] != last:
            last = build["step"]
            err.print(last, style="dim")
        pause(POLL_SECONDS)
        build = client.call("GET", f"/v1/datasets/{build['dataset']}/builds/{build['id']}")
    return build


def _tell(build: dict[str, Any]) -> None:
    """Tell what came of a build; one that failed exits with 1."""
    if build["report"]:
        _show_report(build["report"])
    if build["state"] in ("failed", "cancelled"):
        told = build["error"]["message"] if build["error"] else "It was cancelled."
        raise ServiceFailure(told)
    if build["state"] == "done":
        state = "unchanged" if build["step"] == "unchanged" else "made"
        out.print(f"{build['dataset']}@{build['version']} {state}")
    else:
        out.print(f"build {build['id']}")


def _show_report(report: dict[str, Any]) -> None:
    table = Table("step", "kept", "dropped", "noted")
    for step in report["steps"]:
        counts = [", ".join(f"{n} {what}" for what, n in step[each].items()) for each in ("dropped", "noted")]
        table.add_row(step["name"], str(step["kept"]), *map(escape, counts))
    out.print(table)
    for split, classes in report["rows"].items():
        told = ", ".join(f"{n} {name}" for name, n in classes.items())
        out.print(f"{split}: {escape(told) or 'nothing'}", soft_wrap=True)


def _fetch(client: Client, path: str, target: Path) -> str:
    """Write a file, whole or not at all; gives its SHA-256."""
    digest = sha256()
    with whole(target) as file:
        for piece in client.pieces(path):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
