"""Models of the hub: what is fetched of them, in which order, and what to say when that fails.

A repository holds more than transformers reads: gpt-oss has its weights three times (`original/`, `metal/`), Mistral's
have a consolidated copy. Descriptions come first, so that a model that cannot be used is refused before its weights
come; of those, the files come that the index names.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..remote_code import trusts_remote_code
from ..storage.shards import read_json
from .companions import LICENCES

_INDEX = "model.safetensors.index.json"
_DESCRIPTIONS = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", *LICENCES]
_CODE = ["*.py"]
_WEIGHTS = ["*.safetensors"]
#: copies of the weights in other forms, and files of theirs
_UNREAD = ["original/*", "metal/*", "consolidated*", *(f"*/{kind}" for kind in (*_DESCRIPTIONS, *_CODE, *_WEIGHTS))]
#: the one folder below that is read
_UNREAD.remove("*/*.jinja")


def fetch(model: str, check: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """The snapshot of a hub model: what transformers reads, downloaded where it is not here.

    Args:
        model: ORG/NAME.
        check: called with the content of config.json, before any weights come; may raise.

    Raises:
        CheckpointError: when there is no such model, or no network.
    """
    from huggingface_hub import snapshot_download

    def snapshot(patterns: list[str], **options: Any) -> Path:
        try:
            return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=_UNREAD, **options))
        except hub_errors() as error:
            raise CheckpointError(f"{model} is neither a folder nor a model that {reason(error)}") from error

    descriptions = [*_DESCRIPTIONS, *(_CODE if trusts_remote_code() else [])]
    folder = snapshot(descriptions)
    if check is not None:
        check(read_json(folder / "config.json"))
    named = read_json(folder / _INDEX).get("weight_map") if (folder / _INDEX).exists() else None
    weights = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else _WEIGHTS
    # the same commit: the name of a snapshot's folder, in the cache, is its hash
    commit = {"revision": folder.name} if len(folder.name) == 40 else {}
    return snapshot([*descriptions, *weights], **commit)


def hub_errors() -> tuple[type[Exception], ...]:
    """What asking the hub may raise: its own errors, files', and those of the HTTP library that it uses."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    libraries = (importlib.import_module(name) for name in ("httpx", "httpx2") if find_spec(name))
    http = tuple(library.HTTPError for library in libraries)
    return HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, *http


#: how the hub's library calls it when the hub does not answer, and nothing of the model is here
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")


def reason(error: Exception) -> str:
    """The end of a sentence "… a model that": why the hub did not give it, and what to do, in one line."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = str(error).strip().partition("\n")[0].removeprefix("Got: ") or type(error).__name__
    if "GatedRepoError" in kinds:
        return (
            "you may download: its owner wants an agreement first. Ask for access on its page of the hub, then log in "
            "by `hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds:
        return "the hub shows you: check the name; if it is private, log in by `hf auth login`"
    if kinds & {*_UNREACHABLE}:
        return f"could be asked for: the hub cannot be reached ({said}); give the folder of a downloaded model"
    return f"can be downloaded: {said}"
