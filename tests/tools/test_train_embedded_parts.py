"""tools/train_embedded: what it unlearns, and how a training goes on from another one's weights."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from support.checkpoints import refusal
from support.paths import EMBEDDED, ROOT

from minqwen import Qwen2
from minqwen.lab.tasks import Chapter, repeated

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


def test_where_greedy_text_would_repeat_itself_another_token_is_taught(
    parts, embedded_model, embedded_tokenizer
):
    train, data = parts("train.py"), parts("data.py")
    text = data["Text"](CHAPTERS, embedded_tokenizer, seed=3)
    prompts = text.prompts(5, 6)
    assert prompts.shape[0] == 6 and 6 <= prompts.shape[1] <= data["PROMPT_TOKENS"]
    assert torch.equal(prompts, text.prompts(5, 6))
    assert not torch.equal(prompts[:, :6], text.prompts(6, 6)[:, :6])

    examples = train["Writer"](embedded_model).examples(prompts)
    gram, length = train["REPEATS_GRAM"], prompts.shape[1]
    wanted = [unrepeated(embedded_model, row, train["REPEATS_TOKENS"], gram) for row in prompts]
    wanted = [(ids, changed) for ids, changed in wanted if any(changed)]
    assert len(wanted) > 2
    assert examples.inputs.tolist() == [ids[:-1] for ids, _ in wanted]
    assert examples.targets.tolist() == [ids[1:] for ids, _ in wanted]
    counts = (examples.kinds == data["REPEAT"]).tolist()
    assert [row[length - 1 :] for row in counts] == [changed for _, changed in wanted]
    assert not any(any(row[: length - 1]) for row in counts)
    for ids, _ in wanted:
        assert not any(repeated(ids, gram)[length:])


def test_a_teacher_corrects_what_repeats_and_what_is_unlikely(
    parts, embedded_model, embedded_tokenizer
):
    train, data = parts("train.py"), parts("data.py")
    prompts = data["Text"](CHAPTERS, embedded_tokenizer, seed=3).prompts(5, 4)
    pupil = Qwen2.from_pretrained(EMBEDDED, dtype="float32")
    pupil.lm_head.weight[:300] *= 2  # it prefers other tokens
    examples = train["Writer"](pupil, embedded_model).examples(prompts)
    own = train["Writer"](pupil).examples(prompts)
    assert torch.equal(examples.inputs, own.inputs)
    gram, length, repeat = train["REPEATS_GRAM"], prompts.shape[1], data["REPEAT"]
    assert not (examples.kinds[:, : length - 1] == repeat).any()
    corrected = 0
    for row in range(len(own.inputs)):
        ids = [*own.inputs[row].tolist(), int(own.targets[row, -1])]
        logits, pupils = (model(own.inputs[row : row + 1])[0] for model in (embedded_model, pupil))
        for at in range(length - 1, len(ids) - 1):
            ranked = (logits[at] + pupils[at]).argsort(descending=True).tolist()
            said = next(i for i in ranked if not repeated([*ids[: at + 1], i], gram)[-1])
            unlikely = bool(logits[at].softmax(-1)[ids[at + 1]] < train["UNLIKELY"])
            repeats = bool(own.kinds[row, at] == repeat)
            assert (examples.kinds[row, at] == repeat) == (repeats or unlikely)
            if repeats or unlikely:
                assert examples.targets[row, at] == said
            corrected += unlikely and not repeats
    assert corrected > 0


def unrepeated(
    model: Qwen2, prompt: torch.Tensor, count: int, gram: int
) -> tuple[list[int], list[bool]]:
    """Greedy text in which no `gram` tokens come twice, and where it is not the likeliest."""
    ids, changed = prompt.tolist(), []
    for _ in range(count):
        ranked = model(torch.tensor([ids]))[0, -1].argsort(descending=True).tolist()
        new = next(i for i in ranked if not repeated([*ids, i], gram)[-1])
        ids.append(new)
        changed.append(new != ranked[0])
    return ids, changed


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
    flags = ["--start-from", "x", "--text=y", "--out", "z", "--rows", "4", "--teacher", "x"]
    kept = ["--start-from", "DIR", "--rows", "4", "--teacher", "DIR"]
    assert tool["flags_without_places"](flags) == kept
