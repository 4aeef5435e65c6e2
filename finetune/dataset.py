"""An exported dataset, read and verified: its files' digests, its rows' digests, and what each kind of task needs.

The main rule: a row that is not what its digest says, or that lacks what its task needs, is an error that names the
file and the line. Nothing is skipped. The digests are those that the service's lineage verifies.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from finetune.errors import BadDataset

FORMAT = "hallmark-dataset/1"
MANIFEST = "manifest.json"
ORIGIN = ("row", "content_digest", "prediction_id", "label_id")
"""What of a row is not its content."""

Kind = Literal["classify", "answer", "extract", "preference"]
SplitName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_-]*$")]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str


class Passage(msgspec.Struct, frozen=True, kw_only=True):
    """A passage that an answer may rest on."""

    id: Text
    text: str | None = None
    """None where the document has been replaced since."""
    document_id: str | None = None
    title: str | None = None
    heading_path: tuple[str, ...] = ()


class Feature(msgspec.Struct, frozen=True):
    """What was known of whom a row is about, when it was asked."""

    feature: Text
    value: str | int | float | bool


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One example. `messages` ends with the right answer; a preference has `prompt`, `chosen` and `rejected`."""

    row: Text
    content_digest: Text
    task: Kind
    prediction_id: str | None = None
    label_id: str | None = None
    messages: tuple[Message, ...] = ()
    prompt: tuple[Message, ...] = ()
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    question: str | None = None
    """The last question as it was asked, where `messages` has it in a template."""
    label: str | None = None
    passages: tuple[Passage, ...] = ()
    citations: tuple[str, ...] = ()
    """Ids of the passages that the answer should cite."""
    answerable: bool = True
    features: tuple[Feature, ...] | None = None
    """As they stood in the prompt; None where its release had none."""
    slice: str | None = None
    session: str | None = None
    """What belongs together: intervals count it once."""
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """How many examples of the population this one stands for; counts in evaluations, not in training."""

    @property
    def asked(self) -> tuple[Message, ...]:
        """What the model is given."""
        return self.prompt or self.messages[:-1]

    @property
    def target(self) -> str:
        """What the model should say."""
        return (self.chosen or self.messages)[-1].content


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a dataset's manifest says at least."""

    format: Literal["hallmark-dataset/1"]
    name: Text
    version: Text
    digest: Text
    task: Kind
    splits: dict[SplitName, "Split"]
    labels: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    licence: str | None = None
    purpose: Literal["training", "evaluation"] = "training"
    erased: tuple[str, ...] = ()
    """Digests of rows whose content was erased after the version was made; its digest is still that of all."""


class Split(msgspec.Struct, frozen=True):
    """One file of rows."""

    rows: int
    sha256: str


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """A verified dataset."""

    folder: Path
    manifest: Manifest
    splits: dict[str, tuple[Row, ...]]

    def split(self, name: str) -> tuple[Row, ...]:
        """The rows of one split.

        Raises:
            BadDataset: there is none of that name, or it is empty.
        """
        rows = self.splits.get(name)
        if not rows:
            have = ", ".join(f"{split} ({len(found)} rows)" for split, found in self.splits.items())
            raise BadDataset(f"{self.folder}: the split {name!r} has no rows; it has {have or 'no splits'}")
        return rows


def canonical(value: Any) -> str:
    """JSON with its keys sorted and no spaces, as the service's lineage writes it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(text: str) -> str:
    """The digest of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def content_digest(row: dict[str, Any]) -> str:
    """The digest of a row's content: all of it but its digests and where it came from."""
    return sha256(canonical({name: value for name, value in row.items() if name not in ORIGIN}))


def row_digest(content: str, prediction_id: str | None, label_id: str | None) -> str:
    """The digest of a row: of its content's, and where it came from."""
    return sha256(canonical({"content_digest": content, "label_id": label_id, "prediction_id": prediction_id}))


def dataset_digest(row_digests: Iterable[str]) -> str:
    """The digest of a dataset: that of its rows' digests, in whatever order they come."""
    return sha256("".join(f"{digest}\n" for digest in sorted(row_digests)))


