"""Makes the checkpoints in ``stored/``, with the logits that they give, in the environment of `make test`.

    python tests/newest/make_stored.py

Beside each lies a file of its name with its logits; `test_stored.py` loads them with other versions of the libraries.
Made once: what an older release of this package wrote has to be read by every later one.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers import load, logits  # noqa: E402
from tiny_text import save_tiny, write_text  # noqa: E402

_W4 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}"
_LINEARS = """quant_stage:
  quant_modifiers:
    %s:
      config_groups:
        linears:
          targets: [%s]
          weights: %s
      ignore: [lm_head, 're:.*gate$']
"""
_OURS = """    BitsMoEModifier:
      bits: 2.5
      group_size: 16
      targets: ['%s']
"""
#: by folder: the recipe
RECIPES = {
    "packed": _LINEARS % ("GPTQModifier", "'re:.*self_attn[.](q|k|v|o)_proj$'", _W4) + _OURS % "re:.*mlp.experts$",
    "beside_linears": _LINEARS % ("QuantizationModifier", r"'re:.*layers[.]1[.]mlp[.]experts[.]\d+[.]\w+_proj$'", _W4)
    + _OURS % "re:.*layers.0.mlp.experts$",
    "stock": _LINEARS % ("QuantizationModifier", "Linear", _W4),
}


def main() -> None:
    """Make all of them."""
    import tempfile

    from bitsmoe_modifier.cli import main as bitsmoe

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        save_tiny(work / "model")
        text = write_text(work / "calibration.txt", 3000, seed=0)
        for name, content in RECIPES.items():
            (work / f"{name}.yaml").write_text(content)
            shutil.rmtree(HERE / "stored" / name, ignore_errors=True)
            out = HERE / "stored" / name
            arguments = ["quantize", "--model", work / "model", "--recipe", work / f"{name}.yaml", "--out", out]
            arguments += ["--calibration", text, "--samples", "16", "--seq-len", "64"]
            assert bitsmoe([str(argument) for argument in arguments]) == 0, name
            for unused in ("recipe.yaml", "README.md"):
                (out / unused).unlink(missing_ok=True)
            made = logits(load(out, dtype=torch.float32))
            save_file({"logits": made.contiguous()}, out.with_suffix(".logits"))


if __name__ == "__main__":
    main()
