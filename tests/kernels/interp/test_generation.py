"""A whole decoding step of a transformers model through the kernels: one graph, as a CUDA graph would capture it."""

import torch
from kernel_backend import DEVICE
from transformers import StaticCache

from bitsmoe_modifier.runtime import experts
from helpers import pack_randomly, tiny_model


def test_a_decoding_step_is_one_graph_that_copies_no_weights(monkeypatch):
    torch.use_deterministic_algorithms(False)  # the model's own operations, which fill nothing
    with torch.device("cpu"):  # where their generators are
        model = tiny_model("qwen3_moe", torch.float16)
        pack_randomly(model, group_size=32, basis_bits=(0, 0), widths=(0, 2, 4))
    model.to(DEVICE)
    prompt, token = torch.tensor([[5, 9, 77, 3]]), torch.tensor([[40]])
    with torch.no_grad():
        plain = model(torch.cat([prompt, token], 1)).logits[:, -1]

    monkeypatch.setattr(experts, "kernels_wanted", lambda x: True)
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    cache = StaticCache(config=model.config, max_cache_len=8)
    step = torch.compile(model, backend=record, fullgraph=True)
    with torch.no_grad():
        model(prompt, past_key_values=cache)  # as in `generate`: not compiled, and prepares the kernels
        found = step(token, past_key_values=cache, cache_position=torch.tensor([4])).logits[:, -1]
    # some fifty roundings to fp16 between the two paths' logits, of random sign
    assert (found - plain).norm() <= 50**0.5 * torch.finfo(torch.float16).eps * plain.norm()
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes}
    assert {"bitsmoe.gate_up.default", "bitsmoe.down.default"} <= {name.removeprefix("torch.ops.") for name in called}
    weights = [node for node in graph.graph.nodes if node.op == "placeholder" and _holds_codes(node)]
    assert len(weights) >= 4  # codes of both sides of both layers
    assert all(node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in weights)


def _holds_codes(node: torch.fx.Node) -> bool:
    example = node.meta.get("example_value")
    return isinstance(example, torch.Tensor) and example.dtype == torch.uint8
