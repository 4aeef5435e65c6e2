"""The composition root: settings become parts, parts become the service; nothing else builds or wires anything.

`open_service` reads top to bottom: each part is opened after those it rests on and closed before them.
"""

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from starlette.types import ASGIApp

from app.access import Access, UserTokens
from app.adapters import Keeper
from app.admission import Admission
from app.alerts import AlertGauges, Alerts, OutboxReports, RuleSets
from app.database import Database, own_directory
from app.datasets import open_datasets
from app.drift import Drift, DriftGauges, References
from app.engine_wiring import Engines, open_engines
from app.engines import Engine
from app.erasure import Eraser, ErasureFollower, Erasures
from app.evaluations import Evaluations
from app.feature_wiring import open_features
from app.features import Features
from app.feedback import FeedbackLog, LabelLog
from app.gateway import Gateway
from app.guards import Trials
from app.leases import Leases
from app.lineage import Provenance, Tracer, Uses
from app.links import PassageLinks, load_secret
from app.predictions import DocumentUses, History, PredictionLog, Shipper
from app.privacy_wiring import open_privacy, own_unused_keys
from app.quality import Apart, Gauges, Kept, Quality
from app.rates import RateLimits
from app.readiness import Check, Problem, Readiness
from app.registry import Registry
from app.release_wiring import own_release, release_parts
from app.releases import Release
from app.repeating import Repeating
from app.retrieval_wiring import embedding_names, open_ingestion, open_retriever
from app.review import open_review
from app.routes.api import create_api, for_browsers
from app.routes.chat import ChatRoute
from app.routes.dependencies import Services
from app.routes.forms import ChatForm
from app.routes.front import CHAT_PATH, RESPONSES_PATH, Front
from app.routes.responses import ResponsesForm
from app.settings import LimitSettings, Settings
from app.shadows import Shadows
from observability.logs import Log
from observability.metrics import Metrics
from observability.telemetry import Telemetry
from retrieval.documents import ParseLimits
from retrieval.embedder import Embedder
from retrieval.errors import IndexMismatch, RetrievalError
from retrieval.parsers import Parser
from retrieval.retriever import Retriever

VERSION = version("hallmark")

SHADOW_SECONDS = 60.0
"""The longest life of an answer that nobody waits for."""


