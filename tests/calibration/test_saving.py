"""What `oneshot` could not save is refused before calibration, and what it says meanwhile fits on a screen."""

import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llmcompressor import oneshot
from loguru import logger
from transformers import PreTrainedModel

from bitsmoe_modifier import BitsMoEModifier, RecipeError
from bitsmoe_modifier.calibration import patches
from bitsmoe_modifier.calibration.oneshot import _load
from bitsmoe_modifier.calibration.recipe_content import bitsmoe_modifiers, check_places
from bitsmoe_modifier.sources.model import load_tokenizer
from bitsmoe_modifier.storage.shards import checkpoint_files
from helpers import calibration, load, logits

FIELDS = {"bits": 3.0, "group_size": 16, "block_size": 16}
YAML = "a_stage: {q_modifiers: {BitsMoEModifier: {bits: 3.0}}}"


@pytest.mark.parametrize("recipe", ["modifier", "text"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_compressed": False}, "save_compressed=False: experts are packed when they are quantized"),
        ({"output_dir": "FILE/out"}, "output_dir=FILE/out: FILE cannot be written (Not a directory)"),
        ({"output_dir": "SOURCE/."}, "output_dir=SOURCE/. is the folder that the model comes from"),
    ],
    ids=["not-compressed", "no-folder", "the-model's-own"],
)
def test_saving_that_would_fail_is_refused(
    dense_checkpoint: Callable[..., Path], tmp_path: Path, options: dict[str, object], said: str, recipe: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    source = dense_checkpoint("qwen3_moe")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    given = {"output_dir": str(tmp_path / "out"), **options}
    given["output_dir"] = str(given["output_dir"]).replace("FILE", str(file)).replace("SOURCE", str(source))
    model = load(source)
    model.register_forward_pre_hook(lambda *_: pytest.fail("calibration started"))
    with pytest.raises(RecipeError) as caught:
        oneshot(
            model=model,
            recipe=YAML if recipe == "text" else [BitsMoEModifier(**FIELDS)],
            dataset=calibration(),
            **given,
        )
    assert str(caught.value).startswith(said.replace("FILE", str(file)).replace("SOURCE", str(source)))
    assert not (tmp_path / "out").exists()
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}


@pytest.mark.parametrize(
    "text",
    [
        "BitsMoEModifier: {bits: 3.0}",
        "q_modifiers: {BitsMoEModifier: {bits: 3.0}}",
        "a_stages: {q_modifiers: {BitsMoEModifier: {bits: 3.0}}}",
        "a_stage: {q_modifier: {BitsMoEModifier: {bits: 3.0}}}",
        "a_stage: {q_modifiers: [BitsMoEModifier: {bits: 3.0}]}",
        f"{YAML}\nq_modifiers: {{BitsMoEModifier: {{bits: 2.0}}}}",
    ],
    ids=["bare", "no-stage", "another-key", "another-group", "list", "one-of-two"],
)
def test_a_modifier_that_would_be_passed_over(dense_checkpoint: Callable[..., Path], tmp_path: Path, text: str) -> None:
    """llm-compressor reads groups of stages, says nothing of the rest, and would save the model as it was."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    model = load(dense_checkpoint("qwen3_moe"))
    for given in (text, str(recipe)):
        with pytest.raises(RecipeError, match=r"^the recipe has a BitsMoEModifier where llm-compressor reads no modif"):
            oneshot(model=model, recipe=given, dataset=calibration(), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_that_the_recipe_lacks(dense_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """llm-compressor would run nothing, and save the model as it was."""
    model = load(dense_checkpoint("qwen3_moe"))
    with pytest.raises(RecipeError, match=r"^stage='b': the recipe has no such stage; it has a$"):
        oneshot(model=model, recipe=YAML, stage="b", dataset=calibration(), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_places(YAML, "a")
    check_places(YAML, "a_stage")


@pytest.mark.parametrize("first", ["one-file", "several"])
def test_saving_into_the_same_folder_again(
    dense_checkpoint: Callable[..., Path], tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one file and several, transformers reads the one, whichever is older."""
    save, size = PreTrainedModel.save_pretrained, {"one-file": "1GB", "several": "100KB"}
    others = {"one-file": "several", "several": "one-file"}
    for which, bits in ((first, 4.0), (others[first], 2.5)):

        def save_pretrained(model: Any, *args: Any, limit: str = size[which], **kwargs: Any) -> None:
            save(model, *args, **{**kwargs, "max_shard_size": limit})

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
        model = load(dense_checkpoint("qwen3_moe"))
        recipe = [BitsMoEModifier(**{**FIELDS, "bits": bits, "scope": "layer"})]
        oneshot(model=model, recipe=recipe, dataset=calibration(), output_dir=tmp_path)
        assert len(checkpoint_files(tmp_path)) == 1 if which == "one-file" else len(checkpoint_files(tmp_path)) > 1
        with torch.no_grad():
            assert torch.equal(logits(load(tmp_path)), logits(model))


