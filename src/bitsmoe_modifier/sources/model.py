"""The model that a comparison starts from: where it is, whether it can be quantized, its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RecipeError
from ..remote_code import trusts_remote_code
from ..storage.shards import read_json
from ..storage.sizes import checkpoint_bytes, expert_elements, tensor_sizes
from .hub import fetch
from .precision import is_low_precision_source, low_precision, source_sizes, source_tensors


@dataclass(frozen=True)
class DenseModel:
    """An unquantized mixture-of-experts model on disk.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        model_type: of its config.json.
        expert_elements: weights of its routed experts.
        expert_bits: bits per expert weight as stored.
        checkpoint_bytes: bytes of its safetensors files.
    """

    name: str
    folder: Path
    model_type: str
    expert_elements: int
    expert_bits: float
    checkpoint_bytes: int


def find_model(model: str, check: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A local checkpoint folder, or the snapshot of a hub model (downloaded where needed).

    Args:
        model: folder, or ORG/NAME.
        check: called with the content of config.json, of a hub model before its weights come; may raise.

    Raises:
        CheckpointError: when it is neither.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(f"{model} has no config.json; give the folder of a saved model")
        if check is not None:
            check(read_config(path))
        return path
    check_hub_name(model)
    return fetch(model, check)


def check_hub_name(model: str) -> None:
    """Refuse what is not a folder and cannot be the name of a model on the hub.

    Raises:
        CheckpointError: naming the nearest folder.
    """
    path = Path(model)
    if path.is_file():
        raise CheckpointError(f"{model} is a file; give the folder of a saved model")
    if path.is_absolute() or path.exists() or model.startswith((".", "~")) or model.count("/") != 1:
        hub = "" if "/" in model else "; a model of the hub is named ORG/NAME"
        raise CheckpointError(f"{model}: no such model folder{_near(path)}{hub}")


def _near(path: Path) -> str:
    """The folder beside that was perhaps meant, for a message."""
    try:
        folders = [entry.name for entry in path.expanduser().absolute().parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = get_close_matches(path.name, folders, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def open_dense(model: str) -> DenseModel:
    """Find a model and check that it is an unquantized mixture of experts, or published in a low precision.

    Raises:
        CheckpointError: when there is no such model, or its files are damaged.
        RecipeError: when it is quantized already, or has no routed experts.
    """

    def check(config: dict[str, Any]) -> None:
        scheme = config.get("quantization_config")
        if scheme is not None and low_precision(config) is None:
            method = scheme.get("format") or scheme.get("quant_method") if isinstance(scheme, dict) else scheme
            raise RecipeError(
                f"{model} is quantized already ({method}); give the unquantized model that it was made from"
            )

    folder = find_model(model, check)
    config = read_config(folder)
    if low_precision(config) and not is_low_precision_source(folder):
        raise RecipeError(f"{model} was quantized by this package; give the model that it was made from")
    sizes = source_sizes(source_tensors(folder), tensor_sizes(folder))
    elements = expert_elements(sizes)
    if elements == 0:
        raise RecipeError(
            f"{model} (model_type {config.get('model_type')}) has no routed experts (no tensor under '.experts.'); "
            "give a mixture-of-experts model"
        )
    stored = sum(s.nbytes for name, s in sizes.items() if ".experts." in name and not name.endswith("bias"))
    return DenseModel(
        name=model,
        folder=folder,
        model_type=str(config.get("model_type")),
        expert_elements=elements,
        expert_bits=8 * stored / elements,
        checkpoint_bytes=checkpoint_bytes(folder),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        CheckpointError: when it is missing or not JSON.
    """
    return read_json(folder / "config.json")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer; one with code of its own where `remote_code` allows it.

    Raises:
        CheckpointError: when it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    own = _own_code(folder)
    if own and not trusts_remote_code():
        raise CheckpointError(
            f"{folder}: its tokenizer is code that comes with the model ({own}); read it, and run it by "
            "--trust-remote-code"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_remote_code())
    except (OSError, ValueError, KeyError, ImportError) as error:
        remedy = f"the file {own} has to be there" if own else "copy the tokenizer files to it"
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({error}); {remedy}") from error


def _own_code(folder: Path) -> str:
    """The module of the folder that a tokenizer's class is in; "" where it is one of transformers'."""
    path = folder / "tokenizer_config.json"
    classes = (read_json(path).get("auto_map") or {}).get("AutoTokenizer") if path.is_file() else None
    names = [name for name in (classes if isinstance(classes, list) else [classes]) if isinstance(name, str)]
    return f"{names[0].rpartition('--')[2].partition('.')[0]}.py" if names else ""
