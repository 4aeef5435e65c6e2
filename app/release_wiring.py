"""How the release settings become the service's own release, and what other releases have where they leave it out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from app.engine_wiring import release_defaults
from app.prompts import ANSWER_PROMPT, CLASSIFY_PROMPT, EXTRACT_PROMPT
from app.releases import BadRelease, Prompt, Release, RetrievalPlan
from app.settings import Settings


def release_parts(settings: Settings) -> Mapping[str, Any]:
    """What a release has where its file leaves it out: the built-in prompt, and what this service has just one of."""
    prompts = {"classify": CLASSIFY_PROMPT, "extract": EXTRACT_PROMPT}
    tasks = {
        kind: {"prompt": msgspec.to_builtins(prompt), "retrieval": {"mode": "off", "context": "passages"}}
        for kind, prompt in prompts.items()
    }
    return {**release_defaults(settings), "prompt": msgspec.to_builtins(ANSWER_PROMPT), "tasks": tasks}


def own_release(settings: Settings) -> Release:
    """The release that the settings describe; its number is the registry's to give.

    Raises:
        BadRelease: its prompt cannot be read.
    """
    wanted = settings.release
    prompt = ANSWER_PROMPT
    if wanted.prompt_file is not None:
        prompt = Prompt(version=wanted.prompt_file.stem, template=_read(wanted.prompt_file))
    embedded = settings.embedded.enabled
    return Release(
        name=wanted.name,
        number=0,
        engine=settings.main_engine,
        prompt=prompt,
        retrieval=RetrievalPlan(
            mode=wanted.retrieval,
            collection=settings.qdrant.collection,
            search=wanted.search,
            fusion=settings.retrieval.fusion,
            top_k=wanted.top_k,
            per_document=wanted.per_document,
            mmr=wanted.mmr,
            rewrite=wanted.rewrite,
            context=wanted.context if wanted.context != "auto" else "sentences" if embedded else "passages",
            check=wanted.check,
            fallback=wanted.fallback,
            abstention=wanted.abstention,
        ),
        served_model=settings.engine.model,
        base_model=wanted.base_model or (settings.embedded.model if embedded else None),
        base_revision=wanted.base_revision,
        adapter=wanted.adapter,
        adapter_digest=wanted.adapter_digest,
        max_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        fallback=wanted.engine_fallback,
        notes=wanted.notes,
    )


def _read(prompt_file: Path) -> str:
    try:
        return prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise BadRelease(f"`release.prompt_file`: {str(prompt_file)!r} cannot be read: {why}.") from error
