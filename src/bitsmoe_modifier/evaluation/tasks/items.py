"""The items of the task `continuations`: JSON lines of ``{"context": str, "endings": [str, …], "label": int}``."""

import json
from pathlib import Path
from typing import Any

from ...errors import BitsMoEError

#: the items that come with the package
EMBEDDED = Path(__file__).parents[2] / "assets" / "docmoe_continuations.jsonl"


def load(file: str | None = None, **_metadata: Any) -> dict[str, Any]:
    """The dataset as lm-eval's ``custom_dataset`` gives it to the task.

    Args:
        file: JSON lines; None: the embedded ones.
        _metadata: what lm-eval passes to every custom dataset (the task's version, the model's arguments).

    Returns:
        ``{"test": datasets.Dataset}``.

    Raises:
        BitsMoEError: naming the file and the line that is no item.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(read(Path(file) if file else EMBEDDED))}


def read(path: Path) -> list[dict[str, Any]]:
    """Read and check the items.

    Raises:
        BitsMoEError: naming the file and the line that is no item.
    """
    if not path.is_file():
        raise BitsMoEError(f"{path}: no such file of task items")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise BitsMoEError(f"{path}, line {number}: not JSON ({error})") from None
        if not _is_item(item):
            raise BitsMoEError(
                f"{path}, line {number}: an item is "
                '{"context": text, "endings": [texts], "label": place of the right one}'
            )
        items.append({key: item[key] for key in ("context", "endings", "label")})
    if not items:
        raise BitsMoEError(f"{path} has no items")
    return items


def _is_item(item: Any) -> bool:
    match item:
        case {"context": str(), "endings": [_, _, *_] as endings, "label": int(label)}:
            return all(isinstance(text, str) and text for text in endings) and 0 <= label < len(endings)
    return False
