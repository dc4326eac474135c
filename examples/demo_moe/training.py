"""Tokenizer, model and training loop: a mixture of experts whose experts specialize without that any is idle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .documents import Document

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
HEAD_DIM = 32
BALANCE_COEFFICIENT = 0.001
WEIGHT_DECAY = 1.0


@dataclass(frozen=True)
class Shape:
    """Shape of the model. ``hidden`` is a multiple of 2 * HEAD_DIM; ``seq`` is the training length in tokens."""

    arch: str = "qwen3_moe"
    hidden: int = 128
    layers: int = 2
    experts: int = 32
    topk: int = 4
    intermediate: int = 128
    seq: int = 512


# ----------------------------------------------------------------------------------------- tokenize


def train_tokenizer(texts: Sequence[str], vocab: int, seq: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab`` entries with <|bos|>, <|eos|>, <|pad|> as ids 0, 1, 2; decoding inverts encoding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=seq,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> torch.Tensor:
    """Token ids [n] of the documents in order, each between a <|bos|> and an <|eos|>."""
    ids: list[int] = []
    for document in documents:
        tokens = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        ids += [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return torch.tensor(ids)


# -------------------------------------------------------------------------------------------- train


def make_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> transformers.PreTrainedConfig:
    """Configuration of the architecture ``shape.arch``: grouped-query (DeepSeek: latent) attention, tied embeddings."""
    heads = shape.hidden // HEAD_DIM
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_experts_per_tok": shape.topk,
        "max_position_embeddings": shape.seq,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    grouped = {"num_key_value_heads": heads // 2, "head_dim": HEAD_DIM, "router_aux_loss_coef": BALANCE_COEFFICIENT}
    if shape.arch == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **common,
            **grouped,
            intermediate_size=4 * shape.intermediate,
            moe_intermediate_size=shape.intermediate,
            num_experts=shape.experts,
            norm_topk_prob=True,
        )
    if shape.arch == "mixtral":
        return transformers.MixtralConfig(
            **common, **grouped, intermediate_size=shape.intermediate, num_local_experts=shape.experts
        )
    return transformers.DeepseekV3Config(
        **common,
        num_key_value_heads=heads,
        intermediate_size=4 * shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        n_routed_experts=shape.experts,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=min(1, shape.layers - 1),
        num_nextn_predict_layers=0,
        q_lora_rank=None,
        kv_lora_rank=shape.hidden // 2,
        qk_nope_head_dim=HEAD_DIM,
        qk_rope_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
    )


def moe_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The mixture-of-experts blocks by module name, first layer first."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "experts") and hasattr(module, "gate")
    }


@contextmanager
def record_routing(model: PreTrainedModel) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect (router logits [tokens, experts], chosen experts [tokens, topk]) of every block during the forward pass.

    The list grows by one entry per block and pass; empty it between passes.
    """
    routing: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_module: nn.Module, _inputs: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, _weights, chosen = output
        routing.append((logits, chosen))

    handles = [block.gate.register_forward_hook(keep) for block in moe_blocks(model).values()]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Switch-style load-balancing loss of one layer: ``E * sum_e share_e * probability_e``, 1 when even.

    ``logits`` is [tokens, E], ``chosen`` [tokens, topk]; the gradient flows through the probabilities only.
    """
    experts = logits.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (share * logits.float().softmax(-1).mean(0)).sum()


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of predicting ids[:, 1:] from logits [batch, seq, vocab] at the positions before."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def cosine_with_warmup(step: int, steps: int) -> float:
    """Learning-rate factor: linear over the first 4 % of the steps, then half a cosine down to zero."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: PreTrainedModel, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; weight decay on the matrices, none on the norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    steps: int,
    batch: int,
    seq: int,
    lr: float,
    seed: int,
    balance: float = BALANCE_COEFFICIENT,
    decay: float = WEIGHT_DECAY,
) -> None:
    """Train in place on ``steps`` batches of random windows, ``seq`` tokens each, of the token stream ``ids`` [n].

    ``balance`` weighs `balance_loss`, summed over the layers, against the cross entropy in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, lr, decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, steps))
    offsets = torch.arange(seq)
    running = math.log(model.config.vocab_size)
    model.train()
    with record_routing(model) as routing, tqdm(range(steps), desc="training", unit="step") as bar:
        for _ in bar:
            starts = torch.randint(len(ids) - seq, (batch, 1), generator=generator)
            window = ids[starts + offsets].to(model.device)
            loss = next_token_loss(model(window, use_cache=False).logits, window)
            imbalance = torch.stack([balance_loss(*layer) for layer in routing])
            routing.clear()
            (loss + balance * imbalance.sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            running = 0.98 * running + 0.02 * loss.item()
            bar.set_postfix(loss=f"{running:.3f}", balance=f"{imbalance.max().item():.2f}", refresh=False)


@torch.inference_mode()
def evaluate(model: PreTrainedModel, ids: torch.Tensor, seq: int, batch: int = 8) -> tuple[float, torch.Tensor]:
    """(perplexity per token, tokens per expert [layers, experts]) of ids [n], in whole windows of ``seq`` tokens."""
    windows = ids[: len(ids) // seq * seq].view(-1, seq)
    nats = 0.0
    passes = []
    model.eval()
    with record_routing(model) as routing:
        for window in windows.split(batch):
            window = window.to(model.device)
            nats += next_token_loss(model(window, use_cache=False).logits, window).item() * len(window)
            passes.append(
                torch.stack([chosen.flatten().bincount(minlength=scores.shape[-1]) for scores, chosen in routing])
            )
            routing.clear()
    return math.exp(nats / len(windows)), torch.stack(passes).sum(0).cpu()
