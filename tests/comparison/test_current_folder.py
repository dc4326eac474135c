"""A user's ``datasets.py`` in the current folder is not imported in the place of the library's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from bitsmoe_modifier.comparison import processes

processes._PRELOAD[:] = ["datasets", "random"]
if __name__ == "__main__":
    for device in ("cpu", "meta"):  # a fork server, and a process of its own
        context = processes.start_context(device)
        made = processes.run_in_process(context, abs, (-7,), Path(sys.argv[1]), lambda text: None)
        assert made == 7, made
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 begins every process in the current folder")
def test_modules_of_the_current_folder_are_left_alone(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (elsewhere / "program.py").write_text(PROGRAM)
    for name in ("datasets", "random", "types"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close(); raise SystemExit(3)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, str(elsewhere / "program.py"), str(tmp_path / "log")]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()
