"""What a shared basis costs per expert weight, by the shape of the model: a table for docs/quality.md.

    python benchmarks/basis_cost.py

A basis of a layer has H × H entries and serves 3·E·I·H weights, so at b bits it costs b / (3·E·I/H), whatever the
budget: next to nothing where many experts share it, a third of a bit in a model with few. Computed by the function by
which recipes are refused whose budget is too small.
"""

from dataclasses import replace

from bitsmoe_modifier.calibration.targets import least_bits
from bitsmoe_modifier.method.layer import QuantizerSettings

#: experts, hidden size, expert size, as in the models' config.json
MODELS = {
    "gpt-oss-120b": (128, 2880, 2880),
    "Qwen3-Next-80B-A3B": (512, 2048, 512),
    "DeepSeek-V3": (256, 7168, 2048),
    "Qwen3-30B-A3B": (128, 2048, 768),
    "Qwen3-235B-A22B": (128, 4096, 1536),
    "DeepSeek-V2-Lite": (64, 2048, 1408),
    "OLMoE-1B-7B": (64, 2048, 1024),
    "Mixtral-8x7B": (8, 4096, 14336),
    "Llama-4-Scout": (16, 5120, 8192),
    "bookmoe": (64, 256, 128),
    "`exact` of real weights": (38, 896, 128),
    "`carved` of real weights": (28, 896, 128),
}


def cost(experts: int, hidden: int, width: int, basis_bits: int) -> float:
    """Bits per expert weight of one basis."""
    without = QuantizerSettings(bits=2.0, basis_bits=basis_bits, input_basis="none", output_basis="none")
    with_one = replace(without, input_basis="spectral")
    return least_bits(experts, hidden, width, with_one) - least_bits(experts, hidden, width, without)


def main() -> None:
    """Print the table."""
    print("| model | E | H | I | E·I/H | one basis of 4 bits | of 8 | of 16 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (experts, hidden, width) in MODELS.items():
        costs = " | ".join(f"{cost(experts, hidden, width, bits):.3f}" for bits in (4, 8, 16))
        print(f"| {name} | {experts} | {hidden} | {width} | {experts * width / hidden:.1f} | {costs} |")


if __name__ == "__main__":
    main()
