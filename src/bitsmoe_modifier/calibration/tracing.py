"""Causal attention, and towers without images, in llm-compressor's sequential pipeline.

llm-compressor 0.14 traces models under eager attention. Where a model picks its mask function by a variable, as
Qwen3-MoE and Mixtral do, the trace calls `create_causal_mask` with a config that it rebuilds from ``config.to_dict()``.
That leaves out the attention implementation, for which transformers then makes no mask; eager attention takes no mask
for full attention, and calibration, GPTQ's included, lets every token see the whole row: on a tiny Qwen3-MoE the
experts' inputs are off by 20 %. `install` makes rebuilt configs keep the implementation.

A trace leaves a copy of every namespace that it compiled a forward in, the model in it, with torch.fx; `install` takes
them back, or a process would hold the model of every run that it made.

It also keeps what merges image features into a text from being traced: MiniMax-M3's function for it looks whether there
are any images, which a trace cannot know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmcompressor.pipelines.sequential import helpers
from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from torch.fx import _symbolic_trace
from transformers import PreTrainedConfig

_UNTRACED = ("get_placeholder_mask",)


def install() -> None:
    """Make traced graphs rebuild configs with their attention implementation; does nothing the second time."""
    original = SequentialTracer.create_arg
    if getattr(original, "keeps_attention", False):
        return

    def create_arg(tracer: SequentialTracer, value: Any) -> Any:
        made: Any = original(tracer, value)
        if isinstance(value, PreTrainedConfig):
            made.kwargs = {**made.kwargs, "attn_implementation": value._attn_implementation}
        return made

    autowrap: Any = helpers.autowrap_forwards

    @contextmanager
    def autowrap_forwards(ancestors: Any, ignore: list[str]) -> Iterator[None]:
        wrapped = _symbolic_trace._wrapped_fns_to_patch
        before = set(wrapped)
        try:
            with autowrap(ancestors, [*ignore, *_UNTRACED]):
                yield
        finally:
            for key in wrapped.keys() - before:
                del wrapped[key]

    create_arg.keeps_attention = True  # type: ignore[attr-defined]
    helpers.autowrap_forwards = autowrap_forwards  # type: ignore[assignment]
    SequentialTracer.create_arg = create_arg  # type: ignore[method-assign, assignment]


install()
