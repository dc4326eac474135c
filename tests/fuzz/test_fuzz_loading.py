"""Thousands of damaged and forged checkpoints: each loads and runs, or is refused by a clean error (loading_oracle)."""

import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from loading_oracle import campaign, finding, limited_memory
from transformers import AutoModelForCausalLM

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.storage.packed import TENSOR_NAMES
from helpers import pack_randomly, save, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

#: attempts of the slow campaign, and how many share a process
ATTEMPTS, PER_PROCESS = 10_000, 1_000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Super experts and coded bases in one file; a 16-bit basis and trellis codes in several; a file beside them."""
    root = tmp_path_factory.mktemp("bases")
    sizes = {"vocab_size": 64, "max_position_embeddings": 64}
    one, several = tiny_model("qwen3_moe", **sizes), tiny_model("qwen3_moe", **sizes)
    pack_randomly(one, dense=(1,))
    pack_randomly(several, basis_bits=(0, 16), stripes=2)
    folders = [save(one, root / "one"), save(several, root / "several", max_shard_size="60KB")]
    shutil.copy(folders[0] / "model.safetensors", root / "outside.safetensors")
    return folders


def test_a_sample(bases: list[Path]) -> None:
    outcomes, findings = campaign(range(200), bases, bases[0].parent / "work")
    assert not findings, "\n".join(findings)
    assert outcomes["CheckpointError"] > 80, "most damage to packed experts is recognized by us"
    assert 20 < outcomes["loads"] < 100, "some damage is none, and not all of it is ours to see"


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, ATTEMPTS, PER_PROCESS))
def test_all_of_it(start: int, bases: list[Path]) -> None:
    """In processes of their own, so that one that dies is seen as such."""
    code = (
        "import sys; from pathlib import Path; import transformers; from loading_oracle import campaign; "
        "transformers.utils.logging.set_verbosity_error(); "
        "a, b, work = map(Path, sys.argv[1:4]); "
        f"outcomes, findings = campaign(range({1000 + start}, {1000 + start + PER_PROCESS}), [a, b], work); "
        "print(dict(outcomes)); print('\\n'.join(findings)); sys.exit(bool(findings))"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; {code}"]
        + [str(path) for path in (*bases, bases[0].parent / f"work{start}")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


# ------------------------------------------------------------------------------------------------ aimed, not by chance


@pytest.fixture
def copy_of(bases: list[Path], tmp_path: Path) -> list[Path]:
    return [shutil.copytree(base, tmp_path / base.name) for base in bases]


def _refused(folder: Path, *words: str) -> None:
    with limited_memory(), pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for word in words:
        assert word in str(caught.value)


def _change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_every_flipped_bit_of_packed_experts_is_seen(copy_of: list[Path]) -> None:
    file = copy_of[0] / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    spans = [e["data_offsets"] for name, e in header.items() if name.rpartition(".")[2] in TENSOR_NAMES]
    rng = random.Random(0)
    for start, end in rng.sample(spans, 25):
        damaged = bytearray(data)
        damaged[8 + length + rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        _refused(copy_of[0])


@pytest.mark.parametrize(
    "trick", ["../outside.safetensors", "{parent}/outside.safetensors", "/dev/zero", "config.json"]
)
@pytest.mark.parametrize("dtype", ["float32", None])
def test_index_that_leads_elsewhere(trick: str, dtype: str | None, copy_of: list[Path]) -> None:
    """Without a dtype in config.json, transformers opens the first file to guess it."""
    folder = copy_of[1]
    (folder.parent / "outside.safetensors").touch()
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], trick.format(parent=folder.parent))
    file.write_text(json.dumps(index))
    _change_config(folder, dtype=dtype)
    _refused(folder, "index.json", "do not use this checkpoint")


def test_links_of_a_download_cache_are_followed(copy_of: list[Path]) -> None:
    folder = copy_of[1]
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        blob = folder.parent / f"blob{number}"
        file.rename(blob)
        file.symlink_to(blob)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "there"])
def test_absurd_vocabulary(absent: bool, copy_of: list[Path]) -> None:
    """2**40 words: 256 TiB, that transformers would make up where no file holds them."""
    folder = copy_of[0]
    _change_config(folder, vocab_size=2**40)
    if absent:
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        tensors = {k: t for k, t in load_file(file).items() if "embed_tokens" not in k and "lm_head" not in k}
        save_file(tensors, file, metadata={"format": "pt"})
        _refused(folder, "embed_tokens.weight", "(1099511627776, 64)", "no file holds it")
    else:
        _refused(folder, "model.safetensors", "(64, 64)", "(1099511627776, 64)", "do not belong together")


def test_other_attention_than_the_files_hold(copy_of: list[Path]) -> None:
    """transformers takes tensors of any shape where there is a quantizer; the first forward would fail."""
    _change_config(copy_of[0], head_dim=32)
    _refused(copy_of[0], "self_attn", "do not belong together")


def test_no_pickle_is_opened(copy_of: list[Path]) -> None:
    """Not even to guess a dtype."""
    folder = copy_of[0]
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    _change_config(folder, dtype=None)
    _refused(folder, "has no safetensors files")


def test_the_oracle_sees() -> None:
    """An oracle that finds nothing must be able to."""
    with pytest.raises((MemoryError, RuntimeError)) as caught, limited_memory(1 << 28):
        torch.empty(1 << 34, dtype=torch.uint8).fill_(1)
    assert finding(caught.value) == "allocates without bound"
    assert finding(CheckpointError("")) is not None
    from bitsmoe_modifier.storage.factors import decode_basis

    with pytest.raises(AttributeError) as caught:
        decode_basis(None, None, 16, 8)
    assert finding(caught.value) == "comes out of our code"
