"""Names of people and places, which have no form of their own: found by a model, through Presidio, by who installs it.

The main rule: it runs where it keeps nobody waiting but what is written after, for it takes a thousand times what the
patterns of `redaction` take; and it guesses, as models do. What has a form is looked for by its form alone.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

from app.privacy.redaction import Finding

Name = Literal["person", "place"]

NAMES: tuple[Name, ...] = get_args(Name)

_ENTITIES = {"PERSON": "person", "LOCATION": "place"}
"""What Presidio calls them."""

_PIECE_CHARACTERS = 10_000
"""Looked through at once: a model's memory grows with the text."""


class CannotFindNames(ValueError):
    """What is needed for it is not installed."""


class Analyzer(Protocol):
    """Presidio's `AnalyzerEngine`, as far as it is used."""

    def analyze(self, text: str, language: str, entities: list[str] | None = None) -> Sequence[Any]:
        """Find entities: each with `entity_type`, `start` and `end`."""
        ...


class NameFinder:
    """Finds names by an analyzer; from any thread, one call at a time.

    Args:
        analyzer: finds them.
        names: what to look for.
        language: of the texts, as the analyzer calls it.
    """

    def __init__(self, analyzer: Analyzer, names: Sequence[Name] = NAMES, *, language: str = "en") -> None:
        self._analyzer = analyzer
        self._entities = [entity for entity, name in _ENTITIES.items() if name in names]
        self._language = language
        self._lock = threading.Lock()

    def __call__(self, text: str) -> list[Finding]:
        """Find names, in the order of the text; findings do not overlap."""
        found: list[Finding] = []
        for at, piece in _pieces(text):
            with self._lock:
                seen = self._analyzer.analyze(piece, self._language, entities=self._entities)
            for each in sorted(seen, key=lambda each: (each.start, -each.end)):
                if not found or found[-1].end <= at + each.start:
                    found.append(Finding(_ENTITIES[each.entity_type], at + each.start, at + each.end))
        return found


def open_names(model: str, names: Sequence[Name] = NAMES) -> NameFinder:
    """Load a spaCy model, by the name of its package or by its folder, into Presidio's analyzer.

    Nothing is downloaded.

    Raises:
        CannotFindNames: says what to install.
    """
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer
    except ImportError as error:
        raise CannotFindNames("names need Presidio: pip install 'hallmark[presidio]'") from error
    try:
        # Of its parts only those that find names: the others take most of the time.
        loaded = spacy.load(model, exclude=["tagger", "parser", "lemmatizer", "attribute_ruler", "morphologizer"])
    except (OSError, ValueError) as error:
        raise CannotFindNames(f"the model {model!r} is not installed, or does not fit this spaCy: {error}") from error
    if "ner" not in loaded.pipe_names:
        raise CannotFindNames(f"the model {model!r} finds no names: it has no part called `ner`")
    engine = SpacyNlpEngine()
    engine.nlp = {loaded.lang: loaded}
    recognizer = SpacyRecognizer(supported_language=loaded.lang, supported_entities=[*_ENTITIES])
    registry = RecognizerRegistry(recognizers=[recognizer], supported_languages=[loaded.lang])
    analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[loaded.lang])
    return NameFinder(analyzer, names, language=loaded.lang)


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Cut a text where a line ends, else where a word does, and give each piece with where it begins."""
    at = 0
    while len(text) - at > _PIECE_CHARACTERS:
        first = at + _PIECE_CHARACTERS // 2
        end = 1 + text.rfind("\n", first, at + _PIECE_CHARACTERS)
        end = end or 1 + text.rfind(" ", first, at + _PIECE_CHARACTERS) or at + _PIECE_CHARACTERS
        yield at, text[at:end]
        at = end
    yield at, text[at:]
