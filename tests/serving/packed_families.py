"""Tiny checkpoints of any family with random packed experts, and the dense models that they stand for."""

import json
from pathlib import Path
from typing import Any

import torch
from building import model_of
from processors import add_processor
from rows import Row
from transformers import PreTrainedModel

from bitsmoe_modifier.checkpoints.export import fused_weights
from checkpoints import save_packed
from helpers import experts_names, logits, pack_randomly, packed_modules

#: of the random factors: large enough for the experts to say which token comes next
_GAIN = 15.0


def packed_family(row: Row, folder: Path, decoded: Path | None = None) -> None:
    """Write a random model of a family with random packed experts, and the dense model that it stands for."""
    model, dense = (model_of(row.family) for _ in range(2))
    for one in (model, dense):
        row.sharpen(one)
    experts = dense.get_submodule(experts_names(dense)[0])
    bias, ungated = hasattr(experts, "down_proj_bias"), not getattr(experts, "has_gate", True)
    pack_randomly(model, bias=bias, ungated=ungated, gain=_GAIN)
    for name, packed in packed_modules(model).items():
        fused = dense.get_submodule(name)
        for leaf, tensor in fused_weights(packed, fused, torch.float32).items():
            getattr(fused, leaf).data.copy_(tensor)
    _check_experts_matter(model)
    save_packed(model, folder)
    if decoded:
        dense.save_pretrained(decoded)
    for one in filter(None, (folder, decoded)):
        _publish(one / "config.json", row.published)
        if row.rewrite:
            row.rewrite(one)
        if row.has_tower:
            add_processor(one)


def _publish(path: Path, fields: dict[str, Any]) -> None:
    config = json.loads(path.read_text())
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            config[name].update(value)
        else:
            config[name] = value
    path.write_text(json.dumps(config))


@torch.no_grad()
def _check_experts_matter(model: PreTrainedModel) -> None:
    """A comparison of tokens shows nothing of experts that change none."""
    whole = logits(model)
    hooks = [e.register_forward_hook(lambda _, __, out: torch.zeros_like(out)) for e in packed_modules(model).values()]
    without = logits(model)
    for hook in hooks:
        hook.remove()
    assert (whole - without).std() > 0.02 * whole.std()  # some hundred times the tolerance
