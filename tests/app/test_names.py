"""Names are found by a model where that is installed: through Presidio, and never in place of what has a form."""

import subprocess
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from app.feedback import Words
from app.predictions import Keeper, Prediction, uuid7
from app.privacy.names import CannotFindNames, NameFinder, open_names
from app.privacy.policies import Policy
from app.privacy_wiring import BadPrivacy, open_privacy
from app.settings import PrivacySettings


class Analyzer:
    """Knows a few names, as Presidio tells them."""

    known: ClassVar = {"Anna Maier": "PERSON", "Anna": "PERSON", "Basel": "LOCATION", "mail.example": "LOCATION"}

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, Any]] = []

    def analyze(self, text: str, language: str, entities: Any = None) -> list[Any]:
        self.asked.append((len(text), language, entities))
        return [
            SimpleNamespace(entity_type=kind, start=at, end=at + len(name))
            for name, kind in self.known.items()
            if kind in entities
            for at in range(len(text))
            if text.startswith(name, at)
        ]


def test_names_are_found_once_each_in_order():
    found = NameFinder(Analyzer())("In Basel, Anna Maier and Anna.")
    assert [(each.kind, each.start, each.end) for each in found] == [
        ("place", 3, 8),
        ("person", 10, 20),
        ("person", 25, 29),
    ]


def test_only_what_was_asked_for_is_looked_for():
    analyzer = Analyzer()
    assert [each.kind for each in NameFinder(analyzer, ("person",), language="de")("Anna in Basel")] == ["person"]
    assert analyzer.asked == [(13, "de", ["PERSON"])]


@pytest.mark.parametrize("gap", ["\n", " ", "x"])
def test_a_long_text_is_looked_through_in_pieces(gap):
    analyzer = Analyzer()
    text = gap.join(["y" * 97] * 300) + " says Anna"
    (found,) = NameFinder(analyzer)(text)
    assert text[found.start : found.end] == "Anna"
    assert max(length for length, _, _ in analyzer.asked) <= 10_000
    assert sum(length for length, _, _ in analyzer.asked) == len(text)


def test_what_has_a_form_comes_before_names():
    policy = Policy(names=NameFinder(Analyzer()))
    assert policy.redact("Anna of Basel: anna@mail.example") == "[person] of [place]: [email]"
    assert Policy().redact("Anna of Basel: anna@mail.example") == "Anna of Basel: [email]"


def test_names_are_taken_out_of_what_is_kept_and_citations_follow():
    keeper = Keeper(Policy(level="redacted", names=NameFinder(Analyzer())))
    answer = "Anna Maier of Basel has it [1]."
    citations = [{"n": 1, "answer_start": 14, "answer_end": 19}]
    request = msgspec.json.encode({"messages": [{"role": "user", "content": "Where is Anna?"}]})
    made = Prediction(id=uuid7(), tenant="acme", answer=answer, citations=citations, request=request, question="Anna?")
    kept = keeper.keep(made)
    assert (kept.answer, kept.question) == ("[person] of [place] has it [1].", "[person]?")
    assert kept.request == {"messages": [{"role": "user", "content": "Where is [person]?"}]}
    ((cited),) = kept.citations or []
    assert kept.answer[cited["answer_start"] : cited["answer_end"]] == "[place]"
    assert made.answer == answer


async def test_names_are_taken_out_of_words_about_answers():
    words = Words(Policy(level="redacted", names=NameFinder(Analyzer())))
    assert await words.kept("acme", {"comment": "Anna said so", "rating": 1.0}, ("comment",)) == {
        "comment": "[person] said so",
        "rating": 1.0,
    }


def test_settings_that_ask_for_names_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)  # As if it were not installed, which it may not be.
    settings = PrivacySettings(redact=("email", "person"))
    with ExitStack() as parts, pytest.raises(BadPrivacy, match=r"`privacy.redact`: .*hallmark\[presidio\]"):
        open_privacy(settings, tmp_path, parts)
    # Who writes nothing, as the command line, needs no model.
    assert open_privacy(settings, tmp_path).keeper.policy.kinds == ["email"]


def test_without_names_nothing_of_presidio_is_loaded():
    code = "import sys, app.main; assert not {'presidio_analyzer', 'spacy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the real Presidio: importing it imports torch, which takes seconds ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline that finds names by rules under the name of the part that finds them by a model."""
    spacy = pytest.importorskip("spacy")
    pytest.importorskip("presidio_analyzer")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("entity_ruler", name="ner")
    ruler.add_patterns(
        [
            {"label": "PERSON", "pattern": "Anna Maier"},
            {"label": "GPE", "pattern": "Basel"},
            {"label": "ORG", "pattern": "Roche"},
        ]
    )
    folder = tmp_path_factory.mktemp("model") / "en_rules"
    pipeline.to_disk(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_presidio_finds_what_its_model_finds(model):
    finder = open_names(model)
    text = "Anna Maier works at Roche in Basel."
    assert [(each.kind, text[each.start : each.end]) for each in finder(text)] == [
        ("person", "Anna Maier"),
        ("place", "Basel"),
    ]
    assert [each.kind for each in open_names(model, ("place",))(text)] == ["place"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_finds_no_names_or_is_not_there_is_refused(model, tmp_path):
    import spacy

    spacy.blank("en").to_disk(tmp_path / "empty")
    with pytest.raises(CannotFindNames, match="no part called `ner`"):
        open_names(str(tmp_path / "empty"))
    with pytest.raises(CannotFindNames, match="'no_such_model' is not installed"):
        open_names("no_such_model")
