"""The example documents are what their script writes, and the regression set over them is sound.

`examples/questions.jsonl` holds one question a line:

    {"id", "question", "answerable", "answers", "evidence": [{"document", "quote"}], "split"}

`answers` are alternatives: regular expressions, of which one must be found in a right answer once it is lower-cased
and its white space collapsed. `evidence` names every place that holds the answer; `split` is `tune` or `held_out`,
and what is held out is never looked at while tuning.
"""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from docx import Document
from pypdf import PdfReader
from selectolax.lexbor import LexborHTMLParser

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS: list[dict[str, Any]] = [
    json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()
]
ANSWERABLE = [question for question in QUESTIONS if question["answerable"]]
ABSENT = [question for question in QUESTIONS if not question["answerable"]]


def normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).lower()


def source_text(document: str) -> str:
    """Read a document without the service's own parsers, so that their faults cannot hide here."""
    path = EXAMPLES / document
    if path.suffix == ".pdf":
        return "\n".join(page.extract_text() for page in PdfReader(path).pages)
    if path.suffix == ".docx":
        read = Document(str(path))
        cells = (cell.text for table in read.tables for row in table.rows for cell in row.cells)
        return "\n".join([*(paragraph.text for paragraph in read.paragraphs), *cells])
    if path.suffix == ".html":
        main = LexborHTMLParser(path.read_text(encoding="utf-8")).css_first("main")
        assert main is not None
        return main.text()
    return path.read_text(encoding="utf-8")


def test_handbook_has_at_least_25_pages_that_each_start_with_their_subject() -> None:
    pages = sorted((EXAMPLES / "handbook").glob("*.md"))
    assert len(pages) >= 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# "), page.name
        assert text.count("\n# ") == 0 or "```" in text, f"{page.name} has two titles"


def test_regression_set_is_large_enough_and_a_third_of_each_kind_is_held_out() -> None:
    assert len(ANSWERABLE) >= 44
    assert len(ABSENT) >= 22
    for kind in (ANSWERABLE, ABSENT):
        held_out = [question for question in kind if question["split"] == "held_out"]
        assert len(kind) / 3 <= len(held_out) <= len(kind) / 2
    assert {question["split"] for question in QUESTIONS} == {"tune", "held_out"}
    assert len({question["id"] for question in QUESTIONS}) == len(QUESTIONS)
    assert len({normalised(question["question"]) for question in QUESTIONS}) == len(QUESTIONS)


def test_answers_come_from_all_four_formats() -> None:
    suffixes = {Path(item["document"]).suffix for question in ANSWERABLE for item in question["evidence"]}
    assert suffixes == {".md", ".pdf", ".docx", ".html"}


@pytest.mark.parametrize("question", ANSWERABLE, ids=lambda question: question["id"])
def test_evidence_stands_in_its_document_and_holds_the_answer(question: dict[str, Any]) -> None:
    assert question["answers"]
    assert question["evidence"]
    for item in question["evidence"]:
        source = source_text(item["document"])
        if item["document"].endswith(".md"):
            assert item["quote"] in source
        assert normalised(item["quote"]) in normalised(source)
        assert any(re.search(answer, normalised(item["quote"])) for answer in question["answers"])


def test_absent_questions_claim_no_answer() -> None:
    assert not [question["id"] for question in ABSENT if question["answers"] or question["evidence"]]


def test_script_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    script = runpy.run_path(str(EXAMPLES / "make_examples.py"))
    script["write_pdf"](tmp_path / "incident-review.pdf")
    script["write_docx"](tmp_path / "service-agreement.docx")
    for name in ("incident-review.pdf", "service-agreement.docx"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), (
            f"run examples/make_examples.py: {name}"
        )
    assert script["RELEASE_NOTES"] == (EXAMPLES / "release-notes.html").read_text(encoding="utf-8")


def test_pdf_has_three_pages_and_html_holds_junk_that_a_parser_must_drop() -> None:
    assert len(PdfReader(EXAMPLES / "incident-review.pdf").pages) == 3
    html = (EXAMPLES / "release-notes.html").read_text(encoding="utf-8")
    for junk in ("<script>", "<nav>", "<footer>", "display:none", "<aside hidden>"):
        assert junk in html
