"""The matrix on the newest transformers, where no llm-compressor runs: `make test-newest`.

Checkpoints of every family that the version of `make test` packed (`make_packed.py`) give the logits that they gave
there; the families that came since then are packed, saved and loaded here.
"""

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from building import Family, model_of
from comparing import insert
from compressed_tensors.quantization import QuantizationConfig
from models_page import current_newest_rows, newest_rows
from newest_families import BROKEN, CHANGED, NEWEST_FAMILIES
from safetensors.torch import load_file
from text_families import TEXT_FAMILIES
from transformers import CONFIG_MAPPING, PreTrainedModel
from wrapper_families import WRAPPER_FAMILIES

from bitsmoe_modifier.errors import BitsMoEError
from bitsmoe_modifier.loading.quantizer import experts_sizes
from bitsmoe_modifier.method.gating import gating_of
from bitsmoe_modifier.sources.classes import build_published
from bitsmoe_modifier.sources.companions import let_save
from helpers import experts_names, load, logits, pack_randomly, packed_modules

#: folder of what `make_packed.py` wrote
PACKED = Path(os.environ.get("BITSMOE_FAMILIES", Path(__file__).parents[2] / "build" / "families"))
#: how far apart float32 logits of two versions of transformers may be, of the largest of them: eight roundings. Each
#: version adds in an order of its own, and for which families that shows depends on the processor.
ROUNDING = 1e-6
BOTH = [family for family in (*WRAPPER_FAMILIES, *TEXT_FAMILIES) if not family.refusal]

pytestmark = pytest.mark.skipif(
    NEWEST_FAMILIES[0].model_type not in CONFIG_MAPPING, reason="of the newest transformers: make test-newest"
)


def names_of(family: Family) -> str:
    """The test's name."""
    return family.model_type


@pytest.mark.parametrize("family", BOTH, ids=names_of)
def test_what_another_version_packed_gives_the_same_logits(family: Family) -> None:
    assert (PACKED / "ready").exists(), f"{PACKED} is not complete; run make test-newest"
    model = load(PACKED / family.model_type)
    assert len(packed_modules(model)) == 2
    if family.model_type in BROKEN:
        for one in (model, model_of(family)):
            with pytest.raises(AttributeError, match=BROKEN[family.model_type]):
                logits(one)
        return
    made = load_file(PACKED / f"{family.model_type}.logits")["logits"]
    computed = logits(model)
    if family.model_type in CHANGED:
        made = logits(dense_twin(model))
        limit = 1e-4
    else:
        limit = ROUNDING
    torch.testing.assert_close(computed, made, rtol=0, atol=limit * float(made.abs().max()))


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers builds it, with the weights that a packed one stands for."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    dense = build_published(config, dtype=model.dtype).eval()
    packed = packed_modules(model)
    others = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(f"{name}." for name in packed))}
    missing, unexpected = dense.load_state_dict(others, strict=False)
    assert not unexpected
    assert all(name.startswith(tuple(packed)) for name in missing)
    for name, module in packed.items():
        insert(dense.get_submodule(name), *module.dense_weights())
    return dense


def save_here(model: PreTrainedModel, folder: Path) -> None:
    """Save a packed model as llm-compressor would: its tensors, and their group in config.json."""
    let_save(model)
    model.save_pretrained(folder)
    groups = {"group_0": next(iter(packed_modules(model).values())).quantization_scheme}
    scheme = QuantizationConfig(config_groups=groups, format="bitsmoe", quantization_status="compressed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**scheme.model_dump(mode="json"), "quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", [one for one in NEWEST_FAMILIES if not one.refusal], ids=names_of)
def test_a_family_that_is_new_here(family: Family, tmp_path: Path) -> None:
    """Packed, saved, loaded: the same logits, bit for bit; and the dense model's with the weights that are stored."""
    model, dense = model_of(family), model_of(family)
    names = experts_names(model)
    pack_randomly(model)
    before = logits(model)
    save_here(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert list(packed_modules(loaded)) == names
    assert torch.equal(logits(loaded), before)
    for name, module in packed_modules(loaded).items():
        insert(dense.get_submodule(name), *module.dense_weights())
    expected = logits(dense)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", [one for one in NEWEST_FAMILIES if one.refusal], ids=names_of)
def test_a_new_family_that_cannot_be_packed_is_named(family: Family) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(family)
    experts = model.get_submodule(experts_names(model)[0])
    with pytest.raises(BitsMoEError, match=f"{type(experts).__name__}.*{family.refusal}"):
        experts_sizes(experts), gating_of(experts)


def test_rows_of_the_page_are_current() -> None:
    """newest_rows.json is what `python tests/families/models_page.py --newest` writes."""
    assert newest_rows() == current_newest_rows()
