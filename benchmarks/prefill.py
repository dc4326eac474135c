"""Prefill speed of one MoE layer: `python benchmarks/prefill.py --shape qwen3-30b-a3b --tokens 512,2048,8192`.

Time per layer, also with factors decoded in registers and with factors written out whatever the rule is
(`launch.WRITTEN_PAIRS`); achieved arithmetic rate (6 H I k operations per token, what the 16-bit layer computes); and
the ratio to the 16-bit grouped matrix product and to decoding every expert by PyTorch and then multiplying. See
layers.py for how times are taken.
"""

import argparse
import platform

import torch
from bitsmoe_kernels import launch
from layers import (
    SHAPES,
    Layer,
    Shape,
    dense_weights,
    grouped_layer,
    kernel_layer,
    markdown,
    routing,
    seconds_per_call,
    stored_layer,
)


def always(layer: Layer, written: bool) -> Layer:
    """The layer with factors written out, or never."""

    def call(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        rule = launch.WRITTEN_PAIRS
        launch.WRITTEN_PAIRS = dict.fromkeys(rule, 0 if written else ids.numel() + 1)
        try:
            return layer(x, ids, p)
        finally:
            launch.WRITTEN_PAIRS = rule

    return call


def run(shape: Shape, tokens: list[int], device: torch.device, repeats: int, codes: str = "trellis") -> str:
    """The table for one shape, with "trellis" or "scalar" codes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    packed = stored_layer(shape, codes, device, 0)
    ours, dense = kernel_layer(packed), grouped_layer(*dense_weights(packed, dtype))

    def decode_everything(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return grouped_layer(*dense_weights(packed, dtype))(x, ids, p)

    rows = []
    for count in tokens:
        x = torch.randn(count, shape.hidden, device=device, generator=torch.Generator(device=device).manual_seed(count))
        arguments = (x.to(dtype), *routing(shape, count, device, count))
        seconds = [
            seconds_per_call([lambda layer=layer, a=arguments: layer(*a)], repeats, device, graph)
            for layer, graph in (
                (ours, True),
                (always(ours, False), True),
                (always(ours, True), True),
                (dense, True),
                (decode_everything, False),
            )
        ]
        rate = 6 * shape.hidden * shape.inner * shape.top_k * count / seconds[0]
        row = [str(count), *(f"{taken * 1e3:.3f}" for taken in seconds[:3]), f"{rate / 1e12:.2f}"]
        rows.append(row + [f"{other / seconds[0]:.2f}" for other in seconds[3:]])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or 'CPU'}, plain path"
    header = [
        "tokens",
        "ms / layer",
        "in registers",
        "written out",
        "TFLOP/s",
        "bf16 / ours",
        "decode all, multiply / ours",
    ]
    return f"{where}, {codes} codes; medians of {repeats}\n\n{markdown(header, rows)}"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Prefill speed of one MoE layer.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", default="512,2048,8192", help="comma-separated numbers of tokens")
    parser.add_argument("--codes", choices=("trellis", "scalar"), default="trellis")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    with torch.inference_mode():
        tokens = [int(t) for t in options.tokens.split(",")]
        print(run(SHAPES[options.shape], tokens, torch.device(options.device), options.repeats, options.codes))


if __name__ == "__main__":
    main()
