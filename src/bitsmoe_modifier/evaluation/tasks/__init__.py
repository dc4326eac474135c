"""Tasks for lm-eval that need no network: for ``bitsmoe compare --tasks`` and ``lm_eval --include_path FOLDER``."""

from pathlib import Path

#: what lm-eval's ``--include_path`` takes
FOLDER = Path(__file__).parent
