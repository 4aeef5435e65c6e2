"""What a question asks for, and which texts can hold it."""

import pytest

from retrieval.asking import Kind, asked
from retrieval.terms import terms


def suits(question: str, text: str) -> float:
    return asked(question).suits(text, terms(text))


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How many passages are searched?", "count"),
        ("Which port does it listen on?", "count"),
        ("What is the price of the ticket?", "count"),
        ("What percentage of the requests may fail?", "share"),
        ("To which e-mail address do I write?", "address"),
        ("How long are predictions kept?", "extent"),
        ("When did the tower open?", "time"),
        ("In which year was it built?", "time"),
        ("Who signs the contract?", "person"),
        ("Why was the release withdrawn?", "reason"),
        ("Which header holds the id?", "value"),
        ("How do I revoke a key?", "value"),
        ("What happens when the disk is full?", None),
        ("Is a release immutable?", None),
        ("Quel est le prix ?", None),
    ],
)
def test_the_kind_asked_for_is_read_from_the_question(question: str, kind: Kind | None) -> None:
    assert asked(question).kind == kind


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("How many passages are searched?", "Eight of them are searched.", "Passages are searched by meaning."),
        ("How many rows fit into 16 pages?", "About 5,800 rows.", "The 16 pages fit."),
        ("How many people came?", "About 300 people came.", "The party was on 3 May 2026."),
        ("How many users may there be?", "The number of users is unlimited.", "Users come from the directory."),
        ("Which version comes first?", "Version 3 comes first.", "The model all-MiniLM-L6-v2 comes first."),
        ("How many bytes has a digest?", "A digest has 32 bytes.", "The digest is made by SHA-256."),
        ("How many tenants may there be?", "There may be 50 tenants.", "Another tenant's id gets the status 404."),
        ("How many tenants may there be?", "There may be 50 tenants.", "A JSON answer takes 150 microseconds."),
        ("How many releases are kept?", "The last 20 releases are kept.", "It is the release `support@3`."),
        ("How many sources are cited?", "Three sources are cited.", "The sources are cited so [2]."),
        ("On which port does it listen?", "It listens on port 8080.", "It listens to 32 callers at once."),
        ("Which version is required?", "Version 1.16 is required.", "It is required at 200 callers."),
        ("What share of them failed?", "One third of the 90 failed.", "Of the 90 a number failed."),
        ("What percentage failed?", "It was 5 %.", "The limit is 300 seconds."),
        ("What is the e-mail address?", "Write to help@example.org.", "Send an e-mail address with it."),
        ("How soon does it stop?", "It stops within a second.", "It stops as it should."),
        ("How long are predictions kept?", "Predictions are kept for 30 days.", "Predictions are kept."),
        ("How long is the metadata kept?", "It stays a full calendar year.", "It stays in the database."),
        ("When did the tower open?", "The tower opened in 1889.", "The tower opened with a speech."),
        ("When is the meeting?", "The meeting is on Mondays.", "The meeting is long."),
        ("Who signs?", "A contract is signed by Ada Lovelace.", "A contract is signed in ink."),
        ("Why was it withdrawn?", "It was withdrawn because it was wrong.", "It was withdrawn in May."),
        ("Which header holds the id?", "The id is in `x-request-id`.", "The id is in the header."),
    ],
)
def test_a_text_with_what_is_asked_for_suits_better(question: str, right: str, wrong: str) -> None:
    assert suits(question, right) > suits(question, wrong)


def test_an_amount_is_never_answered_without_one() -> None:
    assert suits("How many passages are searched?", "They are searched by meaning.") == -1.0
    assert suits("How long is it kept?", "It is kept in the database.") == -1.0
    assert suits("What share of them failed?", "Of the 90 a number failed.") == -1.0
    assert suits("What is the e-mail address?", "The e-mail address is in the contract.") == -1.0


def test_a_number_that_tells_which_is_no_amount_unless_it_is_asked_for() -> None:
    assert suits("How many releases are kept?", "It is the release `support@3`, with status 404 [2].") == -1.0
    assert suits("Which status does it send?", "It sends the status 404.") == 0.5
    assert suits("Which port does it use?", "It uses port 8080.") == 1.0


def test_an_amount_of_something_else_suits_less() -> None:
    assert suits("How many predictions are on a page?", "A page has 50 entries.") == 0.5
    assert suits("How many predictions are on a page?", "A page has 50 predictions.") == 1.0


def test_a_question_of_no_known_kind_is_suited_by_every_text() -> None:
    assert suits("What happens then?", "Nothing.") == suits("What happens then?", "It stops at 3.") == 0.0
