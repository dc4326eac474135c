"""vLLM speculates with the layers for multi-token prediction that a quantized folder keeps, or has packed too."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_stand_ins
import pytest
import torch
from engines import PROMPTS, Generated, check_equal, engine, generate, run
from expected import check, expected
from rows import ROWS

from bitsmoe_modifier.errors import CheckpointError
from published import stored_tensors

pytestmark = pytest.mark.vllm

_SPECULATE: dict[str, Any] = {
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 1},
    "disable_log_stats": False,
}
#: Of the proposals in bfloat16, where rounding may turn some over: prompts are chosen for the model's tokens, not the
#: draft's. When this was written all agreed.
_AGREEING = 0.75


@dataclass(frozen=True)
class Speculated:
    """Continuations, every token proposed on the way (in the order of the steps), and how many of them stayed."""

    continuations: list[Generated]
    proposals: list[int]
    accepted: int


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cpu_stand_ins.install(patch)
        yield


def drafter(llm: Any) -> Any:
    """What proposes tokens, in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter


def note_proposals(llm: Any) -> list[int]:
    """The list that every proposed token will be appended to."""
    noted: list[int] = []
    proposing, propose = drafter(llm), drafter(llm).propose

    def noting(*args: Any, **named: Any) -> torch.Tensor:
        proposed = propose(*args, **named)
        noted.extend(proposed.flatten().tolist())
        return proposed

    proposing.propose = noting
    return noted


def accepted(llm: Any) -> int:
    """Tokens that were proposed and stayed."""
    return next(one.value for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_accepted_tokens")


def check_draft(model: torch.nn.Module, folder: Path, packed: bool) -> None:
    """Its experts are packed as the folder has them, or not at all."""
    from bitsmoe_modifier.serving.diversion import packed_layers
    from bitsmoe_modifier.serving.method import BitsMoEMethod

    layers = list(packed_layers(model, BitsMoEMethod).values())
    assert len(layers) == int(packed)
    for _, layer in layers:
        prefix = f"{layer.layer_name}."
        stored = {n.removeprefix(prefix): t for n, t in stored_tensors(folder).items() if n.startswith(prefix)}
        held = layer.packed.state_dict()
        assert held
        for name, tensor in held.items():
            assert torch.equal(tensor, stored[name]), name


def cases() -> list[object]:
    fast = ("glm4_moe+quantize",)
    kinds = ("qwen3_next", "qwen3_5_moe", "glm4_moe")
    published = [f"{kind}+{treatment}" for kind in kinds for treatment in ("keep", "quantize")]
    return [pytest.param(one, id=one, marks=() if one in fast else pytest.mark.slow) for one in published]


def speculate(folder: Path, packed: bool, prompts: list[list[int]], **settings: Any) -> Speculated:
    """Greedy continuations by an engine that speculates, whose draft model's experts have to be packed or not."""
    with engine(folder, **settings, **_SPECULATE) as llm:
        check_draft(drafter(llm).model, folder, packed)
        proposals = note_proposals(llm)
        return Speculated(generate(llm, prompts), proposals, accepted(llm))


@pytest.mark.parametrize("published", cases())
def test_the_same_tokens_with_speculation(published: str, quantized: Callable[[str], Path]) -> None:
    kind, _, treatment = published.partition("+")
    folder, row = quantized(published), next(row for row in ROWS if row.model_type == kind)
    settings = {"dtype": row.dtype, "skip_tokenizer_init": not row.has_tower, **row.settings}
    exact = row.dtype == "float32"
    wanted: Any = run(folder, **settings) if exact else expected(folder, row.dtype)
    prompts = PROMPTS if exact else wanted.prompts

    found = speculate(folder, treatment == "quantize", prompts, **settings)
    (check_equal if exact else check)(found.continuations, wanted)
    assert 0 <= found.accepted < len(found.proposals)

    decoded = speculate(folder.with_name("decoded"), False, prompts, **settings)
    agreeing = sum(map(int.__eq__, found.proposals, decoded.proposals))
    assert len(found.proposals) == len(decoded.proposals)
    assert agreeing >= (1 if exact else _AGREEING) * len(found.proposals)


@pytest.mark.slow
def test_speculation_without_the_layer_is_refused(quantized: Callable[[str], Path]) -> None:
    folder = quantized("qwen3_next+drop")
    with (
        pytest.raises(CheckpointError, match=r"holds a layer for Qwen3NextMTP to speculate with.*--mtp keep"),
        engine(folder, dtype="bfloat16", **_SPECULATE),
    ):
        pass
