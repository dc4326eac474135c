"""The model card (README.md) of a checkpoint: what it was made of, what it weighs, how good it is, how to use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.columns import table
from ..storage.records import write_text
from ..storage.sizes import expert_bytes, tensor_sizes
from .describe import describe

_LOAD = """```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def write_card(
    folder: Path, base_model: str, recipe: str, expert_weights: int, quality: Mapping[str, Any] | None = None
) -> None:
    """Write the checkpoint's README.md.

    Args:
        folder: of the checkpoint.
        base_model: the unquantized model as the user named it.
        recipe: YAML that was run.
        expert_weights: routed-expert weights of the unquantized model.
        quality: ``reference`` and ``arm``, entries of a comparison's report, and ``how``, a sentence; None where
            nothing was measured.
    """
    write_text(folder / "README.md", card(folder, base_model, recipe, expert_weights, quality))


def card(
    folder: Path, base_model: str, recipe: str, expert_weights: int, quality: Mapping[str, Any] | None = None
) -> str:
    """The card as Markdown with the hub's metadata; see `write_card`."""
    found = describe(folder)
    packed = bool(found["layers"])
    bits = 8 * expert_bytes(tensor_sizes(folder)) / expert_weights
    # a path means nothing on another machine, and may say more than it should
    shown = Path(base_model).name if Path(base_model).exists() else base_model
    metadata = ["library_name: transformers", "tags:", "- compressed-tensors", "- mixture-of-experts"]
    metadata += ["- bitsmoe"] if packed else []
    if shown == base_model:
        metadata = [f"base_model: {base_model}", "base_model_relation: quantized", *metadata]
    name = folder.name.removeprefix(".").removesuffix(".partial")
    size, total = found["bytes"], found["checkpoint_bytes"]
    sizes = (
        f"- {bits:.4f} bits per expert weight, everything stored counted\n"
        f"- {total / 1e6:.2f} MB: experts {size['experts'] / 1e6:.2f}, everything else {size['rest'] / 1e6:.2f}\n"
        f"- format: compressed-tensors, {found['format'] or 'not quantized'}"
    )
    if packed:
        sizes += f"\n- {len(found['layers'])} layers of {found['layers'][0]['experts']} packed experts"
    first = "import bitsmoe_modifier  # pip install bitsmoe-modifier: reads the packed experts\n" if packed else ""
    serve = '    pip install "bitsmoe-modifier[vllm]"\n' if packed else ""
    parts = [
        "---\n" + "\n".join(metadata) + "\n---",
        f"# {name}",
        f"{shown}, quantized by llm-compressor" + (" with BitsMoE Modifier." if packed else "."),
        f"## Size\n\n{sizes}",
        f"## Quality\n\n{_quality(quality)}",
        f"## Load\n\n{_LOAD.format(first=first, name=name)}",
        f"## Serve\n\n{serve}    vllm serve {name}",
        f"## Recipe\n\n```yaml\n{recipe.strip()}\n```",
    ]
    if packed:
        parts.append(f"`bitsmoe inspect {name}` shows widths, bases and tokens of every layer; `--html` draws them.")
    return "\n\n".join(parts) + "\n"


def _quality(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return "Not measured yet: `bitsmoe eval CHECKPOINT --model BASE --eval-text FILE` does."
    return f"{table(quality['reference'], [quality['arm']])}\n\n{quality['how']}"
