"""A release's digest is what it is made of, and its number belongs to the digest for ever."""

import hashlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest, ModelNotFound
from app.releases import (
    BadRelease,
    FeatureUse,
    Lineage,
    Prompt,
    Release,
    Releases,
    RetrievalPlan,
    Task,
    differences,
    parse_label,
    read_release,
    stored_release,
)
from retrieval.citations import CheckPolicy

RELEASE = Release("hallmark", 1, "tgi", Prompt("answer-1", "{sources} {question}"), base_model="org/base")

CHANGES = {
    "name": {"name": "other"},
    "engine": {"engine": "vllm"},
    "prompt version": {"prompt": Prompt("answer-2", "{sources} {question}")},
    "prompt text": {"prompt": Prompt("answer-1", "{question} {sources}")},
    "retrieval": {"retrieval": RetrievalPlan(top_k=6)},
    "thresholds": {"retrieval": RetrievalPlan(policy=CheckPolicy(supported_share=0.9))},
    "served model": {"served_model": "tuned"},
    "base model": {"base_model": "org/other"},
    "base revision": {"base_revision": "abc"},
    "adapter": {"adapter": "support"},
    "adapter digest": {"adapter_digest": "0" * 64},
    "task": {"task": Task("classify", ("yes", "no"))},
    "labels": {"task": Task("classify", ("no", "yes"))},
    "schema": {"task": Task("extract", (), {"type": "object"})},
    "fallback": {"fallback": "extractive"},
    "training run": {"lineage": Lineage(training_run="run-1")},
    "dataset": {"lineage": Lineage(dataset_digest="1" * 64)},
    "max tokens": {"max_tokens": 255},
    "temperature": {"temperature": 0.1},
    "notes": {"notes": "first"},
    "features": {
        "prompt": Prompt("answer-1", "{sources} {question} {features}"),
        "features": (FeatureUse("customer", "customer", ("plan",)),),
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_makes_another_digest(change):
    assert msgspec.structs.replace(RELEASE, **change).digest != RELEASE.digest


def test_each_thing_that_a_release_says_of_its_features_makes_another_digest():
    uses = [
        FeatureUse("customer", "customer", ("plan",)),
        FeatureUse("customer", "customer", ("plan", "seats")),
        FeatureUse("customer", "customer", ("seats", "plan")),
        FeatureUse("customer", "customer", ("plan",), key="user"),
        FeatureUse("customer", "customer", ("plan",), required=True),
        FeatureUse("customer", "customer", ("plan",), defaults={"plan": "free"}),
        FeatureUse("customer", "user", ("plan",)),
        FeatureUse("client", "customer", ("plan",)),
    ]
    prompt = Prompt("p", "{sources} {question} {features}")
    digests = {msgspec.structs.replace(RELEASE, prompt=prompt, features=(use,)).digest for use in uses}
    assert len(digests) == len(uses)
    # This one was computed before there were features, when an extract had to fit better.
    before = msgspec.structs.replace(RELEASE, retrieval=RetrievalPlan(policy=CheckPolicy(extract_focus=0.46)))
    assert before.digest == "dd70f7581b3ee60a082fa50979d462de3c9d7c1dee5a75ed366a127c28d5e5fa"


def test_every_part_of_a_release_is_among_those_changes():
    changed = {name for change in CHANGES.values() for name in change}
    assert changed == set(Release.__struct_fields__) - {"number"}


@pytest.mark.parametrize("template", ["Only {question}", "Only {sources}", ""])
def test_a_prompt_that_would_hide_the_passages_or_the_question_is_refused(template):
    with pytest.raises(BadRelease, match=r"\{(sources|question)\}"):
        msgspec.structs.replace(RELEASE, prompt=Prompt("p", template))


@pytest.mark.parametrize("task", [Task("classify", ("a", "b")), Task("extract", (), {"type": "object"})])
def test_a_task_needs_a_place_for_passages_only_where_it_looks_them_up(task):
    parts = {"task": task, "prompt": Prompt("p", "{question}")}
    msgspec.structs.replace(RELEASE, **parts, retrieval=RetrievalPlan(mode="off"))
    with pytest.raises(BadRelease, match=r"\{sources\}"):
        msgspec.structs.replace(RELEASE, **parts, retrieval=RetrievalPlan(mode="auto"))
    with pytest.raises(BadRelease, match=r"\{question\}"):
        msgspec.structs.replace(RELEASE, task=task, prompt=Prompt("p", "{sources}"))
    with pytest.raises(BadRelease, match="fallback"):
        msgspec.structs.replace(RELEASE, task=task, fallback="extractive")


@given(st.integers(1, 10**6))
def test_the_number_is_no_part_of_the_digest(number):
    assert msgspec.structs.replace(RELEASE, number=number).digest == RELEASE.digest


@given(st.text(max_size=40), st.text(max_size=40), st.floats(0, 2), st.integers(1, 50))
def test_whoever_holds_the_parts_can_verify_the_digest(template, notes, temperature, top_k):
    release = msgspec.structs.replace(
        RELEASE,
        prompt=Prompt("p", f"{template}{{sources}}{{question}}"),
        notes=notes,
        temperature=temperature,
        retrieval=RetrievalPlan(top_k=top_k),
    )
    parts = json.loads(release.canonical)
    assert parts["retrieval"]["top_k"] == top_k
    assert parts["max_tokens"] == 256  # Defaults are written out: changing one later does not change the past.
    written = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert msgspec.json.decode(written) == msgspec.json.decode(release.canonical)
    assert list(parts) == sorted(parts)
    assert release.digest == hashlib.sha256(release.canonical).hexdigest()


def test_a_bare_name_means_the_last_release_and_a_label_its_own():
    second = msgspec.structs.replace(RELEASE, number=2, notes="second")
    other = msgspec.structs.replace(RELEASE, name="other")
    releases = Releases(RELEASE, second, other)
    assert releases.resolve("hallmark").release is second
    assert releases.resolve("hallmark").role == "stable"
    assert releases.resolve("hallmark@1").release is RELEASE
    assert releases.resolve("hallmark@1").role == "pinned"
    assert releases.resolve("hallmark@2").release is second
    assert releases.serving == [second, other]


@pytest.mark.parametrize("model", ["", "hallmark@3", "Hallmark", "gpt-4o", "x" * 1000])
def test_an_unknown_name_is_refused_with_those_there_are(model):
    with pytest.raises(ModelNotFound, match="'hallmark', 'hallmark@1'") as raised:
        Releases(RELEASE).resolve(model)
    assert raised.value.param == "model"
    assert len(raised.value.message) < 400


DEFAULTS = {
    "engine": "tgi",
    "served_model": None,
    "prompt": {"version": "answer-1", "template": "{sources} {question}"},
    "retrieval": {"collection": "papers", "fusion": "rrf", "context": "passages"},
}


BIG = {"served_model": "org/big", "retrieval": {"collection": "papers", "fusion": "rrf", "context": "sentences"}}


def test_what_a_release_leaves_out_is_what_its_own_engine_has():
    defaults = {**DEFAULTS, "engines": {"big": BIG}}
    content = b'{"name": "a", "engine": "big", "retrieval": {"top_k": 3}}'
    on_big = read_release(content, is_toml=False, defaults=defaults)
    assert (on_big.engine, on_big.served_model) == ("big", "org/big")
    assert (on_big.retrieval.context, on_big.retrieval.top_k) == ("sentences", 3)
    on_main = read_release(b'{"name": "a"}', is_toml=False, defaults=defaults)
    assert (on_main.engine, on_main.served_model, on_main.retrieval.context) == ("tgi", None, "passages")
    with pytest.raises(InvalidRequest, match="engine"):
        read_release(b'{"name": "a", "engine": []}', is_toml=False, defaults=defaults)


def test_a_task_has_defaults_of_its_own_over_those_of_its_engine():
    sort = {"prompt": {"version": "sort-1", "template": "{labels} {question}"}, "retrieval": {"mode": "off"}}
    defaults = {**DEFAULTS, "engines": {"big": BIG}, "tasks": {"classify": sort}}
    content = b'{"name": "a", "engine": "big", "task": {"kind": "classify", "labels": ["x", "y"]}}'
    release = read_release(content, is_toml=False, defaults=defaults)
    assert (release.prompt.version, release.retrieval.mode) == ("sort-1", "off")
    assert (release.served_model, release.retrieval.context) == ("org/big", "sentences")
    plain = read_release(b'{"name": "a", "engine": "big"}', is_toml=False, defaults=defaults)
    assert (plain.prompt.version, plain.retrieval.mode) == ("answer-1", "auto")


def read(content: str, *, is_toml: bool = True) -> Release:
    return read_release(content.encode(), is_toml=is_toml, defaults=DEFAULTS)


TOML = """
name = "support"
adapter = "tone"
adapter_digest = "%s"
temperature = 0
fallback = "support@1"

[prompt]
version = "support-2"
template = "S: {sources} Q: {question}"

[retrieval]
top_k = 8
policy = { supported_share = 0.7 }

[task]
kind = "classify"
labels = ["refund", "other"]

[lineage]
training_run = "run-7"
""" % ("a" * 64)


def test_a_file_says_what_differs_and_the_service_knows_the_rest():
    release = read(TOML)
    assert release.engine == "tgi"
    assert release.prompt.version == "support-2"
    assert (release.retrieval.top_k, release.retrieval.fusion, release.retrieval.collection) == (8, "rrf", "papers")
    assert release.retrieval.policy.supported_share == 0.7
    assert release.retrieval.policy.focus == CheckPolicy().focus
    assert release.task.labels == ("refund", "other")
    assert read('name = "plain"').prompt.template == "{sources} {question}"


def test_toml_and_json_that_say_the_same_are_the_same_release():
    release = read(TOML)
    same = json.loads(release.canonical)
    assert read(json.dumps(same), is_toml=False).digest == release.digest
    del same["max_tokens"]  # A default, written out or not.
    assert read(json.dumps(same), is_toml=False).digest == release.digest


@pytest.mark.parametrize(
    ("content", "param", "said"),
    [
        ("", "name", "missing"),
        ('name = "Support"', "name", "matching"),
        ('name = "a"\nnumber = 3', "number", "registry"),
        ('name = "a"\ntempreture = 1', "tempreture", "did you mean `temperature`"),
        ('name = "a"\ntemperature = 3', "temperature", "<= 2"),
        ('name = "a"\ntemperature = "0"', "temperature", "Expected"),
        ('name = "a"\nmax_tokens = 0', "max_tokens", ">= 1"),
        ('name = "a"\nadapter_digest = "abc"', "adapter_digest", "matching"),
        ('name = "a"\nfallback = "other"', "fallback", "matching"),
        ('name = "a"\n[retrieval]\ntopk = 3', "retrieval.topk", "did you mean `retrieval.top_k`"),
        (
            'name = "a"\n[retrieval.policy]\ncosin = 3',
            "retrieval.policy.cosin",
            "did you mean `retrieval.policy.cosine`",
        ),
        ('name = "a"\n[prompt]\nversion = "b"', "prompt.template", "missing"),
        ('name = "a"\n[prompt]\nversion = "b"\ntemplate = "{question}"', "prompt.template", "{sources}"),
        ('name = "a"\n[task]\nkind = "classify"', "task", "`labels`"),
        ('name = "a"\n[task]\nkind = "classify"\nlabels = ["x", "x"]', "task", "each once"),
        ('name = "a"\n[task]\nkind = "classify"\nlabels = ["x"]', "task", "two or more"),
        ('name = "a"\n[task]\nlabels = ["x", "y"]', "task", "classify"),
        ('name = "a"\n[task]\nkind = "extract"', "task", "`schema`"),
        ('name = "a"\n[task]\nkind = "extract"\nschema = {type = "array"}', "task", "`object`"),
        (
            'name = "a"\n[task]\nkind = "extract"\nschema = {type = "object", required = 1}',
            "task.schema",
            "at `required`",
        ),
        (
            'name = "a"\nfallback = "extractive"\n[task]\nkind = "classify"\nlabels = ["x", "y"]',
            "fallback",
            "by themselves",
        ),
        ("name = ", None, "not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_is_told_by_its_field(content, param, said):
    with pytest.raises(InvalidRequest) as raised:
        read(content)
    assert (raised.value.param, said in raised.value.message) == (param, True), raised.value.message


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "\xff"])
def test_what_is_no_object_is_no_release(content):
    with pytest.raises(InvalidRequest, match="JSON"):
        read_release(content.encode("latin-1"), is_toml=False, defaults=DEFAULTS)


def test_a_stored_release_verifies_and_keeps_its_digest():
    release = read(TOML)
    stored = stored_release(4, release.canonical.decode(), release.digest)
    assert stored == msgspec.structs.replace(release, number=4)
    assert (stored.label, stored.digest, stored.canonical) == ("support@4", release.digest, release.canonical)


def test_a_release_that_an_older_version_made_keeps_its_digest_when_fields_are_added():
    parts = json.loads(read(TOML).canonical)
    del parts["fallback"]
    written = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(written.encode()).hexdigest()
    stored = stored_release(1, written, digest)
    assert (stored.fallback, stored.digest) == (None, digest)


@given(st.data())
def test_any_changed_byte_of_a_stored_release_is_noticed(data):
    release = read(TOML)
    written = bytearray(release.canonical)
    at = data.draw(st.integers(0, len(written) - 1))
    written[at] = data.draw(st.integers(32, 126).filter(lambda byte: byte != written[at]))
    with pytest.raises(BadRelease, match="changed after it was made"):
        stored_release(1, written.decode(), release.digest)


def test_a_release_of_a_newer_version_is_not_taken_for_one_of_this():
    written = json.dumps({**json.loads(read(TOML).canonical), "guardrail": "strict"})
    with pytest.raises(BadRelease, match="guardrail"):
        stored_release(1, written, hashlib.sha256(written.encode()).hexdigest())


def test_a_difference_is_told_by_path_with_both_values():
    release = read(TOML)
    other = msgspec.structs.replace(release, adapter=None, retrieval=RetrievalPlan(top_k=3))
    found = {path: (a, b) for path, a, b in differences(release, other)}
    assert found["adapter"] == ("tone", None)
    assert found["retrieval.top_k"] == (8, 3)
    assert found["retrieval.policy.supported_share"] == (0.7, 0.6)
    assert "prompt.template" not in found
    assert differences(release, release) == []


@pytest.mark.parametrize(
    "label", ["hallmark", "hallmark@0", "hallmark@01", "hallmark@x", "@1", "a@1@2", "A@1", "a@1\n"]
)
def test_what_is_no_label_is_refused(label):
    with pytest.raises(InvalidRequest, match="name@3"):
        parse_label(label)
    assert parse_label("a.b-c_d@12") == ("a.b-c_d", 12)