def test_warnings_do_not_grow_with_the_rows(dense_checkpoint: Callable[..., Path]) -> None:
    """llm-compressor warns whenever it is asked for an accelerator and there is none; it is asked once or twice."""
    warned: list[str] = []
    handle = logger.add(warned.append, level="WARNING", format="{message}")
    try:
        model = load(dense_checkpoint("qwen3_moe"))
        oneshot(model=model, recipe=[BitsMoEModifier(**FIELDS)], dataset=calibration(rows=24))
    finally:
        logger.remove(handle)
    assert len(warned) < 10, warned[:20]


def _as_md(folder: Path, text: str) -> str:
    (folder / "recipe.md").write_text(f"---\n{text}\n---\n# A card: of a model\n")
    return str(folder / "recipe.md")


FORMS: dict[str, Callable[[Path, str], Any]] = {
    "text": lambda _, text: text,
    "JSON in one line": lambda _, text: json.dumps(yaml.safe_load(text)),
    "Markdown": _as_md,
    "modifiers": lambda _, text: [BitsMoEModifier(**FIELDS, ignore=["a"])],
}


@pytest.mark.parametrize("form", FORMS)
def test_recipes_are_read_as_llm_compressor_reads_them(form: str, tmp_path: Path) -> None:
    long = [f"re:.*layers.{n}.*" for n in range(100)]
    text = f"a_stage: {{q_modifiers: {{BitsMoEModifier: {{ignore: {json.dumps(['a', *long])}}}}}}}"
    recipe = FORMS[form](tmp_path, text)
    check_places(recipe)
    (ours,) = bitsmoe_modifiers(recipe)
    assert ours.ignore[0] == "a"


def test_of_a_recipe_the_stage_counts_that_is_run() -> None:
    text = YAML + "\nb_stage: {q_modifiers: {GPTQModifier: {scheme: W4A16, targets: [Linear]}}}"
    assert len(bitsmoe_modifiers(text)) == len(bitsmoe_modifiers(text, "a")) == 1
    assert bitsmoe_modifiers(text, "b") == []


def test_the_model_of_a_run_that_failed_is_let_go(dense_checkpoint: Callable[..., Path]) -> None:
    """Before the next one is loaded: what was too large for the memory must not be there twice. Nor does what one run
    leaves with torch.fx, whether it failed or not."""

    def fail() -> weakref.ref[Any]:
        def too_large(*_: Any) -> None:
            raise MemoryError

        model = load(dense_checkpoint("qwen3_moe"))
        model.lm_head.register_forward_pre_hook(too_large)
        recipe = [BitsMoEModifier(**FIELDS, scope="layer")]
        with suppress(MemoryError):
            oneshot(model=model, recipe=recipe, dataset=calibration(), pipeline="sequential")
        return weakref.ref(model)

    left = fail()
    assert left() is not None
    _load(dense_checkpoint("qwen3_moe"), None)
    assert left() is None


def test_what_lies_in_the_current_folder_is_not_the_models(
    dense_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a model that was built in memory is empty, and so is the path of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    model = load(dense_checkpoint("qwen3_moe"))
    model.name_or_path = ""
    monkeypatch.setattr(patches._oneshot.Oneshot, "apply_recipe_modifiers", lambda *_, **__: None)
    recipe, processor = [BitsMoEModifier(**FIELDS)], load_tokenizer(dense_checkpoint("qwen3_moe"))
    oneshot(model=model, recipe=recipe, dataset=calibration(), processor=processor, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
