"""LoRA adapters by name: checked, merged into a copy of the base model, and swapped in while requests run.

Main rule: an adapter is served from a merged copy of its own. Applying it at every step costs a third of the base
model's speed; a copy costs memory only, which is why the number of adapters is bounded. The copy is built on a
thread of its own, so that nobody's tokens wait for it.
"""

import asyncio
import copy
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.engines.local.model import LoadedModel
from app.engines.local.protocol import BASE_MODEL_NAME, Fault

log = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Adapters:
    """The adapters served, least recently used first; its methods are called on the event loop.

    Those `given`, as (name, folder) pairs, are there from the start.

    Raises:
        Fault: 400 as `load`, for one of them.
    """

    def __init__(self, base: LoadedModel, max_adapters: int, given: Sequence[tuple[str, Path]] = ()) -> None:
        self._base = base
        self._max_adapters = max_adapters
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="adapter")
        self._one_at_a_time = asyncio.Lock()
        for name, folder in given:
            self._refuse_taken(name, replace=False)
            self._put(name, merged_copy(base, folder))

    @property
    def names(self) -> list[str]:
        """The names served, in alphabetical order."""
        return sorted(self._loaded)

    @property
    def by_use(self) -> list[str]:
        """The names served, the one that was used least recently first: the next to be dropped."""
        return list(self._loaded)

    def use(self, name: str) -> Any:
        """Return the adapter's merged model and count this as a use.

        Raises:
            Fault: 404, with the known names.
        """
        if name not in self._loaded:
            raise _unknown(name, [self._base.model_id, *self.names])
        self._loaded.move_to_end(name)
        return self._loaded[name]

    async def load(self, name: str, folder: Path, *, replace: bool = False) -> list[str]:
        """Serve the adapter in `folder` as `name`; return the names dropped to make room, least recently used first.

        Requests already running go on with the model they began with.

        Raises:
            Fault: 400 when the name is taken (and not to be replaced) or the folder is no fitting adapter.
        """
        async with self._one_at_a_time:
            self._refuse_taken(name, replace=replace)
            loop = asyncio.get_running_loop()
            return self._put(name, await loop.run_in_executor(self._builder, merged_copy, self._base, folder))

    def _refuse_taken(self, name: str, *, replace: bool) -> None:
        if name in (BASE_MODEL_NAME, self._base.model_id):
            raise _bad(f"lora_name: {name!r} is the base model's name; choose another")
        if name in self._loaded and not replace:
            raise _bad(f"lora_name: {name!r} is already loaded; unload it first or send load_inplace: true")

    def _put(self, name: str, merged: Any) -> list[str]:
        self._loaded[name] = merged
        self._loaded.move_to_end(name)
        dropped = []
        while len(self._loaded) > self._max_adapters:
            dropped.append(self._loaded.popitem(last=False)[0])
        log.info("loaded adapter %s; dropped %s", name, dropped or "none")
        return dropped

    async def unload(self, name: str) -> None:
        """Stop serving `name`.

        Raises:
            Fault: 404 when it is not served.
        """
        async with self._one_at_a_time:
            if name not in self._loaded:
                raise _unknown(name, self.names)
            del self._loaded[name]
            log.info("unloaded adapter %s", name)

    def close(self) -> None:
        """Wait for a copy under construction and end the builder thread."""
        self._builder.shutdown(cancel_futures=True)


def merged_copy(base: LoadedModel, folder: Path) -> Any:
    """Return a copy of the base model with the adapter's weights added in.

    Raises:
        Fault: 400 when the folder is not a LoRA adapter for this base model.
    """
    try:
        saved = _check(base, folder)
    except OSError as error:  # Such as a path longer than a file system takes.
        raise _bad(f"lora_path: the adapter cannot be read: {error.strerror}") from error
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with torch.no_grad():
            peft = PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder), torch_device="cpu")
            expected = _lora_keys(get_peft_model_state_dict(peft, save_embedding_layers=False))
            merged = peft.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise _bad(f"lora_path: the adapter in {folder} does not fit {base.model_id}: {error}") from error
    if differing := sorted(saved ^ expected):  # peft leaves out what it does not know, and invents what it misses.
        raise _bad(
            f"lora_path: {WEIGHTS_FILE} in {folder} is not what {CONFIG_FILE} says: "
            f"{len(expected - saved)} tensors are missing and {len(saved - expected)} too many, such as {differing[0]}"
        )
    return merged.eval().requires_grad_(requires_grad=False)


def _lora_keys(names: Iterable[str]) -> set[str]:
    return {name for name in names if ".lora_" in name}


def _check(base: LoadedModel, folder: Path) -> set[str]:
    """Look at the files before anything is built of them; return the names of the adapter's tensors."""
    if not (folder / CONFIG_FILE).is_file():
        raise _bad(f"lora_path: {folder} has no {CONFIG_FILE}; name the folder PEFT saved the adapter to")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        kind, rank, targets = config["peft_type"], config["r"], config["target_modules"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad(f"lora_path: {CONFIG_FILE} in {folder} is not PEFT's: {error!r}") from error
    if kind != "LORA" or not isinstance(rank, int) or rank < 1 or not targets:
        raise _bad(f"lora_path: {folder} needs peft_type LORA, r of at least 1 and target_modules; retrain it as LoRA")
    if config.get("modules_to_save"):
        raise _bad("lora_path: the adapter trains whole modules (modules_to_save); train linear layers only")
    if not (folder / WEIGHTS_FILE).is_file():
        raise _bad(f"lora_path: {folder} has no {WEIGHTS_FILE}; save it with safe_serialization (pickles are not read)")
    trained_on = str(config.get("base_model_name_or_path") or "")
    if _names_another_model(trained_on, base.model_id):
        raise _bad(f"lora_path: the adapter was trained on {trained_on}, this engine serves {base.model_id}")
    return _check_shapes(base, folder)


def _names_another_model(trained_on: str, model_id: str) -> bool:
    """Compare hub-style names only: a local path on the training machine says nothing here."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", trained_on) or Path(trained_on).exists():
        return False
    theirs, ours = (re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1].lower()) for name in (trained_on, model_id))
    return theirs not in ours and ours not in theirs


def _check_shapes(base: LoadedModel, folder: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    layers = {name: getattr(module, "weight", None) for name, module in base.model.named_modules()}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            found = _lora_keys(file.keys())
            for key in found:
                match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
                if not match:
                    continue
                weight, shape = layers.get(match[1]), file.get_slice(key).get_shape()
                side = 1 if match[2] == "A" else 0
                if weight is None or len(shape) != 2 or weight.shape[side] != shape[side]:
                    raise _bad(
                        f"lora_path: {match[1]} of the adapter does not fit {base.model_id}: another base model?"
                    )
    except (SafetensorError, OSError) as error:
        raise _bad(f"lora_path: {WEIGHTS_FILE} in {folder} cannot be read: {error}") from error
    if not found:
        raise _bad(f"lora_path: {WEIGHTS_FILE} in {folder} holds no LoRA weights")
    return found


def _bad(message: str) -> Fault:
    return Fault(400, "adapter", message)


def _unknown(name: str, known: list[str]) -> Fault:
    return Fault(404, "model_not_found", f"model: {name!r} is not served; known: {', '.join(known) or 'none'}")