@asynccontextmanager
async def open_service(
    settings: Settings,
    log: Log,
    *,
    engine: Engine | None = None,
    embedder: Embedder | None = None,
    telemetry: Telemetry | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[ASGIApp]:
    """Open every part and give the ASGI application; parts that are given take the place of those of the settings.

    Raises:
        DataDirectoryBusy: another process serves from this data directory.
        RetrievalError: the collection does not fit the settings.
    """
    async with AsyncExitStack() as parts:
        data_dir = parts.enter_context(own_directory(settings.data_dir))
        database = data_dir / "hallmark.db"
        telemetry = telemetry or Telemetry(
            service_version=VERSION,
            profile=settings.telemetry.genai_profile,
            keep_failures=settings.telemetry.keep_failures,
        )
        parts.push_async_callback(telemetry.aclose)
        metrics = metrics or Metrics(version=VERSION)
        reserve_bytes = settings.limits.disk_reserve_bytes
        privacy = open_privacy(settings.privacy, data_dir, parts)
        predictions = await parts.enter_async_context(
            PredictionLog(
                database, reserve_bytes=reserve_bytes, keeper=privacy.keeper, keys=privacy.ring, tally=metrics
            )
        )
        shared = await parts.enter_async_context(_shared_database(settings, database))
        access = await parts.enter_async_context(
            Access(shared, memory=data_dir / "keys.json", users=_user_tokens(settings))
        )
        rates = await parts.enter_async_context(_rate_limits(settings))
        engines = await open_engines(settings, parts, instead=engine)
        parser = await parts.enter_async_context(
            Parser(_parse_limits(settings.limits), processes=settings.retrieval.parser_processes)
        )
        retriever = await parts.enter_async_context(open_retriever(settings, data_dir, parser, embedder))
        ingestion = await parts.enter_async_context(open_ingestion(settings, data_dir, retriever, metrics))
        is_local = _is_file(shared, database)
        shipper = None if is_local else await parts.enter_async_context(Shipper(predictions, shared, keys=privacy.ring))
        if shipper is not None:
            await parts.enter_async_context(OutboxReports(shared, shipper, _replica(data_dir)))
        document_uses = await parts.enter_async_context(DocumentUses(shared, follows=is_local))
        keys = privacy.keys_of(shared, is_local=is_local)
        history, provenance = History(shared, keys=keys, pseudonym=privacy.pseudonym), Provenance(shared)
        features = await open_features(settings.features, shared, now, parts, ring=keys, pseudonym=privacy.pseudonym)
        registry = Registry(
            shared,
            own=own_release(settings),
            vet=_vetted_by(engines, features, lambda: registry.releases.answering),
            memory=data_dir / "serving.json",
        )
        await parts.enter_async_context(registry)
        links = PassageLinks(await asyncio.to_thread(load_secret, data_dir / "links.secret"))
        await parts.enter_async_context(Keeper(engines.adapters, lambda: registry.releases.answering))
        gateway = Gateway(
            releases=registry.releases,
            engines=engines.groups,
            search=retriever,
            predictions=predictions,
            admission=_admission(settings),
            features=features.reader,
            record_required=settings.record == "required",
            link_hosts=settings.retrieval.link_hosts,
            fence_key=await asyncio.to_thread(load_secret, data_dir / "fences.secret"),
        )
        shadows = Shadows(
            gateway,
            busy_at=max(1, min(settings.limits.max_concurrent_answers, settings.engine.max_connections) // 2),
            timeout_seconds=min(SHADOW_SECONDS, settings.limits.request_timeout_seconds),
        )
        parts.push_async_callback(shadows.aclose)
        label_log = await parts.enter_async_context(LabelLog(shared, words=privacy.words(keys)))
        evaluations = await parts.enter_async_context(Evaluations(telemetry, history, label_log))
        metrics.watch(
            record_queue_depth=lambda: predictions.backlog,
            requests_in_flight=lambda: gateway.admission.in_flight,
            waiting=lambda: gateway.admission.waiting,
            redis_failures=lambda: rates.failures,
            log_lines_dropped=lambda: log.dropped,
            shadows_dropped=lambda: shadows.dropped,
            evaluations_dropped=lambda: evaluations.dropped,
            outbox=shipper,
            engines=engines.samples,
        )
        metrics.watch_ingestion(ingestion)
        metrics.watch_retrieval(
            embeddings_cached=lambda: retriever.embeddings_cached,
            embeddings_computed=lambda: retriever.embeddings_computed,
            searches_by_words=lambda: retriever.searches_by_words_alone,
            rerank_failures=lambda: retriever.rerankings_failed,
        )
        datasets_kept = await parts.enter_async_context(open_datasets(shared, history, documents=retriever, ring=keys))
        unused = None if is_local else await own_unused_keys(privacy, database, shared, now, parts)
        erasures = ErasureFollower(
            shared,
            Eraser(
                shared,
                now,
                shredder=keys,
                datasets=datasets_kept.changes,
                longest_wait_seconds=settings.limits.longest_wait_seconds,
            ),
            Leases(shared, f"{_replica(data_dir)}/{secrets.token_hex(4)}", now),
            keys=privacy.ring,
            drop_unused=unused.step if unused is not None else None,
            scrub=None if is_local else predictions.scrub,
        )
        drifts = Drift(shared)
        quality_gauges, alert_gauges = Gauges(Kept(shared), show=metrics.judged), AlertGauges(shared, metrics.alerted)
        drift_gauges = DriftGauges(drifts, rollouts=registry.rollouts, show=metrics.drifted)
        for step, failing, every_seconds, first_after in (
            (erasures.turn, "Erasures wait", ErasureFollower.EVERY_SECONDS, 0.0),
            (quality_gauges.refresh, "The report on quality cannot be read", Gauges.EVERY_SECONDS, 0.0),
            (alert_gauges.refresh, "Alerts cannot be read", AlertGauges.EVERY_SECONDS, 10.0),
            (drift_gauges.refresh, "Drift cannot be read", DriftGauges.EVERY_SECONDS, 20.0),
        ):
            await parts.enter_async_context(
                Repeating(step, failing=failing, every_seconds=every_seconds, first_after_seconds=first_after)
            )
        public_url = settings.public_url.rstrip("/") if settings.public_url else None
        folder = settings.main_adapter_folder
        services = Services(
            retriever=retriever,
            ingestion=ingestion,
            predictions=predictions,
            feedback=await parts.enter_async_context(FeedbackLog(shared, words=privacy.words(keys))),
            labels=label_log,
            evaluations=evaluations,
            history=history,
            provenance=provenance,
            tracer=Tracer(provenance, history, label_log, documents=retriever, adapter_folder=folder),
            uses=Uses(provenance, history, document_uses),
            registry=registry,
            adapters=engines.adapters,
            trials=Trials(shared),
            review=await parts.enter_async_context(open_review(shared, history, label_log)),
            quality=Quality(Apart(shared.secret_url, keys=privacy.place(is_local=is_local)).make),
            datasets=datasets_kept,
            alerts=Alerts(shared, now),
            alert_rules=RuleSets(shared, now),
            drift=drifts,
            features=features,
            erasures=Erasures(shared, now, pseudonym=privacy.pseudonym),
            drift_references=References(shared, now, ring=keys),
            defaults=release_parts(settings),
            links=links,
            telemetry=telemetry,
            metrics=metrics,
            readiness=Readiness(_checks(engines, registry, retriever, predictions)),
            embedding_names=lambda: embedding_names(settings.retrieval, retriever),
            collection=settings.qdrant.collection,
            max_document_bytes=settings.limits.max_document_bytes,
            public_url=public_url,
            open_metrics=settings.open_metrics,
        )
        remote_images = settings.limits.remote_images
        chat = ChatRoute(
            gateway,
            shadows=shadows,
            access=access,
            rates=rates,
            links=links,
            telemetry=telemetry,
            metrics=metrics,
            log=log,
            max_body_bytes=settings.limits.max_body_bytes,
            timeout_seconds=settings.limits.request_timeout_seconds,
            public_url=public_url,
            form=ChatForm(remote_images=remote_images),
        )
        responses = ResponsesForm(
            predictions,
            history,
            collection=settings.qdrant.collection,
            max_body_bytes=settings.limits.max_body_bytes,
            remote_images=remote_images,
            pseudonym=privacy.pseudonym,
        )
        limits = settings.limits
        front = Front(
            create_api(VERSION, services),
            lanes={CHAT_PATH: chat, RESPONSES_PATH: chat.speaking(responses)},
            max_body_bytes=limits.max_body_bytes,
            # In base64, or in a form, a document grows.
            max_file_bytes=max(limits.max_body_bytes, limits.max_document_bytes * 2),
            access=access,
            links=links,
            metrics=metrics,
            log=log,
            open_paths=("/metrics",) if settings.open_metrics else (),
        )
        yield for_browsers(front, settings.cors_origins) if settings.cors_origins else front


def _parse_limits(limits: LimitSettings) -> ParseLimits:
    return ParseLimits(
        max_bytes=limits.max_document_bytes,
        max_pages=limits.max_document_pages,
        max_characters=limits.max_document_characters,
        max_seconds=limits.max_document_seconds,
        max_memory_bytes=limits.max_document_memory_bytes,
    )


def _vetted_by(
    engines: Engines, features: Features, answering: Callable[[], Sequence[Release]]
) -> Callable[[Release], Awaitable[list[str]]]:
    """What says what keeps a release from serving: its engine, and the features there are."""

    async def vet(release: Release) -> list[str]:
        return await features.reader.problems(release) + await engines.vet(release, answering())

    return vet


def _shared_database(settings: Settings, local: Path) -> Database:
    if settings.database_url is None:
        return Database.of_file(local)
    return Database(settings.database_url.get_secret_value().strip())


def _user_tokens(settings: Settings) -> UserTokens | None:
    wanted = settings.users
    if wanted.jwt_secret is None:
        return None
    return UserTokens(wanted.jwt_secret.get_secret_value(), groups_header=wanted.groups_header)


def _rate_limits(settings: Settings) -> RateLimits:
    url = settings.limits.redis_url
    return RateLimits(url.get_secret_value() if url else None)


def _admission(settings: Settings) -> Admission:
    limits = settings.limits
    return Admission(
        places=limits.max_concurrent_answers,
        room=limits.max_waiting_answers,
        wait_seconds=limits.longest_wait_seconds,
    )


def _replica(data_dir: Path) -> str:
    """What this replica is called: the next process on the same data directory is the same."""
    return f"{socket.gethostname()}:{data_dir}"


def _is_file(database: Database, path: Path) -> bool:
    return database.kind == "sqlite" and Path(database.url.database or "").resolve() == path.resolve()


def _checks(
    engines: Engines, registry: Registry, retriever: Retriever, predictions: PredictionLog
) -> Mapping[str, Check]:
    """What `/readyz` asks of each part."""

    async def check_retrieval() -> Problem | None:
        try:
            await retriever.ready()
        except IndexMismatch as error:
            return Problem("the index does not fit the settings", str(error))
        except RetrievalError as error:
            return Problem("the index does not answer", str(error))
        return None

    async def check_record() -> Problem | None:
        return None if predictions.healthy else Problem("predictions cannot be recorded")

    return {
        "engine": lambda: engines.problem(registry),
        "release": lambda: engines.release_problem(registry),
        "retrieval": check_retrieval,
        "record": check_record,
    }


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
