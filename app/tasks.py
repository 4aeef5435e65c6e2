"""What a release asks of its model: an answer, one of its classes, or data in the form of a JSON schema.

The main rule: what an engine was told to write is looked at all the same. An answer to a task is exactly one of the
labels, or JSON that fits the schema, or it is a `Misfit`. Pure: no engine is asked.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

import jsonschema_rs
import msgspec

MAX_LABELS = 1_000

ClassLabel = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]

_EDGES = re.compile(r"^[\W_]+|(?<![\W_])[\W_]++$")
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class BadTask(ValueError):
    """A task that no answer could fulfil."""


class Misfit(ValueError):
    """An answer that is not what the task asks for; says why in words that quote none of it."""


class Task(msgspec.Struct, frozen=True, dict=True):
    """What is asked of the model: an answer, one of the labels, or data in the form of a JSON schema.

    Raises:
        BadTask: the labels or the schema do not belong to the kind of task, or are missing, or wrong.
    """

    kind: Literal["answer", "classify", "extract"] = "answer"
    labels: Annotated[tuple[ClassLabel, ...], msgspec.Meta(max_length=MAX_LABELS)] = ()
    schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.kind == "classify") != bool(self.labels):
            raise BadTask("`labels` belong to a task of the kind `classify`, which needs them: list two or more.")
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise BadTask("`labels` are two or more, each once.")
        for label in self.labels:
            if label != label.strip() or not label.isprintable():
                raise BadTask(f"`labels`: {label!r} is not one line without spaces at its ends.")
        if (self.kind == "extract") != (self.schema is not None):
            raise BadTask("`schema` belongs to a task of the kind `extract`, which needs it: give a JSON schema.")
        if self.schema is not None:
            if self.schema.get("type") != "object":
                raise BadTask("`schema` is a JSON schema of `type` `object`.")
            try:
                _ = self._validator
            except jsonschema_rs.ValidationError as error:
                raise BadTask(f"`schema`: it is no JSON schema{_told(error)}.") from error
            except ValueError as error:
                raise BadTask("`schema` is nested too deeply: put parts of it into `$defs`.") from error

    @cached_property
    def is_answer(self) -> bool:
        """Whether a person reads the answer, and not a program."""
        return self.kind == "answer"

    def read(self, text: str) -> str:
        """Give what the model wrote as it goes to the caller: the label itself, the JSON alone.

        Raises:
            Misfit: it is not what the task asks for.
        """
        if self.kind == "classify":
            return self._label(text)
        return self._data(text) if self.kind == "extract" else text

    def _label(self, text: str) -> str:
        """The label that a text is, or begins with, whatever the case and whatever marks stand around it."""
        said = text.strip()
        if said in self.labels:
            return said
        folded, bare = _bare(said), {label: _bare(label) for label in self.labels}
        begins = [label for label, words in bare.items() if words and _mentions(folded, words) == 0]
        if not begins:
            raise Misfit(f"It is none of the release's {len(self.labels)} labels.")
        longest = max(bare[label] for label in begins)  # Each begins with the shorter ones.
        rest = folded[len(longest) :]
        others = [label for label, words in bare.items() if words and _mentions(rest, words) is not None]
        found = [label for label in begins if bare[label] == longest]
        if others or len(found) > 1:
            raise Misfit("It names more than one of the release's labels.")
        return found[0]

    def _data(self, text: str) -> str:
        """The JSON object that a text is, or that stands in it, if it fits."""
        for candidate in _objects(text):
            try:
                data = _decode(candidate)
            except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
                continue
            try:
                problem = next(iter(self._validator.iter_errors(data)), None)
            except ValueError as error:  # It follows an answer 254 levels down.
                raise Misfit("It is nested too deeply to be held against the release's schema.") from error
            if problem is None:
                return candidate
            raise Misfit(f"It does not fit the release's schema{_told(problem)}.")
        raise Misfit("It is no JSON object.")

    @cached_property
    def _validator(self) -> jsonschema_rs.Validator:
        """Checks data in microseconds; patterns run in linear time, and no reference leaves the schema."""
        return jsonschema_rs.validator_for(
            self.schema or {}, offline=True, pattern_options=jsonschema_rs.RegexOptions(), mask="the value"
        )


def _told(problem: jsonschema_rs.ValidationError) -> str:
    """Where something does not fit, and why."""
    at = ".".join(map(str, problem.instance_path))
    return f" at `{at}`: {problem.message}" if at else f": {problem.message}"


def _bare(text: str) -> str:
    """A text without its case and the marks around it."""
    return _EDGES.sub("", text.casefold())


def _mentions(text: str, words: str) -> int | None:
    """Where words stand in a text by themselves."""
    found = re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text)
    return found.start() if found else None


def _objects(text: str) -> Iterator[str]:
    """What of a text may be the JSON object: all of it, or what its outer braces hold, as within a fence."""
    yield text.strip()
    start, end = text.find("{"), text.rfind("}")
    if 0 <= start < end:
        yield text[start : end + 1]
