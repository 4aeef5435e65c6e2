"""A team's own files: taken whole, or every bad line told with its field and its fix."""

import io
import json
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import date
from decimal import Decimal
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from app.datasets import Upload, open_datasets, read_recipe
from app.datasets.candidates import Candidates
from app.datasets.files import split_of_name
from app.datasets.imports import take_files
from app.errors import InvalidRequest, NotFound
from app.privacy.rings import SharedRing
from app.privacy.sealing import MasterKeys, new_key
from finetune.dataset import read_dataset
from tests.dataset_world import World, open_world
from tests.migrated import migrated


@pytest.fixture(scope="module")
def lite_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{migrated(tmp_path_factory.mktemp('imports') / 'hallmark.db')}"


@pytest.fixture
async def world(lite_url: str) -> AsyncIterator[World]:
    async with open_world(lite_url, empty=True) as world:
        yield world


def jsonl(name: str, *rows: object) -> Upload:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return Upload(name, io.BytesIO("\n".join(lines).encode()))


def text(name: str, content: str | bytes) -> Upload:
    return Upload(name, io.BytesIO(content if isinstance(content, bytes) else content.encode()))


def table(name: str, metadata: dict[bytes, bytes] | None = None, **columns: Any) -> Upload:
    return written(pa.table(columns).replace_schema_metadata(metadata or {}), name=name)


def written(made: pa.Table, *, name: str = "data.parquet", **how: Any) -> Upload:
    file = io.BytesIO()
    parquet.write_table(made, file, compression="zstd", **how)
    file.seek(0)
    return Upload(name, file)


ROWS = [{"text": "Where is my card, please?", "label": "card"}, {"text": "I want my money back.", "label": "refund"}]


@pytest.mark.parametrize(
    "upload",
    [
        jsonl("data.jsonl", *ROWS),
        text("data.csv", "text,label\nWhere is my card?,card\n\nI want my money back.,refund\n"),
        text("data.csv", "\ufefftext,category\r\n\"Where is my\ncard?\",card\r\nI want my money back.,refund\r\n"),
        table("data.parquet", text=[row["text"] for row in ROWS], label=[row["label"] for row in ROWS]),
        jsonl("data.jsonl", *({"messages": [{"role": "system", "content": "Sort."},
                                            {"role": "user", "content": row["text"]},
                                            {"role": "assistant", "content": row["label"]}]} for row in ROWS)),
    ],
    ids=["jsonl", "csv", "csv-by-a-spreadsheet", "parquet", "chat"],
)  # fmt: skip
async def test_each_kind_of_file_gives_the_same_rows(world, upload):
    build = await world.bring("data", [upload])
    assert build.state == "done", build.error
    rows = sorted(await world.rows(), key=lambda row: row["label"])
    assert [row["label"] for row in rows] == ["card", "refund"]
    assert rows[1]["question"] == "I want my money back."
    assert [row["messages"][-1]["content"] for row in rows] == ["card", "refund"]
    (noted,) = (await world.datasets.store.version("acme", "data", "1")).manifest["recipe"]["files"]
    assert (noted["name"], noted["rows"], len(noted["sha256"])) == (upload.name, 2, 64)


async def test_a_folder_as_hugging_face_lays_it_out_keeps_its_splits_and_class_names(world):
    features = {"info": {"features": {"label": {"names": ["card", "refund"], "_type": "ClassLabel"}}}}
    said = {b"huggingface": json.dumps(features).encode()}
    uploads = [
        table("data/train-00000-of-00002.parquet", said, text=["Where is my card?"], label=[0]),
        table("data/train-00001-of-00002.parquet", said, text=["I want my money back."], label=[1]),
        table("data/test-00000-of-00001.parquet", said, text=["When will it come at last?"], label=[0]),
    ]
    build = await world.bring("data", uploads)
    assert build.state == "done", build.error
    assert build.report["rows"] == {"train": {"card": 1, "refund": 1}, "heldout": {"card": 1}}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("train.jsonl", "train"),
        ("data/validation-00000-of-00001.parquet", "heldout"),
        ("test/part.csv", "heldout"),
        ("training_set.csv", "train"),
        ("tested-train.csv", None),
        ("everything.jsonl", None),
    ],
)
def test_a_files_name_says_its_side(name, side):
    assert split_of_name(name) == side


