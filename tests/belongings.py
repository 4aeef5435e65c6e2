"""What a tenant has of everything that a path can name: made through the service, with a word of its own in it."""

from pathlib import Path

from app.alerts.states import Alert, Subject
from app.alerts.store import insert
from app.database import Database
from app.predictions import uuid7
from tests.review_world import under_review
from tests.routes import UNKNOWN, call
from tests.service import Api, Service


async def belongings(service: Service, owner: Api, word: str = "gold", *, name: str = "support") -> dict[str, str]:
    """Make one of each, with `word` where they have content; gives their ids and names, by the path's parameter."""
    document = await owner.add(f"{word}.txt", f"A hallmark is a stamp on {word}.", about=word)
    answer = await owner.answer(f"What is a hallmark on {word}?", user=f"{name}-user")
    about = {"prediction_id": answer["id"]}
    feedback = await owner.client.post("/v1/feedback", json={**about, "rating": True, "comment": word})
    label = await owner.client.post("/v1/labels", json={**about, "class": "a", "answer": word})
    silence = await call(owner.client, "POST /v1/alert-silences", {})
    erasure = await call(owner.client, "POST /v1/erasures", {})
    build = await call(owner.client, "POST /v1/datasets/{dataset}/builds", {"dataset": name})
    (job,) = (await owner.client.get("/v1/jobs")).json()["data"]
    assert (await call(owner.client, "PUT /v1/features/{view}", {"view": "customer"})).is_success
    return {
        **UNKNOWN,
        "alert_id": await alert_of(service, owner.name, word),
        "job_id": job["id"],
        "view": "customer",
        "document_id": document["id"],
        "silence_id": silence.json()["id"],
        "target": "hallmark",
        "dataset": name,
        "erasure_id": erasure.json()["id"],
        "build_id": build.json()["id"],
        "prediction_id": answer["id"],
        "response_id": answer["id"],
        "feedback_id": feedback.json()["id"],
        "label_id": label.json()["id"],
        "model": "hallmark",
        "name": "hallmark",
        "release": "hallmark@1",
        **await under_review(owner),
    }


async def alert_of(service: Service, tenant: str, word: str) -> str:
    """Leave an alert, as a worker would that found one; gives its id."""
    assert isinstance(service.database, Path)
    subject = Subject(tenant, "citations", "hallmark")
    facts = {"kind": "threshold", "severity": "ticket", "state": "firing", "since": 1, "fired_at": 1, "why": word}
    alert = Alert(id=uuid7(), subject=subject, **facts)  # type: ignore[arg-type]
    async with Database.of_file(service.database) as database, database.writing() as connection:
        assert await insert(database, connection, alert)
    return alert.id
