"""Tiny folders of the shape in which models are published: everything that lies beside the weights, and MTP layers."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def publish(model: torch.nn.Module, folder: Path, mtp: dict[str, torch.Tensor] | None = None) -> Path:
    """Save a model in several shards with an index, a tokenizer of single characters, and all files of `BESIDE`.

    Args:
        model: of transformers.
        folder: to create.
        mtp: tensors of layers that transformers does not load, by their names in the files.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder, max_shard_size="100KB")
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
