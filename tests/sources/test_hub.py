"""What is fetched of a hub model, against a stub that plays a repository as they are published."""

import fnmatch
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from bitsmoe_modifier.checkpoints.plan import read_headers
from bitsmoe_modifier.errors import BitsMoEError, CheckpointError, RecipeError
from bitsmoe_modifier.remote_code import trust_remote_code
from bitsmoe_modifier.sources.model import find_model, load_tokenizer, open_dense

Fetched = list[set[str]]
#: what a repository of gpt-oss' or Mistral's kind holds
FILES = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "README.md"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"),
    *("original/model.safetensors", "original/config.json", "metal/model.bin", "chat_template.jinja", "vocab.tiktoken"),
    *("tokenization_own.py", "additional_chat_templates/tool.jinja", "consolidated.safetensors.index.json"),
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fetched]:
    """Make ``org/model`` a repository with this config.json; what each call fetches is recorded."""

    def publish(config: dict[str, Any]) -> Fetched:
        fetched: Fetched = []
        folder = tmp_path / "snapshots" / COMMIT
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        contents = {"config.json": config, "model.safetensors.index.json": {"weight_map": shards}}

        def snapshot_download(
            name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **options: Any
        ) -> str:
            assert name == "org/model"
            assert options == ({} if not fetched else {"revision": COMMIT}), "one commit for all"
            wanted = {f for f in FILES if any(fnmatch.fnmatch(f, pattern) for pattern in allow_patterns)}
            wanted -= {f for f in FILES if any(fnmatch.fnmatch(f, pattern) for pattern in ignore_patterns)}
            fetched.append(wanted)
            for file in wanted:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(json.dumps(contents.get(file, {})))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return fetched

    monkeypatch.chdir(tmp_path)
    return publish


def test_only_what_is_read_is_fetched(hub: Callable[..., Fetched]) -> None:
    fetched = hub({"model_type": "gpt_oss"})
    find_model("org/model")
    assert not [name for name in fetched[0] if name.endswith(".safetensors")], "descriptions come first"
    assert fetched[-1] == {
        *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "vocab.tiktoken"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "chat_template.jinja"),
        "additional_chat_templates/tool.jinja",
    }


def test_a_quantized_model_is_refused_before_its_weights_come(hub: Callable[..., Fetched]) -> None:
    fetched = hub({"model_type": "qwen3_moe", "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(RecipeError, match=r"org/model is quantized already \(gptq\)"):
        open_dense("org/model")
    assert len(fetched) == 1
    assert not [name for name in fetched[0] if name.endswith(".safetensors")]


def test_code_is_fetched_where_it_may_run(hub: Callable[..., Fetched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMOE_TRUST_REMOTE_CODE", "")
    fetched = hub({})
    trust_remote_code(True)
    find_model("org/model")
    trust_remote_code(False)
    assert "tokenization_own.py" in fetched[-1]


def _unreachable(*_: Any, **__: Any) -> None:
    from huggingface_hub.utils import _http

    http = getattr(_http, "httpx", None) or _http.httpx2
    raise http.ConnectError("[Errno -2] Name or service not known")


@pytest.mark.parametrize("ask", [find_model, read_headers], ids=["find_model", "plan"])
def test_without_a_network_it_says_so(
    ask: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("snapshot_download", "get_safetensors_metadata", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, _unreachable)
    with pytest.raises(BitsMoEError, match=r"org/model is neither .* the hub cannot be reached .*; give the folder"):
        ask("org/model")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int, str], None]]:
    """A hub on this machine that answers everything by a status and the hub's own code for an error."""
    answer = [200, ""]

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(answer[0]))
            self.send_header("X-Error-Code", str(answer[1]))
            self.send_header("X-Error-Message", "Access to model org/model is restricted.")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield lambda status, code: answer.__setitem__(slice(None), [status, code])
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (
            403,
            "GatedRepo",
            "its owner wants an agreement first. Ask for access on its page of the hub, then log in by `hf",
        ),
        (401, "RepoNotFound", "a model that the hub shows you: check the name; if it is private, log in by `hf"),
        (404, "RepoNotFound", "a model that the hub shows you: check the name"),
    ],
)
@pytest.mark.parametrize("ask", [find_model, read_headers], ids=["find_model", "plan"])
def test_what_the_hub_refuses(
    ask: Callable[[str], object], status: int, code: str, said: str, answering: Callable[[int, str], None]
) -> None:
    answering(status, code)
    with pytest.raises(BitsMoEError, match=re.escape(said)):
        ask("org/model")


def test_a_hub_that_is_down(answering: Callable[[int, str], None]) -> None:
    answering(503, "")
    with pytest.raises(BitsMoEError, match=r"the hub cannot be reached \(HfHubHTTPError: Server error '503"):
        find_model("org/model")


@pytest.fixture
def own_tokenizer(tiny: Path, tmp_path: Path) -> Path:
    """A folder whose tokenizer is a class in a file of its own, as Kimi's and Qwen's first ones are."""
    folder = tmp_path / "own"
    shutil.copytree(tiny / "model", folder)
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    return folder


def test_a_tokenizer_with_code_of_its_own(own_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMOE_TRUST_REMOTE_CODE", "")
    with pytest.raises(CheckpointError, match=r"\(tokenization_own\.py\); read it, and run it by --trust-remote-code"):
        load_tokenizer(own_tokenizer)
    trust_remote_code(True)
    assert type(load_tokenizer(own_tokenizer)).__name__ == "OwnTokenizer"
    (own_tokenizer / "tokenization_own.py").unlink()
    with pytest.raises(CheckpointError, match=r"the file tokenization_own\.py has to be there"):
        load_tokenizer(own_tokenizer)
