"""A client made from `/openapi.json` by openapi-python-client, as any team would make one, does a day's work."""

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from io import BytesIO
from types import ModuleType
from typing import Any

import pytest

from tests.fake_tgi import FakeTGI, Tokens
from tests.service import Service, live_service

pytestmark = pytest.mark.slow  # To generate the client takes longer than all that it is asked.

PACKAGE = "generated_hallmark_client"


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    answer = Tokens("A hallmark is a stamp on gold.")
    directory = tmp_path_factory.mktemp("generated")
    async with FakeTGI(default=answer) as tgi, live_service(directory, engine_url=tgi.url) as service:
        yield service


@pytest.fixture(scope="module")
async def package(service: Service, tmp_path_factory) -> AsyncIterator[str]:
    """Generate the client from what the service serves, and make it importable."""
    directory = tmp_path_factory.mktemp("client")
    async with service.nobody() as client:
        (directory / "openapi.json").write_bytes((await client.get("/openapi.json")).content)
    (directory / "config.yaml").write_text("post_hooks: []\n")
    command = ("openapi_python_client", "generate", "--path", "openapi.json", "--config", "config.yaml")
    options = ("--meta", "none", "--output-path", PACKAGE, "--fail-on-warning")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command, *options),
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed
    sys.path.insert(0, str(directory))
    yield PACKAGE
    sys.path.remove(str(directory))
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def models(package: str) -> ModuleType:
    return importlib.import_module(f"{package}.models")


@pytest.fixture
async def api(package: str, service: Service) -> AsyncIterator["Caller"]:
    made = importlib.import_module(f"{package}.client").AuthenticatedClient(
        service.url, token=service.key, raise_on_unexpected_status=True
    )
    async with made as client:
        yield Caller(package, client)


class Caller:
    """Calls the generated functions: `await api("documents", "list_documents", limit=3)`."""

    def __init__(self, package: str, client: Any) -> None:
        self.package, self.client = package, client

    async def __call__(self, tag: str, operation: str, **arguments: Any) -> Any:
        module = importlib.import_module(f"{self.package}.api.{tag}.{operation}")
        return await module.asyncio(client=self.client, **arguments)


async def test_it_uploads_searches_and_asks(api, models):
    upload = models.DocumentUpload(name="stamps.md", text="# Stamps\n\nA hallmark is a stamp on gold.")
    added = await api("documents", "add_document", body=upload, wait=20.0)
    assert isinstance(added, models.IngestedObject)
    assert added.outcome == models.IngestedObjectOutcome.CREATED
    again = await api("documents", "add_document", body=upload, wait=20.0)
    assert (again.outcome, again.embedded_passages) == ("unchanged", 0)

    body = models.SearchRequest(query="hallmark stamp", top_k=3, mode=models.SearchRequestMode.SPARSE)
    found = await api("search", "search", body=body)
    assert found.hits[0].passage.document_id == added.document.id
    assert found.hits[0].sparse_rank == 1
    assert found.hits[0].dense_rank is None

    question = models.Message(role=models.MessageRole.USER, content="What is a hallmark?")
    retrieval = models.RetrievalOptions(mode=models.RetrievalOptionsMode.REQUIRED, top_k=2)
    request = models.ChatRequest(model="hallmark", messages=[question], retrieval=retrieval)
    answer = await api("chat", "create_chat_completion", body=request)
    assert isinstance(answer, models.ChatCompletion)
    message = answer.choices[0].message
    mark = message.annotations[0].url_citation
    assert message.content[mark.start_index : mark.end_index] == "[1]"
    assert answer.citations[0].status == models.CitationObjectStatus.SUPPORTED
    assert answer.citations[0].quote == "A hallmark is a stamp on gold."
    assert answer.verdict.status == models.VerdictObjectStatus.ANSWERED

    record = await api("predictions", "get_prediction", prediction_id=answer.id)
    assert record.outcome == models.PredictionObjectOutcome.FINISHED
    assert record.answer == message.content


async def test_it_gives_feedback_and_states_a_label(api, models):
    about = "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55"
    body = models.FeedbackRequest(prediction_id=about, author="anna", rating=False, category="tone")
    given = await api("feedback", "give_feedback", body=body)
    assert isinstance(given, models.FeedbackObject)
    assert (given.rating, given.prediction) == (False, models.FeedbackObjectPrediction.NOT_YET)
    change = models.FeedbackChange(author="anna", comment="too formal")
    changed = await api("feedback", "change_feedback", feedback_id=given.id, body=change)
    assert (changed.revision, changed.rating, changed.comment) == (2, False, "too formal")
    label = models.LabelRequest(prediction_id=about, class_="refund", passages=[])
    stated = await api("labels", "state_label", body=label)
    assert (stated.class_, stated.passages) == ("refund", [])
    summary = await api("feedback", "get_prediction_feedback", prediction_id=about)
    assert [each.negative for each in summary.counts] == [1]
    assert [each.id for each in summary.labels] == [stated.id]
    gone = await api("feedback", "withdraw_feedback", feedback_id=given.id, author="anna")
    assert gone.withdrawn
    listed = await api("feedback", "list_feedback", source=models.ListFeedbackSource.END_USER)
    assert listed.data == []


async def test_it_uploads_a_file(api, models, package):
    file = importlib.import_module(f"{package}.types").File(
        payload=BytesIO(b"# Assay\n\nAn assay office tests gold."), file_name="assay.md", mime_type="text/markdown"
    )
    body = models.DocumentFile(file=file, metadata='{"year": 1478}')
    added = await api("documents", "add_document", body=body, wait=20.0)
    assert added.document.name == "assay.md"
    assert added.document.metadata["year"] == 1478


async def test_it_pages_and_deletes(api, models):
    for name in ("one.txt", "two.txt", "three.txt"):
        body = models.DocumentUpload(name=name, text=f"The text of {name}.")
        await api("documents", "add_document", body=body, wait=20.0)
    names, after = set(), None
    while True:
        page = await api("documents", "list_documents", limit=1, **({"after": after} if after else {}))
        names |= {document.name for document in page.data}
        if (after := page.next_) is None:
            break
    assert {"one.txt", "two.txt", "three.txt"} <= names
    document = (await api("documents", "list_documents", limit=1)).data[0]
    gone = await api("documents", "delete_document", document_id=document.id)
    assert gone.deleted
    missing = await api("documents", "get_document", document_id=document.id)
    assert isinstance(missing, models.ErrorEnvelope)
    assert missing.error.code == "not_found"


async def test_it_reads_identity_models_and_health(api, models):
    me = await api("access", "who_am_i")
    assert me.tenant == "default"
    listed = await api("models", "list_models")
    assert listed.data[0].id == "hallmark"
    embedded = await api(
        "models", "create_embeddings", body=models.EmbeddingRequest(model="hashing", input_=["a kettle"])
    )
    assert len(embedded.data[0].embedding) == 64
    ready = await api("health", "readiness")
    assert ready.status == models.HealthStatus.OK


async def test_what_is_generated_has_plain_names(models):
    assert [name for name in models.__all__ if "Type0" in name or "Type1" in name] == []
