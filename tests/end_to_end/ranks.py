"""One of several processes that quantize together; `torchrun` starts it: ranks.py SOURCE OUT [TROUBLE [SCOPE]]."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def main(source: Path, out: Path, trouble: str = "none", scope: str = "global") -> None:
    """Quantize with this process's share of the rows; the first one writes what it packed.

    Args:
        trouble: "none"; "dies" or "fails": the second process does so in the middle; "same-rows": nobody deals out.
    """
    from llmcompressor import oneshot
    from quantize_once import FIELDS
    from torch.utils.data import DataLoader

    from bitsmoe_modifier import BitsMoEModifier
    from bitsmoe_modifier.method.distributed import share
    from bitsmoe_modifier.storage.records import write_tensors
    from helpers import calibration, load, packed_modules

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    batches = list(calibration(rows=7))
    if trouble != "same-rows":
        batches = share(batches)
    model = load(source)
    if dist.get_rank() == 1 and trouble in ("dies", "fails"):

        def hook(module: torch.nn.Module, args: object) -> None:
            if trouble == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("out of luck")

        count = iter(range(1000))
        norm = model.model.layers[1].post_attention_layernorm
        norm.register_forward_pre_hook(lambda m, a: hook(m, a) if not a[0].is_meta and next(count) > 4 else None)
    loader = DataLoader(batches, batch_size=None)
    # A trial of bases rounds with feedback, where the last digit of a sum moves its verdict by per cents on few rows,
    # and with a survey verdicts move bits between layers. Bases that are given are not tried.
    given = {"input_basis": "spectral", "output_basis": "spectral"} if scope == "global" else {}
    oneshot(
        model=model,
        dataset=loader,
        recipe=[BitsMoEModifier(**FIELDS, scope=scope, **given)],
        pipeline="sequential",
        output_dir=out / "saved",
    )
    packed = {f"{n}.{leaf}": t for n, m in packed_modules(model).items() for leaf, t in m.packed.items()}
    write_tensors(out / f"rank{dist.get_rank()}.safetensors", packed, {})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
