"""What may happen when a damaged checkpoint is read: it loads and runs, or a clean error; nothing else.

A *clean* error is ours (`BitsMoEError`), or one that transformers, compressed-tensors or safetensors raised in code of
their own. An error that comes out of our code without being ours, memory beyond the limit, and a file opened outside
the checkpoint are findings.
"""

import contextlib
import io
import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoint_mutations import mutate
from transformers import AutoModelForCausalLM

from bitsmoe_modifier.checkpoints.describe import describe, render
from bitsmoe_modifier.errors import BitsMoEError
from bitsmoe_modifier.runtime.experts import BitsMoEExperts

#: bytes that reading a damaged copy of a checkpoint of 100 kB may reserve beyond what the process has already
ROOM = 1 << 30

#: what the oracle looks for in messages: an allocation that the limit refused
_REFUSED_ALLOCATION = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
#: packages whose own errors are theirs to word
_FRAMEWORKS = ("/transformers/", "/compressed_tensors/", "/huggingface_hub/", "/safetensors/", "/accelerate/")
_OURS = "/bitsmoe_modifier/"

_opened: list[str] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(str(arguments[0]))
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class"):
        _opened.append(f"<{event}>")


sys.addaudithook(_watch)


@contextlib.contextmanager
def limited_memory(room: int = ROOM) -> Iterator[None]:
    """Let the process reserve at most ``room`` bytes of address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def finding(error: BaseException) -> str | None:
    """Why an error is not clean; None where it is."""
    text = str(error)
    if isinstance(error, MemoryError) or any(part in text for part in _REFUSED_ALLOCATION):
        return "allocates without bound"
    if isinstance(error, BitsMoEError):
        return None if text and len(text) < 20_000 else "says nothing, or no end of it"
    if not isinstance(error, Exception) or isinstance(error, SystemError):
        return "not an error that a caller would catch"
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last = next((f for f in reversed(frames) if _OURS in f or any(name in f for name in _FRAMEWORKS)), "")
    return "comes out of our code" if _OURS in last else None


def read(folder: Path) -> None:
    """Load the checkpoint, run it, decode every expert."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        model(input_ids=ids)
    for module in model.modules():
        if isinstance(module, BitsMoEExperts):
            module.dense_weights()


def inspect(folder: Path) -> None:
    """What `bitsmoe inspect` does."""
    render(describe(folder))


def attempt(seed: int, base: Path, work: Path) -> tuple[str, list[str]]:
    """Damage a copy of ``base`` and read it.

    Returns:
        what happened, and the findings, worded so that the seed reproduces them.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    done = mutate(seed, work)
    happened, findings = "loads", []
    for reader in (read, inspect):
        _opened.clear()
        try:
            with limited_memory(), contextlib.redirect_stderr(io.StringIO()):
                reader(work)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if reader is read:
                happened = type(error).__name__
            problem = finding(error)
            if problem:
                where = "".join(traceback.format_tb(error.__traceback__)[-2:])
                findings.append(f"seed {seed} ({done}), {reader.__name__}: {problem}: {error!r:.300}\n{where}")
        foreign = [path for path in _opened if path.startswith("<") or path.endswith("outside.safetensors")]
        if foreign:
            findings.append(f"seed {seed} ({done}), {reader.__name__}: opens or runs {sorted(set(foreign))}")
    return happened, findings


def campaign(seeds: range, bases: list[Path], work: Path) -> tuple[Counter[str], list[str]]:
    """Many attempts, in turn on each base."""
    for base in bases:
        read(base)  # compiles what runs it, which starts the compiler
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    for seed in seeds:
        happened, found = attempt(seed, bases[seed % len(bases)], work)
        outcomes[happened] += 1
        findings += found
    return outcomes, findings
