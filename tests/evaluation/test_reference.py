"""The recorded reference gives the model's own logits back, and evaluation over it is what a plain loop computes."""

import resource
from pathlib import Path

import pytest
import torch

from bitsmoe_modifier.errors import BitsMoEError, CheckpointError
from bitsmoe_modifier.evaluation.evaluate import evaluate, evaluate_reference, load_model
from bitsmoe_modifier.evaluation.metrics import TokenMetrics, summarize, token_metrics
from bitsmoe_modifier.evaluation.reference import load, record
from helpers import tiny_model


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain_logits(model, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows).logits[:, :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_recorded_states_reproduce_the_logits(architecture, dtype, rows, tmp_path: Path):
    model = tiny_model(architecture, dtype=dtype)
    reference = record(model, rows, 2, tmp_path)
    assert reference.states.shape == (5, 23, 64), "the last layer's inputs, not the logits"
    assert reference.vocabulary == 128
    found = torch.stack([reference.logits(slice(i, i + 1), slice(0, 23)) for i in range(5)])
    expected = torch.cat([plain_logits(model, rows[i : i + 2]) for i in range(0, 5, 2)])
    # the same product of the same numbers, in another tiling
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * 10)


def test_logits_are_kept_where_the_model_changes_them_after_its_last_layer(rows, tmp_path: Path):
    model = tiny_model("qwen3_moe")
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 5) * 5
        return output

    model.forward = capped
    reference = record(model, rows, 2, tmp_path)
    assert reference.weight is None
    assert reference.states.shape == (5, 23, 128)
    torch.testing.assert_close(reference.logits(slice(0, 5), slice(0, 115)).view(5, 23, 128), plain_logits(model, rows))


def test_positions_count_through_rows(rows, tmp_path: Path):
    reference = record(tiny_model("qwen3_moe"), rows, 5, tmp_path)
    every = reference.logits(slice(1, 4), slice(0, 69))
    torch.testing.assert_close(reference.logits(slice(1, 4), slice(20, 50)), every[20:50])


def test_a_record_can_be_opened_again(rows, tmp_path: Path):
    written = record(tiny_model("qwen3_moe"), rows, 2, tmp_path)
    read = load(tmp_path)
    assert torch.equal(written.states, read.states)
    assert torch.equal(written.weight, read.weight)
    assert read.bias is None


def test_opening_does_not_change_the_files(rows, tmp_path: Path):
    record(tiny_model("qwen3_moe"), rows, 2, tmp_path)
    before = (tmp_path / "states.bin").read_bytes()
    load(tmp_path).states.zero_()
    assert (tmp_path / "states.bin").read_bytes() == before


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_evaluation_matches_a_plain_loop(batch_size, rows, tmp_path: Path):
    dense, other = tiny_model("qwen3_moe", seed=0), tiny_model("qwen3_moe", seed=1)
    found = evaluate(other, rows, record(dense, rows, 2, tmp_path), batch_size)
    parts = [token_metrics(plain_logits(other, r)[0], plain_logits(dense, r)[0], r[0, 1:]) for r in rows.split(1)]
    expected = summarize(
        TokenMetrics(*(torch.stack([getattr(p, f) for p in parts]) for f in ("nll", "kld", "agree", "excess")))
    )
    assert found.tokens == 5 * 23
    for name in ("perplexity", "kld_mean", "kld_median", "kld_p90", "kld_stderr", "top1_agreement"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3), name


def test_a_model_that_predicts_no_numbers_is_refused(rows, tmp_path: Path):
    """Its figures would be NaN, which is no JSON: the report of all other runs would be lost with it."""
    reference, broken = record(tiny_model("qwen3_moe"), rows, 2, tmp_path), tiny_model("qwen3_moe", seed=1)
    broken.model.norm.weight.data[0] = torch.inf
    with pytest.raises(CheckpointError, match="the predictions of 115 of 115 positions have no divergence"):
        evaluate(broken, rows, reference, 4)


def test_the_reference_agrees_with_itself(rows, tmp_path: Path):
    model = tiny_model("qwen3_moe")
    reference = record(model, rows, 2, tmp_path)
    own, again = evaluate_reference(rows, reference, 3), evaluate(model, rows, reference, 4)
    assert own.kld_mean == 0
    assert own.top1_agreement == 1
    assert again.kld_mean < 1e-6
    assert again.perplexity == pytest.approx(own.perplexity, rel=1e-4)
    nll = torch.nn.functional.cross_entropy(plain_logits(model, rows).flatten(0, 1), rows[:, 1:].flatten())
    assert own.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("bytes_there", "said"),
    [
        (20_000, "head.safetensors could not be written"),
        (36_000, r"predictions take 0\.1 MB, for which .* has no room"),
    ],
    ids=["head", "states"],
)
def test_a_disk_without_room_is_said(bytes_there: int, said: str, rows, tmp_path: Path):
    """Written through its memory, a full disk would end the process by SIGBUS, without a word."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_there, before[1]))
    rows = rows.repeat(3, 1)
    try:
        with pytest.raises(BitsMoEError, match=f"{said}.*TMPDIR"):
            record(tiny_model("qwen3_moe"), rows, 2, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_device_that_cannot_hold_the_model_is_said_to_be_too_small(monkeypatch):
    """Quantizing needs one layer of the model on a GPU, measuring all of it."""

    class Large(torch.nn.Module):
        def to(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 384 MiB.\nmore")

    monkeypatch.setattr("bitsmoe_modifier.evaluation.evaluate._loaded", lambda *_: Large())
    with pytest.raises(BitsMoEError, match=r"^big: cuda cannot hold the whole model in bfloat16; give --device cpu"):
        load_model("big", torch.bfloat16, torch.device("cuda"))
