"""Ingestion jobs over HTTP: accepted, waited for, followed, cancelled, refused; and a source kept up."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from app.routes.job_schemas import JobError
from tests.fake_tgi import FakeTGI
from tests.origin_server import Origin, Page, origin_server
from tests.service import Api, Service, live_service, until

TOWER = "The tower is 330 metres tall."


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    given = {
        "limits": {"max_document_bytes": 20_000},
        "ingestion": {"fetch_urls": True, "fetch_allowed": ["127.0.0.1"]},
    }
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("jobs"), engine_url=tgi.url, tenants=30, settings=given) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


async def upload(
    api: Api, name: str = "tower.txt", text: str = TOWER, *, etag: str | None = None, **options: Any
) -> httpx.Response:
    return await api.client.post("/v1/documents", json={"name": name, "text": text, "etag": etag}, **options)


async def ended(api: Api, job_id: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        job = (await api.client.get(f"/v1/jobs/{job_id}")).json()
        return job if job["finished_at"] else None

    return dict(await until(look))


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    return str(error["message"])


def manifest(files: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "version": hashlib.sha256(text.encode()).hexdigest()} for name, text in files.items()]


async def sync(api: Api, files: dict[str, str], **options: Any) -> httpx.Response:
    body = {"source": "folder", "documents": manifest(files), **options}
    return await api.client.post("/v1/documents/sync", json=body)


async def synced(api: Api, files: dict[str, str], **options: Any) -> dict[str, Any]:
    begun = (await sync(api, files, **options)).json()
    for name in (*begun["added"], *begun["modified"]):
        sent = await upload(api, name, files[name], params={"job": begun["job"]["id"]})
        assert sent.status_code == 202, sent.text
    return await ended(api, begun["job"]["id"])


def counted(job: dict[str, Any]) -> dict[str, int]:
    """The outcomes that a job had any of."""
    return {outcome: count for outcome, count in job["outcomes"].items() if count}


async def test_an_upload_is_accepted_with_a_job_that_is_listed(api):
    response = await upload(api)
    job = response.json()
    assert (response.status_code, job["object"], job["kind"]) == (202, "job", "upload")
    assert [each["id"] for each in (await api.client.get("/v1/jobs")).json()["data"]] == [job["id"]]
    done = await ended(api, job["id"])
    assert (done["state"], done["outcomes"]["created"], done["embedded_passages"]) == ("done", 1, 1)
    (document,) = (await api.client.get(f"/v1/jobs/{job['id']}/documents")).json()["data"]
    assert (document["name"], document["state"], document["outcome"]) == ("tower.txt", "done", "created")
    assert (await api.client.get(f"/v1/documents/{document['document_id']}")).json()["passages"] == 1


@pytest.mark.parametrize(
    "options",
    [{"params": {"wait": 20}}, {"headers": {"prefer": "respond-async, wait=20"}}, {"headers": {"prefer": "wait=9999"}}],
    ids=["query", "header", "longer than we wait"],
)
async def test_who_waits_is_told_what_became_of_it(api, options):
    first, again = await upload(api, **options), await upload(api, **options)
    assert (first.status_code, first.json()["outcome"]) == (201, "created")
    assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
    jobs = (await api.client.get("/v1/jobs")).json()["data"]
    assert [job["id"] for job in jobs] == [again.json()["job"], first.json()["job"]]


async def test_what_cannot_be_read_is_an_error_for_who_waits_and_a_failed_document_for_all(api):
    broken = {"name": "broken.pdf", "content_base64": "JVBERi0xLjcgbm8gbW9yZQ=="}
    message = refused(
        await api.client.post("/v1/documents", json=broken, params={"wait": 20}), 422, "unreadable_document"
    )
    job = await ended(api, (await api.client.post("/v1/documents", json=broken)).json()["id"])
    assert job["state"] == "failed"
    assert [document["error"] for document in job["failed"]] == [{"code": "unreadable_document", "message": message}]
    (failed,) = (await api.client.get("/v1/failed-documents")).json()["data"]
    assert (failed["name"], failed["error"], failed["job"]) == ("broken.pdf", job["failed"][0]["error"], job["id"])
    assert (await api.client.get(f"/v1/jobs/{job['id']}/documents?state=done")).json()["data"] == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("UnreadableDocument", "unreadable_document"),
        ("UnsupportedType", "unsupported_media_type"),
        ("LimitExceeded.max_pages", "document_limit_exceeded"),
        ("DocumentOwned", "conflict"),
        ("IndexUnavailable", "retrieval_unavailable"),
        ("NotUploaded", "not_found"),
        ("UrlRefused", "invalid_request"),
        ("UrlUnreachable", "unreadable_document"),
        ("RetrievalError", "internal_error"),
        ("NoLongerKnown", "internal_error"),
    ],
)
def test_an_error_on_record_has_the_code_that_who_waited_was_told(kind, code):
    error = JobError.of(kind, "why")
    assert error is not None
    assert error.code == code
    assert error.message


async def test_a_job_that_is_done_stays_done_when_it_is_cancelled(api):
    job = await ended(api, (await upload(api)).json()["id"])
    cancelled = await api.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "done")


async def test_a_prediction_keeps_the_quote_and_the_version_it_cited_of_a_document_that_is_deleted(api):
    document = await api.add("tower.txt", TOWER)
    answer = await api.answer("How tall is the tower?")
    before = await api.record()
    assert before["passages"][0]["document_version"] == document["version"]
    assert (await api.client.delete(f"/v1/documents/{document['id']}")).status_code == 200
    after = (await api.client.get(f"/v1/predictions/{answer['id']}")).json()
    assert (after["passages"], after["citations"]) == (before["passages"], before["citations"])
    assert (await api.client.post("/v1/search", json={"query": "tower"})).json()["hits"] == []


async def test_jobs_are_listed_in_pages(api):
    ids = [(await upload(api, f"{n}.txt", f"Number {n}.")).json()["id"] for n in range(5)]
    first = (await api.client.get("/v1/jobs?limit=3")).json()
    rest = (await api.client.get(f"/v1/jobs?limit=3&before={first['next']}")).json()
    assert [job["id"] for job in (*first["data"], *rest["data"])] == ids[::-1]
    assert rest["next"] is None
    for job_id in ids:
        await ended(api, job_id)
    assert (await api.client.get("/v1/jobs?ended=false")).json()["data"] == []


async def test_a_folder_is_followed(api):
    files = {"a.md": "# A\n\nApples.", "b.md": "# B\n\nBananas."}
    dry = await sync(api, files, dry_run=True)
    assert (dry.status_code, dry.json()["added"], dry.json()["job"]) == (200, ["a.md", "b.md"], None)
    assert (await api.client.get("/v1/jobs")).json()["data"] == []
    first = await synced(api, files)
    assert (first["state"], counted(first)) == ("done", {"created": 2})
    changed = {"a.md": "# A\n\nApricots."}
    assert (await sync(api, changed, dry_run=True)).json()["deleted"][0]["name"] == "b.md"
    second = await synced(api, changed)
    assert counted(second) == {"replaced": 1, "deleted": 1}
    (document,) = (await api.client.get("/v1/documents")).json()["data"]
    assert (document["name"], document["source"]) == ("a.md", "folder")


async def test_what_a_synchronisation_may_not_do_is_refused(api):
    files = {f"{n}.md": f"Number {n}." for n in range(8)}
    await synced(api, files)
    assert "max_deletes" in refused(await sync(api, {}), 409, "conflict")
    refused(await sync(api, {}, max_deletes=7), 409, "conflict")
    begun = (await sync(api, {**files, "new.md": "New."})).json()
    job = begun["job"]["id"]
    assert "other.md" in refused(await upload(api, "other.md", "x", params={"job": job}), 409, "conflict")
    refused(await upload(api, "new.md", "New.", params={"job": "unknown"}), 404, "not_found")
    assert (await api.client.post(f"/v1/jobs/{job}/cancel")).json()["state"] == "cancelled"
    assert "has ended" in refused(await upload(api, "new.md", "New.", params={"job": job}), 409, "conflict")


async def test_files_that_do_not_come_are_failures(api):
    begun = (await sync(api, {"a.md": "A."})).json()
    done = (await api.client.post(f"/v1/jobs/{begun['job']['id']}/complete")).json()
    assert (done["state"], done["failed"][0]["error"]["code"]) == ("failed", "not_found")


# --- what the source calls its bytes ---


async def test_a_file_that_its_source_calls_as_before_is_not_asked_for(api):
    async def begun(**etags: str) -> dict[str, Any]:
        documents = [{"name": f"{name}.md", "etag": etag} for name, etag in etags.items()]
        body = {"source": "bucket", "documents": documents}
        return dict((await api.client.post("/v1/documents/sync", json=body)).json())

    async def send(plan: dict[str, Any], name: str, text: str, etag: str) -> None:
        sent = await upload(api, name, text, params={"job": plan["job"]["id"]}, etag=etag)
        assert sent.status_code == 202, sent.text

    first = await begun(a="1", b="1")
    assert first["added"] == ["a.md", "b.md"]
    await send(first, "a.md", "Apples.", "1")
    await send(first, "b.md", "", "1")  # Cannot be read, which is as true of these bytes the next time.
    assert (await ended(api, first["job"]["id"]))["state"] == "failed"

    second = await begun(a="1", b="1")
    assert (second["unchanged"], second["added"], second["modified"]) == (1, [], [])
    assert [failed["name"] for failed in second["failed"]] == ["b.md"]
    third = await begun(a="2", b="2")
    assert (third["modified"], third["added"]) == (["a.md"], ["b.md"])
    await send(third, "a.md", "Apples.", "2")
    await send(third, "b.md", "Bananas.", "2")
    done = await ended(api, third["job"]["id"])
    assert counted(done) == {"created": 1, "unchanged": 1}
    assert (await begun(a="2", b="2"))["unchanged"] == 2
    assert (await begun(a="1", b="2"))["modified"] == ["a.md"]


async def test_an_etag_is_for_a_synchronisation(api):
    refused(await upload(api, etag="1"), 400, "invalid_request", "etag")


# --- links ---


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with origin_server() as origin:
        yield origin


async def link(api: Api, url: str, **more: Any) -> httpx.Response:
    return await api.client.post("/v1/documents", json={"url": url, **more}, params={"wait": 20})


async def test_a_document_is_fetched_by_its_url_and_not_again_while_it_is_the_same(api, origin):
    origin.pages["/guide.md"] = Page(b"# Guide\n\nA hallmark is a stamp.", headers={"ETag": '"1"'})
    first = (await link(api, origin.at("/guide.md#top"))).json()
    document = first["document"]
    assert (document["name"], document["title"]) == (origin.at("/guide.md"), "Guide")
    assert document["version"] == hashlib.sha256(origin.pages["/guide.md"].body).hexdigest()
    (shown,) = (await api.client.get(f"/v1/jobs/{first['job']}/documents")).json()["data"]
    assert (shown["version"], shown["size_bytes"]) == (document["version"], document["size_bytes"])

    again = await link(api, origin.at("/guide.md#top"))
    assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
    assert 'If-None-Match: "1"' in origin.asked[1]
    labelled = await link(api, origin.at("/guide.md#top"), metadata={"product": "x"})
    assert (labelled.json()["outcome"], labelled.json()["embedded_passages"]) == ("replaced", 0)
    assert "If-None-Match" not in origin.asked[2]
    origin.pages["/guide.md"] = Page(b"# Guide\n\nA hallmark is a promise.", headers={"ETag": '"2"'})
    assert (await link(api, origin.at("/guide.md"))).json()["outcome"] == "replaced"


async def test_a_link_that_leads_nowhere_is_an_error_for_who_waits_and_a_failed_document_for_all(api, origin):
    origin.pages["/moved"] = Page(status=302, headers={"Location": "http://169.254.169.254/"})
    origin.pages["/large"] = Page(b"x" * 20_001)
    message = refused(await link(api, origin.at("/none"), name="none"), 422, "unreadable_document", "url")
    assert "status 404" in message
    refused(await link(api, origin.at("/moved"), name="moved"), 400, "invalid_request", "url")
    assert "max_document_bytes" in refused(
        await link(api, origin.at("/large"), name="large"), 413, "document_limit_exceeded"
    )
    failed = (await api.client.get("/v1/failed-documents")).json()["data"]
    assert {each["name"]: each["error"]["code"] for each in failed} == {
        "none": "unreadable_document",
        "moved": "invalid_request",
        "large": "document_limit_exceeded",
    }


async def test_a_url_that_may_not_be_fetched_is_refused_at_once_and_leaves_no_job(api):
    for url in ("http://10.0.0.1/", "http://2130706433/", "ftp://site.test/a", "http://u:p@site.test/"):
        refused(await link(api, url), 400, "invalid_request", "url")
    refused(await link(api, "http://127.0.0.1/", text="x"), 400, "invalid_request", "text")
    refused(await link(api, "http://127.0.0.1/", media_type="text/html"), 400, "invalid_request", "media_type")
    refused(await link(api, "http://127.0.0.1/" + "a" * 600), 400, "invalid_request", "name")
    refused(await api.client.post("/v1/documents", json={"text": "x"}), 400, "invalid_request", "name")
    assert (await api.client.get("/v1/jobs")).json()["data"] == []


async def test_a_file_of_a_synchronisation_may_be_a_link(api, origin):
    origin.pages["/a.md"] = Page(b"# A\n\nApples.", headers={"ETag": '"1"'})

    async def synced_by_link() -> dict[str, Any]:
        body = {"source": "site", "documents": [{"name": "a.md"}]}
        begun = (await api.client.post("/v1/documents/sync", json=body)).json()
        sent = {"name": "a.md", "url": origin.at("/a.md")}
        assert (await api.client.post(f"/v1/documents?job={begun['job']['id']}", json=sent)).status_code == 202
        return await ended(api, begun["job"]["id"])

    assert (await synced_by_link())["outcomes"]["created"] == 1
    assert (await synced_by_link())["outcomes"]["unchanged"] == 1
    assert 'If-None-Match: "1"' in origin.asked[1]


WRONG = {
    "no source": ({"documents": []}, "source"),
    "a strange source": ({"source": "a b", "documents": []}, "source"),
    "no digest": ({"source": "s", "documents": [{"name": "a", "version": "x"}]}, "documents.0.version"),
    "a name twice": ({"source": "s", "documents": [{"name": "a", "version": "0" * 64}] * 2}, "documents"),
    "an unknown field": ({"source": "s", "documents": [], "colour": "red"}, "colour"),
    "a negative number": ({"source": "s", "documents": [], "max_deletes": -1}, "max_deletes"),
}


@pytest.mark.parametrize(("body", "param"), WRONG.values(), ids=WRONG)
async def test_a_wrong_manifest_is_named(api, body, param):
    refused(await api.client.post("/v1/documents/sync", json=body), 400, "invalid_request", param)


@pytest.mark.parametrize("query", ["wait=-1", "wait=301", "wait=x"])
async def test_a_wait_that_cannot_be_is_refused(api, query):
    refused(await upload(api, params=query), 400, "invalid_request", "wait")


async def test_a_full_queue_is_told_when_to_come_again(tmp_path):
    async with FakeTGI() as tgi:
        given = {"ingestion": {"max_waiting_documents": 1, "workers": 1}}
        async with live_service(tmp_path, engine_url=tgi.url, settings=given) as service, service.client() as client:
            api = Api(client, "default", service.key)
            text = "\n\n".join(f"Paragraph {n} says something of its own." for n in range(2_000))
            assert (await upload(api, "long.txt", text)).status_code == 202
            busy = await upload(api)
            refused(busy, 429, "overloaded")
            assert 1 <= int(busy.headers["retry-after"]) <= 60
            metrics = (await client.get("/metrics")).text
            assert "hallmark_ingestion_waiting_documents 1.0" in metrics
            (job,) = (await client.get("/v1/jobs")).json()["data"]
            assert (await client.post(f"/v1/jobs/{job['id']}/cancel")).json()["state"] == "cancelled"
            assert (await upload(api, params={"wait": 20})).status_code == 201
            metrics = (await client.get("/metrics")).text
            assert 'hallmark_ingested_passages_total{kind="embedded"} 1.0' in metrics
            assert "hallmark_ingestion_waiting_documents 0.0" in metrics
