"""Adapters that are loaded while an engine runs: the embedded engine and vLLM take them so, others at their start only.

The main rule: asking twice changes nothing, and what the engine lists afterwards is believed, not what it answered.
"""

from pathlib import PurePath

from app.engines.tgi import TGIEngine
from app.errors import ServiceError

LOAD_SECONDS = 120.0
"""The embedded engine makes a merged copy of its model, beside the answers it is at."""
UNLOAD_SECONDS = 10.0


async def ensure_loaded(engine: TGIEngine, name: str, folder: PurePath) -> bool:
    """Have an engine serve the adapter in a folder of its machine; False where it takes none while it runs.

    Raises:
        ServiceError: the engine cannot be asked, or refuses the adapter.
    """
    path = engine.dialect.load_path
    if path is None:
        return False
    if name in (await engine.describe()).adapters:
        return True
    try:
        await engine.ask(path, {"lora_name": name, "lora_path": str(folder)}, LOAD_SECONDS)
    except ServiceError:
        if name in (await engine.describe()).adapters:
            return True  # Somebody else was at it, and it is loaded now.
        raise
    return name in (await engine.describe()).adapters


async def unload(engine: TGIEngine, name: str) -> None:
    """Have an engine forget an adapter.

    Raises:
        ServiceError: the engine cannot be asked, or refuses.
    """
    if (path := engine.dialect.unload_path) is not None:
        await engine.ask(path, {"lora_name": name}, UNLOAD_SECONDS)
