"""Processors of wrappers with vision towers, as their folders have them, at the sizes of the tiny models."""

import json
from pathlib import Path
from typing import Any

#: tokens without which vLLM does not take a model's tokenizer
_ALSO = {
    "inkling_mm_model": (
        *(f"<|message_{name}|>" for name in ("user", "model", "system", "tool")),
        *(f"<|content_{name}|>" for name in ("text", "image", "thinking", "audio_input", "xml")),
        *(
            f"<|{name}|>"
            for name in ("content_model_end_sampling", "content_invoke_tool_json", "end_message", "audio_end")
        ),
    )
}
#: model type to the class of its processor
_QWEN = {"qwen3_vl_moe": "Qwen3VLProcessor", "qwen3_5_moe": "Qwen3VLProcessor"}
#: of messages whose content is text or a list of texts and images
_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
#: an image of so many pixels at most: 4 × 4 patches, of which the tower makes 4 tokens
SIDE = 16


def add_processor(folder: Path) -> None:
    """Give a wrapper's folder its tokenizer and, where this module knows it, its processor of images."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tiny_text import LETTERS

    config = json.loads((folder / "config.json").read_text())
    special = {
        f"<|{name.removesuffix('_token_id').replace('image', 'image_pad').replace('video', 'video_pad')}|>": i
        for name, i in config.items()
        if name.endswith("_token_id") and isinstance(i, int) and i >= 100
    }
    # bytes by GPT-2's letters, as Qwen's files have them: transformers' tokenizer classes for those models split words
    # so whatever the file says
    letters = [c.translate({ord(" "): "Ġ", ord("\n"): "Ċ"}) for c in LETTERS]
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    vocabulary.update({f"<word{i}>": i for i in range(len(vocabulary), 128)})
    by_id = {i: word for word, i in vocabulary.items()}
    for token, i in special.items():
        vocabulary.pop(by_id[i])
        vocabulary[token] = i
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    also = _ALSO.get(config["model_type"], ())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*special, *also)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    kind = _QWEN.get(config["model_type"])
    if kind:
        (folder / "chat_template.jinja").write_text(_TEMPLATE)
        _write_qwen(folder, kind, config["vision_config"])


def _write_qwen(folder: Path, kind: str, vision: dict[str, Any]) -> None:
    sizes = {
        "processor_class": kind,
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
    }
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {**sizes, "image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {**sizes, "video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
