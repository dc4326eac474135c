"""Write docs/models.md from the matrix: ``python tests/families/models_page.py``. The models are built on meta.

The rows of families that only a newer transformers has are in newest_rows.json, which the same command with
``--newest`` writes where that version is (`make test-newest` says when they are out of date).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
from building import Family, config_of
from newest_families import BROKEN, CHANGED, NEWEST_FAMILIES, NORMALIZED, SOFTCAPPED
from others import OTHERS
from text_families import TEXT_FAMILIES
from wrapper_families import WRAPPER_FAMILIES

from bitsmoe_modifier.method.gating import Gating, gating_of
from bitsmoe_modifier.sources.classes import auto_class_of, build_published
from helpers import experts_names

#: the families that the installed transformers has
FAMILIES = (
    *WRAPPER_FAMILIES,
    *TEXT_FAMILIES,
    *(family for family in NEWEST_FAMILIES if family.model_type in CONFIG_MAPPING),
)

_PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_ROWS = Path(__file__).with_name("newest_rows.json")
_HEAD = """# Models

<!-- Written by `python tests/families/models_page.py` from the test matrix in tests/families; do not edit. -->

Look for your model's `model_type` (in its config.json): what is in the first table can be quantized, saved and loaded.
Models that are [refused](#refused) are named below it, and those that need a
[newer transformers](#with-the-newest-transformers). What vLLM serves is another table ([serving](serving.md#families)).

Every family in the table is tested with a tiny random model of the class that its checkpoints are published with,
towers for images and sound included: its folder is quantized by `oneshot`, saved, and loaded through the auto class in
the table. The logits after loading are bit for bit those before saving. The unquantized model with the dequantized
weights put into it gives the same up to float32 rounding. Every tensor outside the packed experts (shared experts,
dense layers, routers, norms, towers) is bit for bit what it was, and so is a MoE layer that the recipe ignores.
`make test` runs the rows marked ·, `make test-slow` all.

"""
_REFUSED = """
## Refused

These are refused before calibration, by name. Together with the table above they are every module of transformers
{version} that has routed experts (`tests/families/test_matrix.py` looks for them in its source):

"""
_NEWEST = """
## With the newest transformers

llm-compressor 0.14 holds transformers back, so quantization runs with {version}; checkpoints are loaded, measured and
exported with newer versions too. `make test-newest` runs with transformers {newest}: a checkpoint of every family in
the first table, packed with {version}, is loaded there and gives the same logits up to float32 rounding, {exceptions}.

The test of completeness runs on its source too. These families came in between; they are packed at random, saved and
loaded there, with equal logits, and cannot be quantized before llm-compressor takes a transformers that has them:

"""
_NEWEST_REFUSED = """
Of those that came in between, packed experts cannot take the place of:

"""
_SOURCES = """
## What is published beside the experts

- **Towers.** A folder is loaded as the class that its config.json names. `AutoModelForCausalLM` would leave out the
  vision tower of some families without a word. Calibration goes through the wrapper, on text by the command line, on
  images and text by `oneshot` with batches that hold `pixel_values` (tested for Qwen3-VL-MoE and Qwen3.5-MoE); an
  image's tokens are routed tokens like all others. Towers are not quantized.
- **Names of tensors** are those of the source's files, packed experts apart: of DeepSeek-V4's, transformers cannot
  turn all of its own back.
- **config.json** is the source's own, with the checkpoint's quantization in place of the source's: transformers saves
  published fields under other names, which vLLM's configurations of DeepSeek-V4, MiniMax-M3 or Step 3.7 do not know.
  Where transformers would not read the same model from it (a model that was changed in memory, or loaded as another
  class), what transformers saves stands there instead.
- **Processors** and every other file beside the weights are copied as they are. Where the packages that a processor
  needs are missing, the tokenizer stands in for it during calibration.
- **Layers for multi-token prediction** (`mtp.*`, `nextn`, decoder layers beyond the last), which transformers does not
  load, are kept bit for bit by default. `--mtp drop` (`mtp: drop` in a recipe) leaves them out; `--mtp quantize` packs
  their routed experts with the bits per weight of the others, calibrated on the same rows: the layer runs as a decoder
  layer of the model on `W [norm(embedding of the next token), norm(last hidden state)]`, after the other experts are
  packed. Read are the names of DeepSeek-V3 and GLM-4.x (`eh_proj`, `enorm`, `hnorm`) and of Qwen3-Next and Qwen3.5
  (`mtp.fc`, `mtp.pre_fc_norm_*`), where a decoder layer of the model has the same tensors; others are refused before
  calibration, by name. Tested on tiny DeepSeek-V3, GLM-4-MoE and Qwen3-Next models; vLLM speculates with kept and
  packed layers ([serving](serving.md)). Every tensor of the source is accounted for before a checkpoint appears.
- **Sources in low precision.** Block-FP8 (DeepSeek-V3), MXFP4 (gpt-oss, DeepSeek-V4) and compressed-tensors INT4, FP8,
  NVFP4 and MXFP4 (Kimi-K2) are taken as they are published: experts stay in the source's files and are decoded one at a
  time, and what is not quantized is stored as the source has it ([sources](sources.md)).
"""
_OTHER = {
    "is not a language model": "it is not a decoder that predicts the next token of a text",
    "no forward pass of its own": "its class has no forward pass, its parts call each other while they generate",
}
_NEWEST_REASONS = {
    NORMALIZED: "normalizes the output of each expert, which packed experts do not do",
    SOFTCAPPED: "caps gate and up softly (`c · tanh(x / c)`), a gating that this version does not know",
}
_TAIL = """
Which of them vLLM serves is another question: it needs a model class of its own there. [Serving](serving.md) says which
are tested.
"""


def page() -> str:
    """The whole page."""
    newest = json.loads(_ROWS.read_text(encoding="utf-8"))
    versions = {"version": transformers.__version__, "newest": newest["transformers"], "exceptions": _exceptions()}
    families = [family for family in FAMILIES if family not in NEWEST_FAMILIES]
    refused = [
        f"- `{family.model_type}` ({type(_build(family)).__name__}): {_reason(family)}"
        for family in families
        if family.refusal
    ]
    refused += [f"- `{model_type}`: {_OTHER[words]}" for model_type, words in OTHERS.values()]
    return "".join(
        [
            _HEAD,
            _table([_row(family) for family in families if not family.refusal]),
            _REFUSED.format(**versions),
            "".join(f"{line}\n" for line in refused),
            _NEWEST.format(**versions),
            _table(newest["rows"]),
            _NEWEST_REFUSED,
            "".join(f"{line}\n" for line in newest["refused"]),
            _SOURCES,
            _TAIL,
        ]
    )


def newest_rows() -> dict[str, Any]:
    """What newest_rows.json holds: of the families that came after the version of `make test`."""
    return {
        "transformers": transformers.__version__,
        "rows": [_row(family) for family in NEWEST_FAMILIES if not family.refusal],
        "refused": [
            f"- `{family.model_type}` ({type(_build(family)).__name__}): its experts class "
            + _NEWEST_REASONS[family.refusal]
            for family in NEWEST_FAMILIES
            if family.refusal
        ],
    }


def current_newest_rows() -> dict[str, Any]:
    """What newest_rows.json holds."""
    return json.loads(_ROWS.read_text(encoding="utf-8"))


def _exceptions() -> str:
    changed = "".join(f"\n- `{name}`, which computes otherwise, packed or not: {why}" for name, why in CHANGED.items())
    broken = "".join(
        f"\n- `{name}`, whose forward pass fails there, packed or not: no `{n}`" for name, n in BROKEN.items()
    )
    return f"but for\n{changed}{broken}"


def _table(rows: list[str]) -> str:
    head = "| | model_type | class | auto class | experts | stored by transformers | gating |\n" + "|---" * 7 + "|\n"
    return head + "".join(f"{row}\n" for row in rows)


def current_page() -> str:
    """What stands in docs/."""
    return _PAGE.read_text(encoding="utf-8")


def _build(family: Family) -> PreTrainedModel:
    with torch.device("meta"):
        return build_published(config_of(family))


def _row(family: Family) -> str:
    model = _build(family)
    name = experts_names(model)[0]
    experts = model.get_submodule(name)
    path = ".".join("N" if part.isdigit() else part for part in name.split("."))
    cells = (
        "·" if family.fast else "",
        family.model_type,
        type(model).__name__,
        auto_class_of(model.config).__name__,
        f"`{path}`",
        _stored(experts),
        _gating(gating_of(experts), getattr(experts, "has_gate", True)),
    )
    return f"| {' | '.join(cells)} |"


def _stored(experts: nn.Module) -> str:
    if not getattr(experts, "has_gate", True):
        return "[E, I, H], no gate"
    transposed = experts.gate_up_proj.shape[1:] != (2 * experts.down_proj.shape[2], experts.down_proj.shape[1])
    words = [
        "[E, H, 2I]" if transposed else "[E, 2I, H]",
        "gate and up alternate" if not getattr(experts, "is_concatenated", True) else "",
        "biases" if getattr(experts, "has_bias", False) else "",
    ]
    return ", ".join(word for word in words if word)


def _gating(gating: Gating, gated: bool) -> str:
    if not gated:
        return f"{gating.activation} of the one input projection"
    act = gating.activation + (f", slope {gating.alpha:g}" if gating.alpha != 1 else "")
    limit = f", clamped at {gating.limit:g}" if gating.limit is not None else ""
    return act + limit + (f", up + {gating.up_shift:g}" if gating.up_shift else "")


def _reason(family: Family) -> str:
    if "one list" in family.refusal:
        return "its checkpoints store the experts for text and for images in one list, of which no part can be packed"
    if "one matrix" in family.refusal:
        return "it keeps the rows of all its experts in one matrix, which llm-compressor cannot take apart"
    if "as it is" in family.refusal:
        return "its router also chooses experts that hand a token on as it is; packed experts have no such ones"
    if "next token" in family.refusal:
        return "it does not predict the next token of a text, which calibration needs"
    return "its experts class does not follow transformers' common experts interface, so it cannot be linearized"


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    if "--newest" in sys.argv:
        _write(_ROWS, json.dumps(newest_rows(), indent=1, ensure_ascii=False) + "\n")
    else:
        _write(_PAGE, page())