async def test_every_bad_line_is_told_and_nothing_is_taken(world):
    upload = jsonl("data.jsonl", ROWS[0], "{not json", "[1]", {"text": "No label here."}, {"label": "card"},
                   {"text": "  ", "label": "card"}, {"text": "Odd.", "label": "other"}, {"text": "Odd.", "label": 3},
                   {"text": "Odd.", "label": "card", "weight": -1}, {"text": "Odd.", "label": "card", "split": "some"},
                   {"messages": [{"role": "tool", "content": "x"}], "label": "card"})  # fmt: skip
    with pytest.raises(InvalidRequest) as refused:
        await world.bring("data", [upload], classes=["card", "refund"])
    first, *told = refused.value.message.split("\n")
    assert first == "10 rows cannot be taken, so none was:"
    expected = [
        (2, "it is no JSON"), (3, "no JSON object"), (4, "`label` is missing: name the column in `columns.label`"),
        (5, "`question` is missing"), (6, "`text`: must be a text"), (7, "`label`: it is none of"),
        (8, "`label`: is the number 3"), (9, "`weight`: must be a number above 0"), (10, "`split`: must be `train`"),
        (11, "`messages`: turns are plain text"),
    ]  # fmt: skip
    for line, (number, what) in zip(told, expected, strict=True):
        assert line.startswith(f"data.jsonl line {number}: "), line
        assert what in line
    with pytest.raises(NotFound):
        await world.rows()
    assert await world.datasets.builds.find("acme", "data") == []


async def test_not_all_of_very_many_bad_lines_are_told(world):
    with pytest.raises(InvalidRequest) as refused:
        await world.bring("data", [jsonl("data.jsonl", *[{"text": "x"}] * 50)])
    assert refused.value.message.count("\n") == 21
    assert refused.value.message.endswith("and 30 more")
    with pytest.raises(InvalidRequest, match="1,000 rows or more"):
        await world.bring("data", [jsonl("data.jsonl", *[{"text": "x"}] * 2_000)])


@pytest.mark.parametrize(
    ("upload", "what"),
    [
        (text("a.csv", "text,text\nx,y\n"), "line 1: the first line must name the columns"),
        (text("a.csv", "text,label\nx,y,z\n"), "line 2: it has 3 fields where the first line names 2"),
        (text("a.csv", 'text,label\n"x,y\n'), "it is no CSV"),
        (text("a.csv", b"text,label\n\xff\xfe,y\n"), "line 2: it is not UTF-8"),
        (text("a.jsonl", b'{"text": "\xff"}'), "line 1: it is no JSON"),
        (text("a.jsonl", '{"text": "\\ud800", "label": "x"}'), "line 1: it is no JSON"),
        (text("a.jsonl", "[" * 100_000), "line 1: it is no JSON"),
        (text("a.json", '[\n{"text": "x"}]'), "line 1: the file is one JSON list"),
        (text("a.parquet", b"PAR1 and nothing"), "line 1: it is no Parquet"),
        (text("a.xlsx", b"x"), "'a.xlsx' is of no kind that is read"),
    ],
)
async def test_a_file_that_cannot_be_read_is_told_by_name(world, upload, what):
    with pytest.raises(InvalidRequest) as refused:
        await world.bring("data", [upload])
    assert what in refused.value.message
    assert refused.value.param == "files"


LONG = pa.array(["x" * 5_000_000])


@pytest.mark.parametrize(
    "columns",
    [
        {"text": pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), LONG), "label": ["card"] * 100},
        {
            "text": ["Where is my card?"],
            "passages": pa.ListArray.from_arrays(
                [0, 100], pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), LONG)
            ),
        },
    ],
    ids=["in-many-rows", "in-one-list"],
)
async def test_a_long_text_that_a_small_parquet_file_repeats_is_refused_in_little_memory(world, columns):
    upload = written(pa.table(columns), store_schema=False)
    assert upload.file.seek(0, io.SEEK_END) < 10_000
    upload.file.seek(0)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=r"data.parquet line 1: the row is longer than 4,000,000 bytes"):
            await world.bring("data", [upload])
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


