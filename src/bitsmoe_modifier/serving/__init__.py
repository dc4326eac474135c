"""The vLLM plugin: serves checkpoints whose routed experts are packed as "bitsmoe".

vLLM calls `register` in each of its processes through the entry point group ``vllm.general_plugins``. Modules:

- `versions`: which vLLM this is written for
- `vllm_api`: every name that we take from vLLM, and nothing else does
- `config`: claims checkpoints by their config.json and says which layer is ours
- `diversion`: takes packed tensors out of the stream before the model's own loading code sees them
- `loading`: collects a layer's tensors, checks them and cuts this rank's part
- `method`: the layer's weights and forward as vLLM wants them
- `gating`: vLLM's activation settings as a `Gating`
- `dummy`: random experts for ``--load-format dummy``
- `evaluation`: lm-eval through vLLM, for ``bitsmoe eval --backend vllm``
- `refusal`: the clear error where vLLM's version is not supported
"""

from importlib import import_module

from .versions import unsupported_version


def register() -> None:
    """Make this process' vLLM serve bitsmoe checkpoints; more than one call does no harm.

    Where vLLM's version is not supported, other models are served as before and a bitsmoe checkpoint is refused.
    """
    reason = unsupported_version()
    if reason:
        from .refusal import refuse_checkpoints

        refuse_checkpoints(reason)
    else:
        import_module(".config", __name__)
