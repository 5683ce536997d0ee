"""tools/trace.py with a mistake in the model."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from support.paths import EMBEDDED
from support.tool import run_tool_here

from minqwen import Checkpoint
from minqwen.lab.faults import FAULTS

TEXT = "In the beginning"


def saved(out, *flags):
    result = run_tool_here("trace.py", "save", TEXT, out, "--names", "logits", *flags)
    assert result.code == 0 and result.out == "", result.err
    with safe_open(out, "pt") as file:
        return file.get_tensor("logits"), file.metadata(), result.err


def test_the_model_makes_the_mistake_and_stderr_says_which(embedded_tokenizer, tmp_path):
    flags = ["--dtype", "float32", "--fault", "gelu"]
    logits, metadata, err = saved(tmp_path / "x", *flags)
    assert err == f"mistake in the model: gelu. {FAULTS['gelu'].symptom}\n"
    assert metadata["fault"] == "gelu" and metadata["dtype"] == "float32"
    source = Checkpoint(EMBEDDED)
    weights = {name: source.read(name) for name in source.names}
    ids = torch.tensor([embedded_tokenizer.encode(TEXT)])
    with torch.no_grad():
        assert torch.equal(logits, FAULTS["gelu"].model(source.config, weights)(ids)[0])
    right, metadata, err = saved(tmp_path / "y", "--dtype", "float32")
    assert err == "" and "fault" not in metadata and not torch.allclose(logits, right)


def test_a_mistake_in_the_tokens_is_put_into_a_chat(embedded_tokenizer, tmp_path):
    flags = ["--chat", "--fault", "bos-twice"]
    logits, metadata, err = saved(tmp_path / "x", *flags)
    ids = embedded_tokenizer.encode_chat([{"role": "user", "content": TEXT}])
    assert err.startswith("mistake in the tokens: bos-twice. ")
    assert len(logits) == len(ids) + 1
    assert metadata["text"] == embedded_tokenizer.decode([ids[0], *ids])


def test_a_mistake_comes_with_more_heads_too(tmp_path):
    flags = ["--num-attention-heads", "32", "--fault", "q-bias-missing", "--dtype", "float64"]
    with_more, metadata, _ = saved(tmp_path / "x", *flags)
    plain, _, _ = saved(tmp_path / "y", *flags[2:])
    assert '"num_attention_heads": 32' in metadata["heads"]
    torch.testing.assert_close(with_more, plain)


def test_the_catalogue_is_printed_without_a_model_being_read(monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", None)
    result = run_tool_here("trace.py", "faults")
    lines = result.out.splitlines()
    assert result.code == 0 and result.err == "" and len(lines) == 2 * len(FAULTS)
    for fault, head, body in zip(FAULTS.values(), lines[::2], lines[1::2]):
        assert head.startswith(f"{fault.name}  ({fault.kind}, ") and fault.first in head
        assert fault.symptom in body and fault.source in body


@pytest.mark.parametrize(
    "args, says",
    [
        (["--fault", "rope-interleavd"], "did you mean 'rope-interleaved'"),
        (["--fault", "yarn-off"], "needs a model with YaRN"),
        (["--fault", "logprobs-of-top-k"], "no trace shows it"),
        (["--fault", "bos-twice"], "add --chat"),
        (["--fault"], "expected one argument"),
        (["--fault", "gelu", "--arithmetic", "exact"], "leave out arithmetic and offload"),
        (["--fault", "gelu", "--offload", "memory"], "leave out arithmetic and offload"),
        (["--fualt", "gelu"], "did you mean '--fault'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes_in_asking_are_told_before_a_weight_is_read(monkeypatch, args, says):
    monkeypatch.setattr(Checkpoint, "read", None)
    result = run_tool_here("trace.py", "show", TEXT, *args)
    assert result.code == 2 and result.out == "" and says in result.err.splitlines()[-1]
    assert result.err.splitlines()[-1].startswith("error: ")


def test_a_recipe_that_no_engine_loads_is_refused():
    result = run_tool_here("trace.py", "show", TEXT, "--fault", "article")
    assert result.code == 2 and "q_proj.weight has shape" in result.err
