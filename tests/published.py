"""Tiny folders of the shape in which models are published: everything that lies beside the weights, and MTP layers."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitsmoe_modifier.storage.shards import checkpoint_files
from tiny_text import LETTERS

#: what nobody may lose or rewrite
BESIDE = {
    "LICENSE": "Apache License, Version 2.0",
    "generation_config.json": '{"do_sample": false, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 3]}',
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
#: of a wrapper with a vision tower
PROCESSOR = {"preprocessor_config.json": '{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}'}


#: of a shard
_BYTES = 100_000


def publish(
    model: torch.nn.Module,
    folder: Path,
    mtp: dict[str, torch.Tensor] | None = None,
    rewrite: Callable[[Path], object] | None = None,
) -> Path:
    """Save a model in several shards with an index, a tokenizer of single characters, and all files of `BESIDE`.

    Args:
        model: of transformers.
        folder: to create.
        mtp: tensors of layers that transformers does not load, by their names in the files.
        rewrite: puts the saved ``model.safetensors`` into the precision that it is published in (`low_precision`).
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder, max_shard_size="5GB" if rewrite else f"{_BYTES // 1000}KB")
    if rewrite:
        rewrite(folder)
        _split(folder)
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    has_tower = getattr(model.config, "vision_config", None) is not None
    for name, text in {**BESIDE, **(PROCESSOR if has_tower else {})}.items():
        (folder / name).write_text(text, encoding="utf-8")
    if mtp:
        add_shard(folder, mtp, "mtp.safetensors")
    return folder


def _split(folder: Path) -> None:
    """Cut the only file of weights into shards with an index, as ``save_pretrained`` does for what it can write."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > _BYTES:
            shards.append({})
        shards[-1][name] = tensor
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    for number, shard in enumerate(shards, 1):
        add_shard(folder, shard, f"model-{number:05d}-of-{len(shards):05d}.safetensors")


def add_shard(folder: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Put tensors into a file of their own and into the index."""
    save_file(tensors, folder / name)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].update(dict.fromkeys(tensors, name))
    index.write_text(json.dumps(content))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files, by its name there."""
    found = {}
    for file in checkpoint_files(folder):
        with safe_open(file, "pt") as shard:
            found.update({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118 - not a dict
    return found
