"""Peak memory of a command with all processes that it starts, and its time on the wall.

    python benchmarks/process_tree.py bitsmoe compare --out DIR

Adds up, twice a second, the proportional set sizes (PSS: what processes share is counted once) of every process of the
command's session, from /proc, so on Linux only.
"""

import os
import subprocess
import sys
import time
from pathlib import Path


def held(session: int) -> int:
    """Bytes of memory that a session's processes hold together now."""
    total = 0
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == session:
                lines = (folder / "smaps_rollup").read_text(encoding="ascii").splitlines()
                total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:  # it ended meanwhile
            continue
    return total


def main() -> None:
    """Run the command and print what it took."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(sys.argv[1:], start_new_session=True)
    while process.poll() is None:
        peak = max(peak, held(process.pid))
        time.sleep(0.5)
    print(f"{peak / 1e9:.2f} GB at the peak, {time.perf_counter() - started:.0f} s")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
