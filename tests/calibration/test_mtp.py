"""Experts of layers for multi-token prediction, packed on request: DeepSeek-V3's spelling and Qwen3-Next's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from torch import nn

from bitsmoe_modifier import BitsMoEModifier, RecipeError
from bitsmoe_modifier.calibration.mtp import run_mtp
from bitsmoe_modifier.calibration.mtp_layers import MtpModule, find_mtp_layers, like
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.loading.inventory import take_inventory
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.packed import PackedExperts
from helpers import calibration, load, packed_modules, tiny_config, tiny_model
from published import publish, stored_tensors
from tiny_text import write_text

QWEN = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
}
SPELLINGS = {
    "deepseek_v3": ("model.layers.3", ("enorm", "hnorm", "eh_proj")),
    "qwen3_next": ("mtp.layers.0", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc")),
}


def dense_model(kind: str) -> Any:
    """A tiny model with one MTP layer in its config."""
    if kind == "deepseek_v3":
        return tiny_model(kind, num_nextn_predict_layers=1)
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {k: v for k, v in tiny_config("qwen3_moe").to_dict().items() if k in COMMON}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **QWEN}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
COMMON += ("max_position_embeddings", "num_experts_per_tok", "tie_word_embeddings", "bos_token_id", "eos_token_id")


def mtp_layer(model: Any) -> tuple[nn.Module, dict[str, torch.Tensor], list[torch.Tensor]]:
    """A decoder layer with weights of its own, its tensors as they are published, and what makes its input."""
    torch.manual_seed(1)
    number = len(model.model.layers) - 1
    block = type(model.model.layers[number])(model.config, number).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    tensors = {}
    for name, tensor in block.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, rows in enumerate(tensor):
                for leaf, half in zip(("gate", "up"), rows.chunk(2), strict=True):
                    tensors[f"mlp.experts.{expert}.{leaf}_proj.weight"] = half.contiguous()
        elif name.endswith("experts.down_proj"):
            tensors |= {f"mlp.experts.{e}.down_proj.weight": rows.contiguous() for e, rows in enumerate(tensor)}
        else:
            tensors[name] = tensor.clone()
    hidden = model.config.hidden_size
    return block, tensors, [torch.randn(hidden), torch.randn(hidden), torch.randn(hidden, 2 * hidden) / 10]


def published(kind: str, folder: Path) -> tuple[Path, Any, nn.Module, list[torch.Tensor]]:
    """A folder of a model with its MTP layer, the model, the layer and what makes its input."""
    model = dense_model(kind)
    block, tensors, inputs = mtp_layer(model)
    prefix, names = SPELLINGS[kind]
    root = prefix if kind == "deepseek_v3" else "mtp"
    beside = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
    beside |= {f"{root}.{name}.weight": tensor for name, tensor in zip(names, inputs, strict=True)}
    last = "shared_head.norm" if kind == "deepseek_v3" else "norm"
    beside[f"{root}.{last}.weight"] = torch.ones(model.config.hidden_size)
    return publish(model, folder, beside), model, block, inputs


def norm(kind: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The family's norm, written out: Qwen3-Next's has its weight about zero."""
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return scaled * (weight + 1.0 if kind == "qwen3_next" else weight)


