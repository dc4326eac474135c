"""The base install, without llm-compressor and the rest of the extra: every command works or says what it needs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitsmoe_modifier.extras import install_line
from tiny_text import save_tiny, write_text

STORED = Path(__file__).parent / "newest" / "stored"

#: Runs command lines one after the other in a process in which the extra's packages cannot be imported.
_RUN = """
import contextlib, io, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llmcompressor", "datasets", "pulp", "lm_eval", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from bitsmoe_modifier.cli import main
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code or 0, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """By name: exit code, stdout and stderr of a command line of the base install."""
    folder = tmp_path_factory.mktemp("base")
    dense, text = str(save_tiny(folder / "model")), str(write_text(folder / "text.txt", 1500, seed=1))
    packed = str(shutil.copytree(STORED / "packed", folder / "packed"))  # eval leaves its figures there
    measure = ["eval", packed, "--model", dense, "--eval-text", text, "--eval-rows", "4", "--seq-len", "32"]
    quantize = ["--model", dense, "--calibration", text, "--out", str(folder / "new")]
    lines = {
        "inspect": ["inspect", packed],
        "export": ["export", packed, "--out", str(folder / "dense")],
        "eval": [*measure, "--json", str(folder / "packed.json")],
        "eval of the export": ["eval", str(folder / "dense"), *measure[2:], "--json", str(folder / "dense.json")],
        "plan of a finished checkpoint": ["plan", "--model", packed],
        "plan": ["plan", "--model", dense],
        "quantize": ["quantize", *quantize],
        "compare": ["compare", *quantize],
        "export w4": ["export", packed, "--to", "w4", "--out", str(folder / "w4")],
        "tasks": [*measure, "--tasks", "continuations"],
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps(list(lines.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "new").exists()
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("inspect", "bits"), ("export", "dense"), ("eval", "perplexity"), ("eval of the export", "perplexity")],
)
def test_finished_checkpoints_need_nothing_more(ran: dict[str, tuple[int, str, str]], name: str, shown: str) -> None:
    code, out, err = ran[name]
    assert code == 0, err
    assert shown in out.lower()


@pytest.mark.parametrize("name", ["plan", "quantize", "compare", "export w4", "tasks"])
def test_what_needs_the_extra_says_so_in_a_line(ran: dict[str, tuple[int, str, str]], name: str) -> None:
    code, out, err = ran[name]
    assert code == 2
    assert out == ""
    said = [line for line in err.splitlines() if line.strip()][-1]
    package = "lm_eval" if name == "tasks" else "llmcompressor"
    assert said.startswith(f"bitsmoe {name.split()[0] if name != 'tasks' else 'eval'}: ")
    assert said.endswith(f" needs {package}, which is not installed: {install_line('quantize')}")
    assert "Traceback" not in err


def test_a_finished_checkpoint_is_not_planned(ran: dict[str, tuple[int, str, str]]) -> None:
    code, _, err = ran["plan of a finished checkpoint"]
    assert code == 2
    assert "is quantized already" in err
    assert "llmcompressor" not in err
