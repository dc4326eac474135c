"""Entries of a comparison's report, as `compare` returns them, for tests of what is made of them."""


def arm(name: str, bits: float, kld: float, kind: str = "GPTQModifier", nominal: float | None = None, **more) -> dict:
    return {
        "name": name,
        "modifiers": [kind],
        "nominal_bits": nominal if nominal is not None else float(int(bits)),
        "measured_bits_per_expert_weight": bits,
        "checkpoint_bytes": int(bits * 1e6),
        "quantize_seconds": 10.0,
        "peak_memory_bytes": 2_000_000,
        "perplexity": 10 + kld,
        "kld_mean": kld,
        "kld_median": kld / 2,
        "kld_p90": 2 * kld,
        "kld_stderr": 1e-5,
        "top1_agreement": 1 - kld,
        "bits_apart": {"codes": bits - 0.1, "bases": 0.1, "metadata": 0.0},
        **more,
    }


def ours(name: str, bits: float, kld: float, **more) -> dict:
    return arm(name, bits, kld, kind="BitsMoEModifier", nominal=bits, **more)


GPTQ = [arm("gptq_w2", 2.129, 0.055), arm("gptq_w3", 3.129, 0.0101), arm("gptq_w4", 4.129, 0.003)]
FAILED = {
    "name": "broken",
    "modifiers": ["X"],
    "nominal_bits": 2,
    "error": "ValueError: no",
    "log": "logs/broken.log",
}
REFERENCE = {
    "name": "unquantized",
    "measured_bits_per_expert_weight": 16.0,
    "checkpoint_bytes": 16_000_000,
    "perplexity": 10.0,
    "kld_mean": 0.0,
    "kld_median": 0.0,
    "kld_p90": 0.0,
    "top1_agreement": 1.0,
    "tokens": 1234,
}


def report(arms: list[dict]) -> dict:
    return {
        "version": 1,
        "command": "bitsmoe compare --model m",
        "environment": {"packages": {"torch": "2"}, "python": "3.11", "cpu": "a cpu", "threads": 2, "device": "cpu"},
        "model": {"name": "/somewhere/bookmoe"},
        "calibration": {"source": "c.txt", "rows": 128, "seq_len": 256, "seed": 0, "all_experts": False},
        "evaluation": {"source": "e.txt", "rows": 64, "seq_len": 256},
        "compute": {"device": "cpu", "dtype": "float32"},
        "reference": REFERENCE,
        "noise_floor": {"how": "run again in bfloat16", "rows": 32, "kld_mean": 0.0002},
        "arms": arms,
    }
