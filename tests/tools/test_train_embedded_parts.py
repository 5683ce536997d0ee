"""tools/train_embedded: what it unlearns, and how a training goes on from another one's weights."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from support.checkpoints import refusal
from support.paths import EMBEDDED, ROOT

from minqwen import Qwen2
from minqwen.lab.tasks import Chapter, continued, repeated

TOOL = ROOT / "tools" / "train_embedded"
VERSES = [
    "And Hiram sent to the king sixscore talents of gold.",
    "My flesh and my skin hath he made old; he hath broken my bones.",
    "And they departed from Dophkah, and encamped in Alush, and Moses with them.",
]
CHAPTERS = [Chapter(f"Nu{i}", VERSES * 20) for i in range(4)]


@pytest.fixture(scope="module")
def parts():
    """The names of a file of the tool, whose files import each other."""
    before = set(sys.modules)
    sys.path.insert(0, str(TOOL))
    yield lambda file: runpy.run_path(str(TOOL / file))
    sys.path.remove(str(TOOL))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(TOOL)):
            del sys.modules[name]


def test_what_repeats_itself_in_greedy_text_counts_and_nothing_else(
    parts, embedded_model, embedded_tokenizer
):
    train, data = parts("train.py"), parts("data.py")
    text = data["Text"](CHAPTERS, embedded_tokenizer, seed=3)
    prompts = text.prompts(5, 12)
    assert prompts.shape[0] == 12 and 6 <= prompts.shape[1] <= data["PROMPT_TOKENS"]
    assert torch.equal(prompts, text.prompts(5, 12))
    assert not torch.equal(prompts[:, :6], text.prompts(6, 12)[:, :6])

    examples = train["Writer"](embedded_model).examples(prompts)
    rows = continued(embedded_model, prompts, train["REPEATS_TOKENS"]).tolist()
    wanted = []
    for row in rows:
        again = repeated(row, train["REPEATS_GRAM"])
        again[: prompts.shape[1]] = [False] * prompts.shape[1]
        if any(again):
            wanted.append((row[:-1], row[1:], again[1:]))
    assert len(wanted) > 3
    assert examples.inputs.tolist() == [inputs for inputs, _, _ in wanted]
    assert examples.targets.tolist() == [targets for _, targets, _ in wanted]
    assert (examples.kinds == data["REPEAT"]).tolist() == [again for _, _, again in wanted]


def test_the_chats_of_a_training_that_goes_on_are_long_from_the_start(parts, embedded_tokenizer):
    data = parts("data.py")
    chats = data["Chats"](CHAPTERS, embedded_tokenizer, seed=3)
    assert data["Supply"](chats, 4, None).longest(0) == 128
    assert data["Supply"](chats, 4, None, grown=True).longest(0) == data["LENGTH"]


def test_a_training_goes_on_from_the_weights_of_its_own_kind_of_checkpoint(parts, tmp_path):
    tool = parts("__main__.py")
    model = parts("train.py")["new_model"](Qwen2.from_pretrained(EMBEDDED).config)
    tool["take_weights"](model, EMBEDDED, EMBEDDED)
    source = Qwen2.from_pretrained(EMBEDDED, dtype="float32").state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], source[name]) for name in source)

    (tmp_path / "tokenizer.json").write_text("{}")
    refusal(
        lambda: tool["take_weights"](model, EMBEDDED, tmp_path),
        *(f"--start-from {EMBEDDED}", "another shape or tokenizer"),
    )


def test_the_card_keeps_the_commands_of_the_trainings_before(parts, tmp_path):
    tool = parts("__main__.py")
    assert tool["earlier_commands"](None) == tool["earlier_commands"](tmp_path) == []
    commands = ["python tools/train_embedded --minutes 2", "python tools/train_embedded --rows 4"]
    (tmp_path / "README.md").write_text("# A card\n\n    " + "\n    ".join(commands) + "\n\ntook\n")
    assert tool["earlier_commands"](tmp_path) == commands
    flags = ["--start-from", "x", "--text=y", "--out", "z", "--rows", "4"]
    assert tool["flags_without_places"](flags) == ["--start-from", "DIR", "--rows", "4"]
