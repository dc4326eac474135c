"""What `bitsmoe try` writes is what transformers' greedy search writes, with the divergences of the two models."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitsmoe_modifier.cli import main
from bitsmoe_modifier.evaluation.evaluate import load_model
from bitsmoe_modifier.evaluation.trying import generate
from tiny_text import save_tiny

PROMPT = "the end of"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same with other experts."""
    base = tmp_path_factory.mktemp("try")
    one, two = save_tiny(base / "one"), save_tiny(base / "two")
    other = load_model(str(two), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".experts." in name:
                parameter.mul_(1.3)
    other.save_pretrained(two)
    return one, two


def test_it_is_greedy_search_with_divergences(folders: tuple[Path, Path]) -> None:
    one, two = (load_model(str(folder), torch.float32, torch.device("cpu")) for folder in folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokens = list(generate(one, two, tokenizer, PROMPT, 12))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    whole = one.generate(ids, max_new_tokens=12, do_sample=False)[0]
    written = whole[ids.shape[1] :]
    assert [t.id for t in tokens] == [i for i in written.tolist() if i != one.generation_config.eos_token_id]
    start = tokenizer.decode(ids[0])
    assert start + "".join(t.text for t in tokens) == tokenizer.decode([*ids[0].tolist(), *(t.id for t in tokens)])
    with torch.no_grad():
        p, q = (m(whole[None]).logits[0].log_softmax(-1) for m in (two, one))
    at = ids.shape[1] - 1
    wanted = (p.exp() * (p - q)).sum(-1)[at : at + len(tokens)]
    # a cache sums in another order; the divergences here are some 1e-2
    torch.testing.assert_close(torch.tensor([t.kld for t in tokens]), wanted, rtol=1e-3, atol=1e-5)
    assert float(wanted.max()) > 1e-3
    assert all(t.kld == pytest.approx(0, abs=1e-6) for t in generate(one, one, tokenizer, PROMPT, 3))
    assert [t.kld for t in generate(one, None, tokenizer, PROMPT, 3)] == [None] * len(tokens[:3])


def test_the_space_before_the_first_word(folders: tuple[Path, Path]) -> None:
    """Tokenizers of the SentencePiece kind leave it out where a text begins; what follows a prompt begins none."""
    model = load_model(str(folders[0]), torch.float32, torch.device("cpu"))
    words = {f"▁w{i}": i for i in range(model.config.vocab_size)}
    bare = Tokenizer(WordLevel({**words, "<unk>": 10**6}, "<unk>"))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
    assert tokenizer.decode([7]) == "w7", "a test that could not tell"
    tokens = list(generate(model, None, tokenizer, "w3 w4", 4))
    assert len(tokens) > 1
    assert "".join(token.text for token in tokens) == "".join(f" w{token.id}" for token in tokens)


def test_command(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folders
    arguments = ["try", str(one), "--prompt", PROMPT, "--length", "5", "--device", "cpu"]
    assert main([*arguments, "--model", str(two)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(PROMPT)
    assert f"  two writes: {PROMPT}" in said
    assert "KL divergence: mean 0." in said
    assert "\x1b[" not in said, "no colours where nobody sees them"
    assert main(arguments) == 0
    assert "KL divergence" not in capsys.readouterr().out
    assert main(["try", str(one / "nowhere")]) == 2
    capsys.readouterr()
    assert main([*arguments, "--prompt", ""]) == 2
    assert "bitsmoe try: --prompt '' has no token that could be continued" in capsys.readouterr().err
    assert main(["try", str(one), "--length", "0"]) == 2
    assert "--length 0 must be 1 or more" in capsys.readouterr().err
