"""Tensors under the names that they have in the source's files.

`save_pretrained` turns its own names back into published ones by turning its rules around, which loses what several
published names have in common: DeepSeek-V4's ``layers.0.attn.kv_norm.weight`` comes back as
``model.layers.0.attn.norm.weight``, which no other runtime knows.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..storage.renaming import rename_tensors
from ..storage.shards import checkpoint_files, read_json, scan
from .inventory import Inventory, model_names, write_index


def restore_keys(inventory: Inventory, model: Any, target: Path) -> int:
    """Give a checkpoint's tensors the names that they have in the source.

    Tensors of packed experts, which the source does not have, and those that the model holds in another form than the
    files keep the names that they were saved under.

    Args:
        inventory: of the source.
        model: that was saved.
        target: folder with the checkpoint's files.

    Returns:
        How many were renamed.
    """
    there = scan(map(str, checkpoint_files(target)))
    expected = model.state_dict()
    sources: dict[str, list[str]] = defaultdict(list)
    for key, (name, converted) in model_names(model, inventory.loaded, expected).items():
        sources[name] += [] if converted else [key]
    renamed: dict[str, str] = {}
    for key, (name, converted) in model_names(model, there, expected).items():
        if not converted and len(sources[name]) == 1 and sources[name][0] not in (key, *there):
            renamed[key] = sources[name][0]
    for key, source in list(renamed.items()):  # scales beside codes
        (module, _, leaf), (other, _, same) = key.rpartition("."), source.rpartition(".")
        if leaf == same == "weight":
            beside = [one for one in there if one.startswith(f"{module}.{leaf}_") and one not in renamed]
            renamed.update({one: other + one.removeprefix(module) for one in beside})
    done: set[str] = set()
    try:
        for file in sorted({there[key].file for key in renamed}):
            rename_tensors(Path(file), renamed)
            done.add(file)
    finally:  # the index says what the files hold, even where the disk became full on the way
        index = target / "model.safetensors.index.json"
        if done and index.is_file():
            files = read_json(index)["weight_map"]
            now = {key: renamed[key] for key in renamed if there[key].file in done}
            write_index(target, {now.get(key, key): file for key, file in files.items()})
    return len(renamed)