@pytest.mark.parametrize("kind", SPELLINGS)
def test_experts_get_what_the_published_formula_gives(kind: str, tmp_path: Path) -> None:
    folder, model, block, (enorm, hnorm, projection) = published(kind, tmp_path / "source")
    batch = {"input_ids": torch.randint(100, (3, 12)), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    batch["attention_mask"][1, 9:] = 0
    captured: list[list[Any]] = [[]]
    inventory = take_inventory(model, folder)
    (layer,) = find_mtp_layers(inventory)
    number = like(model, layer)
    with torch.no_grad():
        run_mtp(model, batch, [(number, MtpModule(model, layer, number))], captured)

        out = model.model(**batch)
        eps = model.config.rms_norm_eps
        embedded = model.model.embed_tokens(batch["input_ids"])[:, 1:]
        hidden = out.last_hidden_state[:, :-1]
        x = torch.cat([norm(kind, embedded, enorm, eps), norm(kind, hidden, hnorm, eps)], -1) @ projection.T
        positions = model.model.rotary_emb(x, torch.arange(11)[None])
        mask = torch.full((11, 11), -1e9).triu(1)[None, None].repeat(3, 1, 1, 1)
        mask[1, :, :, 9:] = -1e9
        seen: list[torch.Tensor] = []
        block.mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        block(x, attention_mask=mask, position_ids=torch.arange(11)[None], position_embeddings=positions)
    # the tokens that have a next one: 11 of two rows, 8 of the row that ends after nine
    expected = seen[0].view(3, 11, -1)
    expected = torch.cat([expected[0], expected[1, :8], expected[2]])
    torch.testing.assert_close(captured[0][0][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
def test_experts_are_read_in_both_spellings(fused: bool, tmp_path: Path) -> None:
    """Qwen3-Next publishes three matrices per expert, Qwen3.5 two tensors for all of them."""
    model = dense_model("qwen3_next")
    block, tensors, inputs = mtp_layer(model)
    names = [f"mtp.{name}.weight" for name in SPELLINGS["qwen3_next"][1]]
    beside = {
        f"mtp.layers.0.{name}": tensor for name, tensor in tensors.items() if not fused or ".experts." not in name
    }
    if fused:
        beside |= {f"mtp.layers.0.mlp.experts.{n}": t.detach().clone() for n, t in block.mlp.experts.named_parameters()}
    folder = publish(model, tmp_path / "source", beside | dict(zip(names, inputs, strict=True)))
    (layer,) = find_mtp_layers(take_inventory(model, folder))
    assert layer.fused is fused
    assert (layer.num_experts, *layer.sizes) == (8, 64, 32)
    number = like(model, layer)
    assert model.config.layer_types[number] == "full_attention"
    built = MtpModule(model, layer, number)
    for name, tensor in block.state_dict().items():
        assert torch.equal(built.block.state_dict()[name], tensor), name


def check_packed(kind: str, folder: Path, source: Path, block: nn.Module) -> None:
    """The checkpoint holds the layer packed, near its weights, everything else of it as it was, and loads."""
    before, after = stored_tensors(source), stored_tensors(folder)
    prefix = f"{SPELLINGS[kind][0]}.mlp.experts."
    packed = {key.removeprefix(prefix): tensor for key, tensor in after.items() if key.startswith(prefix)}
    assert set(packed) <= {"layout", *PackedExperts.__dataclass_fields__}
    experts = BitsMoEExperts(PackedExperts(**packed), packed_modules(load(folder)).popitem()[1].gating)
    for made, own in zip(
        experts.dense_weights(), (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj), strict=True
    ):
        assert 0 < float((made - own.detach()).norm() / own.detach().norm()) < 0.7, "in another order it would be √2"
    others = [key for key in before if not key.startswith(prefix) and key.startswith((prefix.split(".mlp")[0], "mtp."))]
    assert len(others) > 8
    assert all(torch.equal(before[key], after[key]) for key in others)


@pytest.mark.parametrize("kind", SPELLINGS)
def test_oneshot_on_a_folder_packs_them(kind: str, tmp_path: Path) -> None:
    source, _, block, _ = published(kind, tmp_path / "source")
    (source / "generation_config.json").unlink()  # transformers cannot save it, llm-compressor has it saved
    out = tmp_path / "out"
    fields = {"bits": 6.0, "block_size": 16, "scope": "layer", "solver": "lagrangian", "refine_passes": 0}
    oneshot(
        model=str(source),
        dataset=calibration(vocab=30),
        recipe=[BitsMoEModifier(**fields, mtp="quantize")],
        output_dir=out,
        moe_calibrate_all_experts=False,
    )
    check_packed(kind, out, source, block)


def test_the_command_line_packs_inspects_and_exports_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, model, block, _ = published("deepseek_v3", tmp_path / "source")
    recipe, out, back = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "back"
    recipe.write_text("quant_stage: {quant_modifiers: {BitsMoEModifier: {bits: 4.0, group_size: 16, block_size: 16}}}")
    text = write_text(tmp_path / "text.txt", 4000, seed=0)
    arguments = ["quantize", "--model", source, "--recipe", recipe, "--calibration", text, "--out", out]
    arguments += ["--samples", "16", "--seq-len", "32", "--mtp", "quantize"]
    assert main([str(argument) for argument in arguments]) == 0
    check_packed("deepseek_v3", out, source, block)
    noted = json.loads((out / "bitsmoe_report.json").read_text())
    report = noted["layers"]["model.layers.3.mlp.experts"]
    assert sum(report["tokens_per_expert"]) == 16 * 31 * model.config.num_experts_per_tok
    assert 3.0 < report["bits"] <= 4.0
    assert "MB of their experts, packed" in (out / "README.md").read_text()
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "model.layers.3.mlp.experts" in capsys.readouterr().out

    assert main(["export", str(out), "--to", "dense", "--out", str(back), "--dtype", "float32"]) == 0
    before, after, packed = stored_tensors(source), stored_tensors(back), stored_tensors(out)
    assert set(after) == set(before)
    experts = BitsMoEExperts(
        PackedExperts(
            **{key.rpartition(".")[2]: t for key, t in packed.items() if key.startswith("model.layers.3.mlp.experts.")}
        ),
        packed_modules(load(out)).popitem()[1].gating,
    )
    gate_up, down = experts.dense_weights()
    for e in range(8):
        where = f"model.layers.3.mlp.experts.{e}"
        assert torch.equal(after[f"{where}.gate_proj.weight"], gate_up[e, :32])
        assert torch.equal(after[f"{where}.up_proj.weight"], gate_up[e, 32:])
        assert torch.equal(after[f"{where}.down_proj.weight"], down[e])


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    source, model, *_ = published("deepseek_v3", tmp_path / "source")
    (source / "generation_config.json").unlink()
    modifier = BitsMoEModifier(bits=6.0, block_size=16, scope="layer", mtp="quantize")
    with pytest.raises(RecipeError, match="needs the folder that the model was loaded from"):
        oneshot(model=load(source), dataset=calibration(vocab=30), recipe=[modifier])
    inventory = take_inventory(model, source)
    strange = {k.replace("eh_proj", "mixing"): s for k, s in inventory.beside.items()}
    renamed = replace(inventory, beside=strange, mtp=frozenset(strange))
    with pytest.raises(RecipeError, match=r"how the input of model\.layers\.3 is made"):
        find_mtp_layers(renamed)
    strange = {k: s for k, s in inventory.beside.items() if "q_a_proj" not in k}
    (layer,) = find_mtp_layers(replace(inventory, beside=strange, mtp=frozenset(strange)))
    with pytest.raises(RecipeError, match=r"none has its tensors \(different: self_attn\.q_a_proj\.weight\)"):
        like(model, layer)
