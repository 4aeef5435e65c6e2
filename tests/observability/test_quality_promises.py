"""What docs/quality.md promises, on fewer runs than its tables: coverage, false rollbacks, false alarms, power."""

from pathlib import Path

import pytest

from tests.benchmarks import (
    quality_statistics,
    replayed_canaries,
    simulated_canaries,
    simulated_drift,
    simulated_labels,
)
from tests.benchmarks.tables import Table, write_into

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_questions = pytest.mark.skipif(
    not (DATA / "clinc150").is_dir(), reason="needs the intent sets beside the project, in ../shared/data"
)
PROMISES = {
    "intervals cover 93 % under a queue of the doubtful": lambda: simulated_labels.accuracy_table(500),
    "intervals of F1 and of macro averages cover 90 %": lambda: simulated_labels.classes_table(200),
    "guesses are covered where nothing changed": lambda: simulated_labels.label_free_table(60),
    "1 % of equal canaries at most, 200 sessions to 10 -> 20 %": lambda: simulated_canaries.rollback_table(400),
    "5 % of bad canaries are promoted at most": lambda: simulated_canaries.promotion_table(500),
    "1,000 equal canaries in all weathers": lambda: simulated_canaries.equal_table(1000),
    "outputs that repeat within sessions raise no alarm": lambda: simulated_drift.output_table(100),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("promise", PROMISES)
def test_the_promise_is_kept(promise):
    table = PROMISES[promise]()
    assert table.rows
    assert table.failures == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_a_thousand_equal_canaries_the_guards_roll_back_no_more_than_they_say_at_any_time():
    found = replayed_canaries.equal_canaries(1_000, 300)
    assert found["replays_that_differ"] == 0
    assert found["rolled_back"] <= 10, found


@pytest.mark.slow
def test_the_guards_do_roll_back_a_worse_canary_in_the_same_traffic():
    assert replayed_canaries.equal_canaries(20, 300, worse=0.3)["rolled_back"] >= 18


@pytest.fixture(scope="module")
def corpus() -> simulated_drift.Corpus:
    return simulated_drift.load_corpus(DATA, ["test"])


@needs_questions
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_repeated_questions_raise_no_alarm(corpus):
    assert simulated_drift.alarm_rates(corpus, simulated_drift.verdicts, 150, repeats=2)[simulated_drift.OURS] <= 0.02


@needs_questions
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_repeated_questions_would_raise_one_by_what_others_do(corpus):
    assert min(simulated_drift.alarm_rates(corpus, simulated_drift.slow_verdicts, 10, repeats=2).values()) >= 0.8


@needs_questions
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fifth_of_a_new_topic_is_found(corpus):
    assert simulated_drift.alarm_rates(corpus, simulated_drift.verdicts, 40, new_share=0.2)[simulated_drift.OURS] >= 0.8


def test_every_table_has_its_place_on_the_page(tmp_path):
    page = tmp_path / "quality.md"
    page.write_text(quality_statistics.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    for make in (
        lambda: simulated_labels.accuracy_table(1),
        lambda: simulated_labels.classes_table(1),
        lambda: simulated_canaries.rollback_table(1),
    ):
        table = make()
        write_into(page, [table])
        assert table.markdown() in page.read_text(encoding="utf-8")


def test_writing_a_table_changes_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- t -->old<!-- end t -->\nafter\n<!-- u -->other<!-- end u -->\n")
    write_into(page, [Table("t", "Conditions.", ["a", "b"], [["1", "2"]])])
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |\n\nConditions."
    assert page.read_text() == f"before\n<!-- t -->\n{table}\n<!-- end t -->\nafter\n<!-- u -->other<!-- end u -->\n"