def read_dataset(folder: Path) -> Dataset:
    """Read an exported dataset and verify every digest in it.

    Raises:
        BadDataset: names the file and the line.
    """
    manifest = _manifest(folder)
    splits = {name: _split(folder, name, split, manifest) for name, split in sorted(manifest.splits.items())}
    digests = [row.row for rows in splits.values() for row in rows] + list(manifest.erased)
    if len(set(digests)) < len(digests):
        raise BadDataset(f"{folder}: {len(digests) - len(set(digests))} rows stand there twice; export it anew")
    found = dataset_digest(digests)
    if found != manifest.digest:
        raise BadDataset(f"{folder}: the manifest's digest is {manifest.digest}, its rows have {found}; export it anew")
    return Dataset(folder=folder, manifest=manifest, splits=splits)


def write_dataset(folder: Path, splits: dict[str, Sequence[dict[str, Any]]], **manifest: Any) -> str:
    """Write rows as an exported dataset, and return its digest; digests of the rows are computed here."""
    folder.mkdir(parents=True, exist_ok=True)
    digests, described = [], {}
    for name, rows in splits.items():
        complete = sorted((_complete(row) for row in rows), key=lambda row: str(row["row"]))
        data = "".join(f"{canonical(row)}\n" for row in complete).encode()
        (folder / f"{name}.jsonl").write_bytes(data)
        digests += [row["row"] for row in complete]
        described[name] = {"rows": len(complete), "sha256": hashlib.sha256(data).hexdigest()}
    digest = dataset_digest(digests)
    written = {"format": FORMAT, "digest": digest, "splits": described, **manifest}
    (folder / MANIFEST).write_text(canonical(written) + "\n", encoding="utf-8")
    return digest


def _complete(row: dict[str, Any]) -> dict[str, Any]:
    content = content_digest(row)
    origin = {"prediction_id": row.get("prediction_id"), "label_id": row.get("label_id")}
    return {**row, **origin, "content_digest": content, "row": row_digest(content, *origin.values())}


def _manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except OSError as error:
        raise BadDataset(f"{file}: {error.strerror}; name the folder that a dataset was exported to") from error
    except msgspec.DecodeError as error:
        raise BadDataset(f"{file}: {error}; export the dataset anew") from error


def _split(folder: Path, name: str, split: Split, manifest: Manifest) -> tuple[Row, ...]:
    file = folder / f"{name}.jsonl"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadDataset(
            f"{file}: {error.strerror}; training reads JSONL, so export the dataset in that form"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != split.sha256:
        raise BadDataset(f"{file}: its SHA-256 is {found}, the manifest says {split.sha256}; export the dataset anew")
    rows = tuple(_row(f"{file} line {n}", line, manifest) for n, line in enumerate(data.splitlines(), start=1))
    if len(rows) != split.rows:
        raise BadDataset(f"{file}: it has {len(rows)} rows, the manifest says {split.rows}; export the dataset anew")
    return rows


def _row(where: str, line: bytes, manifest: Manifest) -> Row:
    try:
        written = msgspec.json.decode(line, type=dict[str, Any])
        row = msgspec.convert(written, Row)
    except msgspec.DecodeError as error:
        raise BadDataset(f"{where}: {error}") from error
    content = content_digest(written)
    if content != row.content_digest:
        raise BadDataset(f"{where}: `content_digest` is {row.content_digest}, its content has {content}")
    digest = row_digest(content, row.prediction_id, row.label_id)
    if digest != row.row:
        raise BadDataset(f"{where}: `row` is {row.row}, its content and origin have {digest}")
    problem = _problem(row, manifest)
    if problem:
        raise BadDataset(f"{where}: {problem}")
    return row


def _problem(row: Row, manifest: Manifest) -> str | None:
    """What keeps a row from being an example of its task."""
    if row.task != manifest.task:
        return f"`task` is {row.task!r}, the dataset's is {manifest.task!r}"
    if row.task == "preference":
        if len(row.chosen) != 1 or len(row.rejected) != 1:
            return "`chosen` and `rejected` are one assistant's message each"
        if any(each.role != "assistant" for each in (*row.chosen, *row.rejected)):
            return "`chosen` and `rejected` are the assistant's"
    elif not row.messages or row.messages[-1].role != "assistant" or not row.target:
        return "`messages` ends with the assistant's answer, which is not empty"
    if not row.asked or row.asked[-1].role != "user":
        return "the last message before the answer is the user's"
    if any(each.role == "system" for each in row.asked[1:]):
        return "only the first message may be the system's"
    if row.task == "classify" and (row.label != row.target or row.label not in manifest.labels):
        return f"`label` is {row.label!r}; it is the assistant's answer, and one of the manifest's labels"
    return None
