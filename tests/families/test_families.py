"""Every MoE family of transformers: quantize its folder with `oneshot`, save, load, same logits.

A family is quantized under the class that its checkpoints are published with, towers for images and sound included.

One of the two MoE layers may be left dense, which goes through another path of saving and loading. Nothing but the
experts of packed layers may change; that includes shared experts, dense layers, routers and norms.
"""

import warnings
from pathlib import Path

import pytest
import torch
from building import Family, model_of
from comparing import insert
from llmcompressor import oneshot
from models_page import FAMILIES, current_page, page
from transformers import AutoTokenizer, PreTrainedModel

from bitsmoe_modifier import BitsMoEModifier, RecipeError
from helpers import calibration, experts_names, load, logits, pack_randomly, packed_modules, save, save_tokenizer

WORKING = [family for family in FAMILIES if not family.refusal]
REFUSED = [family for family in FAMILIES if family.refusal]


def rows(families: list[Family]) -> list[object]:
    """Test parameters; those that are not fast are slow."""
    return [
        pytest.param(family, id=family.model_type, marks=() if family.fast else pytest.mark.slow) for family in families
    ]


def quantize(family: Family, folder: Path, dtype: torch.dtype, **fields: object) -> PreTrainedModel:
    """Save a dense model under ``folder/dense`` and a quantized one under ``folder/packed``; return the latter."""
    model_of(family, dtype).save_pretrained(folder / "dense")
    save_tokenizer(folder / "dense")
    modifier = BitsMoEModifier(
        bits=6.0, group_size=16, block_size=16, scope="layer", solver="lagrangian", refine_passes=0, **fields
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oneshot(
            model=str(folder / "dense"),
            processor=AutoTokenizer.from_pretrained(folder / "dense"),
            dataset=calibration(),
            recipe=[modifier],
            moe_calibrate_all_experts=False,
            output_dir=folder / "packed",
        )


def check_unchanged(before: PreTrainedModel, after: PreTrainedModel, packed: list[str]) -> None:
    """Every tensor outside the packed modules is what it was, bit for bit."""
    stored = after.state_dict()
    others = {n: t for n, t in before.state_dict().items() if not any(n.startswith(f"{name}.") for name in packed)}
    # the layers left dense are lists of MLPs in a quantized Llama 4; its logits tell whether they are the same
    missing = [name for name in others if name not in stored and not name.startswith(tuple(experts_names(before)))]
    assert not missing
    assert not [name for name, tensor in others.items() if name in stored and not torch.equal(tensor, stored[name])]


@pytest.mark.parametrize("dense_layer", [False, True], ids=["whole", "one layer dense"])
@pytest.mark.parametrize("family", rows(WORKING))
def test_family(family: Family, dense_layer: bool, tmp_path: Path) -> None:
    dense = model_of(family)
    names = experts_names(dense)
    assert len(names) >= 2
    ignore = [names[1]] if dense_layer else []
    model = quantize(family, tmp_path, torch.float32, ignore=ignore)
    loaded = load(tmp_path / "packed")
    assert list(packed_modules(loaded)) == list(packed_modules(model)) == names[: 2 - len(ignore)]
    computed, before = logits(loaded), logits(model)
    if dense_layer:  # its tensors are equal (below), but lie in memory otherwise: products may differ in the last bit
        torch.testing.assert_close(computed, before, rtol=0, atol=1e-6 * float(before.abs().max()))
    else:
        assert torch.equal(computed, before)
    check_unchanged(dense, loaded, list(packed_modules(loaded)))

    # the dense model with the weights that are stored computes the same, up to float32 rounding
    for name, module in packed_modules(loaded).items():
        error = insert(dense.get_submodule(name), *module.dense_weights())
        assert 0 < error < 0.7, "weights in another order or transposed would be √2 away"
    expected = logits(dense)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_bfloat16_norms_with_an_offset_keep_their_weights(tmp_path: Path) -> None:
    """llm-compressor adds 1 to them for calibration and takes it away again, which bfloat16 does not survive."""
    family = next(family for family in WORKING if family.model_type == "qwen3_next")
    quantize(family, tmp_path, torch.bfloat16)
    loaded, dense = load(tmp_path / "packed"), load(tmp_path / "dense")
    norms = [name for name in dense.state_dict() if "norm" in name]
    assert norms
    assert all(torch.equal(loaded.state_dict()[name], dense.state_dict()[name]) for name in norms)


def test_another_dtype_than_the_files(tmp_path: Path) -> None:
    """Of Nemotron-H, transformers renames the first parameter, whose dtype is the model's by its own account."""
    model = model_of(next(family for family in WORKING if family.model_type == "nemotron_h"), torch.bfloat16)
    pack_randomly(model, ungated=True)
    wide = load(save(model, tmp_path), dtype=torch.float32)
    assert {p.dtype for n, p in wide.named_parameters() if ".experts." not in n} == {torch.float32}
    assert bool(torch.isfinite(logits(wide)).all())


@pytest.mark.parametrize("family", rows(REFUSED))
def test_refused_family_is_named(family: Family, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"model_type {family.model_type}.* is not supported.*{family.refusal}"):
        quantize(family, tmp_path, torch.float32)


def test_page_is_current() -> None:
    """docs/models.md is what `python tests/families/models_page.py` writes."""
    assert page() == current_page()