async def test_a_parquet_file_that_unpacks_to_very_much_is_told_what_to_write_in_its_place(world):
    rows = pa.table({"text": ["Where is my card, please?", "Where is my money?"], "label": ["card", "money"]})
    shared = written(rows, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    with pytest.raises(InvalidRequest, match="line 1: `text`: write it in another encoding than DELTA_BYTE_ARRAY"):
        await world.bring("data", [shared])
    many = pa.ListArray.from_arrays([0, 34_000_000], pa.array(np.zeros(34_000_000, dtype=bool)))
    with pytest.raises(InvalidRequest, match="line 1: a row group takes more than 256 MiB; write it in smaller"):
        await world.bring("data", [written(pa.table({"text": many}))])


async def test_rows_of_parquet_come_whole_in_whatever_batches_they_are_made(world):
    texts = [f"Question {n}: " + f"{n} " * 100_000 for n in range(30)]
    passages = [[{"id": f"p{n}", "text": f"It is {n}."}] if n % 3 else [] for n in range(30)]
    upload = table("data.parquet", text=texts, answer=[f"It is {n}." for n in range(30)], passages=passages)
    build = await world.bring("data", [upload], task="answer", dedup={"near": False})
    assert build.state == "done", build.error
    rows = {row["question"]: row for row in await world.rows()}
    assert sorted(rows) == sorted(texts)
    assert [rows[text]["messages"][-1]["content"] for text in texts] == [f"It is {n}." for n in range(30)]
    assert [[each["text"] for each in rows[text]["passages"]] for text in texts] == [
        [each["text"] for each in some] for some in passages
    ]


async def test_a_field_of_csv_may_be_as_long_as_a_text(world):
    upload = text("data.csv", "text,label\n" + "word " * 40_000 + ",card\n")
    build = await world.bring("data", [upload])
    assert build.state == "done", build.error


EXTRACT = {"task": "extract", "schema": {"type": "object"}}
QUESTION = {"question": "What is the notice period?", "answer": "Four weeks."}


@pytest.mark.parametrize(
    ("upload", "recipe", "what"),
    [
        (jsonl("a.jsonl", {**ROWS[0], "split": ["train"]}), {}, "`split`: must be `train` or `heldout`"),
        (jsonl("a.jsonl", {**ROWS[0], "weight": 10**400}), {}, "`weight`: must be a number above 0"),
        (table("a.parquet", text=["?"], answer=[{"on": date(2026, 1, 2)}]), EXTRACT, "`answer`: Object of type date"),
        (table("a.parquet", text=["?"], answer=[{"n": Decimal("1.5")}]), EXTRACT, "`answer`: Object of type Decimal"),
        (
            table(
                "a.parquet",
                **{name: [value] for name, value in QUESTION.items()},
                passages=[[{"id": "p", "text": "It is.", "document_version": date(2026, 1, 1)}]],
            ),
            {"task": "answer"},
            "`passages`: each is an object with `id` and `text`",
        ),
        (
            jsonl("a.jsonl", {**QUESTION, "passages": [{"id": "p", "text": "It is.", "document_id": 17}]}),
            {"task": "answer"},
            "`passages`: each is an object with `id` and `text`",
        ),
        (
            jsonl("a.jsonl", {**QUESTION, "passages": [{"id": "", "text": "It is."}]}),
            {"task": "answer"},
            "`passages`: each is an object with `id` and `text`",
        ),
        (
            jsonl("a.jsonl", {"messages": [{"role": "user", "content": "What is it?"},
                                           {"role": "assistant", "content": ""}]}),
            {"task": "answer"},
            "`messages`: the assistant's last turn is empty",
        ),
    ],
    ids=["split", "weight", "date", "decimal", "version", "document", "passage", "silence"],
)  # fmt: skip
async def test_a_value_that_no_row_can_hold_is_told_by_its_line_and_field(world, upload, recipe, what):
    with pytest.raises(InvalidRequest) as refused:
        await world.bring("data", [upload], **recipe)
    assert f"line 1: {what}" in refused.value.message


GOOD = {
    "classify": ROWS[0],
    "answer": {
        "text": "What is it?",
        "answer": "That.",
        "passages": [{"id": "p", "text": "It is."}],
        "citations": ["p"],
        "answerable": True,
    },
    "extract": {"text": "How many are there?", "answer": {"n": 2}},
    "preference": {"text": "Is it there?", "chosen": "Yes.", "rejected": "No."},
}
FIELDS = ("text", "messages", "system", "label", "answer", "chosen", "rejected", "passages", "citations", "answerable",
          "session", "user", "slice", "weight", "split")  # fmt: skip
ODD: tuple[Any, ...] = (
    None, "", " ", "\0", "a\0b", "word", 0, 1, -1, 1e-320, 10**400, True, [], {}, [[]], [{}], ["p"], {"n": None}, "[]",
    *([{"id": one, "text": two}] for one, two in product(("", "p", 7), ("", "t", None))),
    *([{"id": "p", "text": "t", name: 7}] for name in ("document_id", "document_version", "title", "heading_path")),
    *([{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
      for said, answer in product(("", "What?", None, [{"type": "text", "text": "What?"}]), ("", " ", "That.", None))),
    [{"role": "system", "content": ""}, {"role": "user", "content": "Why?"}],
    [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who?"}],
)  # fmt: skip


@pytest.mark.parametrize("task", list(GOOD))
async def test_what_is_imported_can_be_trained_on(world, task, tmp_path):
    recipe = {"task": task, "dedup": {"near": False}} | ({"schema": {"type": "object"}} if task == "extract" else {})
    taken = []
    for number, (field, value) in enumerate(product(FIELDS, ODD)):
        row = {**GOOD[task], "text": f"{number}. {GOOD[task]['text']}", field: value}
        found = Candidates()
        try:
            take_files("acme", "training", read_recipe(recipe), [jsonl("a.jsonl", row)], found)
        except InvalidRequest:
            continue
        finally:
            found.close()
        taken.append(row)
    assert len(taken) > 100
    build = await world.bring("data", [jsonl("a.jsonl", *taken)], **recipe)
    assert build.state == "done", build.error
    for name in ("manifest.json", "train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_bytes(await world.file("data", name))
    read = read_dataset(tmp_path)
    assert sum(map(len, read.splits.values())) > 100


async def test_columns_say_what_fields_are_called(world):
    row = {"utterance": "Where is it now, please?", "topic": "card", "text": "not this"}
    build = await world.bring("data", [jsonl("a.jsonl", row)], columns={"question": "utterance", "label": "topic"})
    assert build.state == "done", build.error
    assert [(each["question"], each["label"]) for each in await world.rows()] == [("Where is it now, please?", "card")]
    with pytest.raises(InvalidRequest) as refused:
        await world.bring("data", [jsonl("a.jsonl", row)], columns={"qeustion": "utterance"})
    assert refused.value.param == "columns"


async def test_each_task_reads_its_fields(world):
    passages = [{"id": "d/1", "text": "It is blue."}, {"id": "d/2", "text": "It is old."}]
    answer = {"question": "What colour is it?", "answer": "Blue.", "passages": json.dumps(passages),
              "citations": ["d/1"], "answerable": "true"}  # fmt: skip
    assert (await world.bring("answers", [jsonl("a.jsonl", answer)], task="answer")).state == "done"
    (row,) = await world.rows("answers")
    assert (row["passages"][1]["text"], row["citations"], row["answerable"]) == ("It is old.", ["d/1"], True)
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    data = {"text": "There are two of them.", "output": {"n": 2}}
    build = await world.bring("data", [jsonl("a.jsonl", data)], task="extract", schema=schema)
    assert build.state == "done", build.error
    assert (await world.rows())[0]["messages"][-1]["content"] == '{"n":2}'
    with pytest.raises(InvalidRequest, match="does not fit the recipe's `schema`"):
        await world.bring("data", [jsonl("a.jsonl", {**data, "output": {}})], task="extract", schema=schema)
    pair = {"prompt": [{"role": "user", "content": "Is it there?"}], "chosen": "Yes.",
            "rejected": [{"role": "assistant", "content": "No."}]}  # fmt: skip
    assert (await world.bring("pairs", [jsonl("a.jsonl", pair)], task="preference")).state == "done"
    (row,) = await world.rows("pairs")
    assert (row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]) == (
        pair["prompt"],
        "Yes.",
        "No.",
    )
    with pytest.raises(InvalidRequest, match="same as `chosen`"):
        await world.bring("pairs", [jsonl("a.jsonl", {**pair, "chosen": "No."})], task="preference")


async def test_a_template_asks_as_a_release_does(world):
    template = "Sort into\n{labels}\n\nText: {question}"
    await world.bring("data", [jsonl("a.jsonl", ROWS[0])], classes=["card", "refund"], template=template)
    (row,) = await world.rows()
    assert row["messages"][0]["content"] == "Sort into\n- card\n- refund\n\nText: Where is my card, please?"
    assert row["question"] == ROWS[0]["text"]


async def test_an_export_imports_again_as_the_same_examples(world):
    await world.bring("data", [jsonl("train.jsonl", *ROWS)])
    exported = await world.file("data", "train.jsonl")
    build = await world.bring("copy", [Upload("train.jsonl", io.BytesIO(exported))])
    assert build.state == "done", build.error
    same = [sorted((row["question"], row["label"]) for row in await world.rows(name)) for name in ("data", "copy")]
    assert same[0] == same[1]


async def test_the_same_files_again_in_whatever_order_change_nothing(world):
    first = await world.bring("data", [jsonl("b.jsonl", ROWS[0]), jsonl("a.jsonl", ROWS[1], ROWS[1])])
    assert next(step for step in first.report["steps"] if step["name"] == "same")["dropped"] == {"same_row": 1}
    again = await world.bring("data", [jsonl("a.jsonl", ROWS[1]), jsonl("b.jsonl", ROWS[0])])
    assert (again.state, again.step, again.version) == ("done", "unchanged", 1)


@pytest.mark.parametrize(
    "more", [[], [{"text": "How do I change it?", "label": "pin"}]], ids=["unchanged", "a-new-version"]
)
async def test_erasing_a_user_reaches_rows_that_a_later_import_says_are_theirs(world, more):
    row = {**ROWS[0], "session": "c1"}
    await world.bring("data", [jsonl("train.jsonl", row)])
    await world.bring("other", [jsonl("train.jsonl", {**row, "user": "ben"})])
    await world.bring("data", [jsonl("train.jsonl", {**row, "user": "ann"}, *more)])
    first = await world.bring("new", [jsonl("train.jsonl", {**ROWS[1], "session": "c2"})])
    again = await world.bring("new", [jsonl("train.jsonl", {**ROWS[1], "session": "c2", "user": "ann"}, *more)])
    assert (first.version, again.version) == (1, 2 if more else 1)
    assert len((await world.datasets.changes.erase("acme", subjects=["ann"])).rows) == 1
    assert [each["question"] for each in await world.rows("data", "1")] == [row["text"]]  # Ben was named first.
    assert await world.rows("new", "1") == []
    assert len((await world.datasets.changes.erase("acme", subjects=["ben"])).rows) == 1


async def test_a_row_of_which_it_becomes_known_whose_it_is_is_sealed_by_their_key(world):
    ring = SharedRing(world.database, MasterKeys.parse(new_key()))
    async with open_datasets(world.database, world.history, ring=ring, rest=0.0) as parts:
        keyed = replace(world, datasets=parts)
        await keyed.bring("data", [jsonl("a.jsonl", {**ROWS[0], "session": "c1"})])
        await keyed.bring("data", [jsonl("a.jsonl", {**ROWS[0], "session": "c1", "user": "ann"})])
        assert [row["question"] for row in await keyed.rows()] == [ROWS[0]["text"]]
        assert await world.rows() == []  # It has no keys.
        await ring.destroy("acme", ["ann"])
        assert await keyed.rows() == []


async def test_an_evaluation_set_holds_out_all_its_rows(world):
    await world.bring("gold", [jsonl("train.jsonl", *ROWS)], purpose="evaluation")
    assert {row["split"] for row in await world.rows("gold")} == {"heldout"}
