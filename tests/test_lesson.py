"""docs/lesson.md: its commands run, and every answer is what the code gives."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from support.paths import ROOT
from support.tool import run_tool_here

from minqwen.lab.faults import FAULTS
from minqwen.lab.shapes import official_config
from minqwen.model.memory import block_bytes

PAGE = (ROOT / "docs" / "lesson.md").read_text()
COMMANDS = [
    shlex.split(line.removeprefix("python tools/explain.py "))
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.splitlines()
]
# The answer of each exercise, as one line.
ANSWERS = {
    int(number): " ".join(re.sub(r"^> ?", "", answer, flags=re.M).split())
    for number, answer in re.findall(r"^\*\*(\d+)\.\*\*(?:.+\n)+\n((?:>.*\n)+)", PAGE, re.M)
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each command says, as data. The first one is that without a mistake."""
    directory, found = tmp_path_factory.mktemp("lesson"), []
    for i, command in enumerate(COMMANDS):
        shown = directory / f"{i}.json"
        arguments = [directory / word if ".html" in word else word for word in command]
        if "--json" in arguments:
            arguments[arguments.index("--json") + 1] = shown
        else:
            arguments += ["--json", shown]
        result = run_tool_here("explain.py", *arguments)
        assert result.code == 0 and result.err == "", result.err
        assert all(path.stat().st_size for path in arguments if ".html" in str(path))
        found.append(json.loads(shown.read_text()))
    return found


@pytest.fixture(scope="module")
def right(told):
    return told[0]


def of_fault(told, name):
    """What the commands with that mistake say."""
    return [each for each in told if each.get("name") == name]


def step(explanation, point):
    return next(s for layer in explanation["layers"] for s in layer["steps"] if s["point"] == point)


def test_every_exercise_has_an_answer_and_every_command_is_explains(embedded_model):
    millions = embedded_model.config.num_parameters() / 1e6
    assert f"the embedded model has {millions:.1f} million parameters" in PAGE
    assert [*ANSWERS] == list(range(1, 15)) and len(COMMANDS) == 7
    assert PAGE.count("\npython tools/") == len(COMMANDS)
    for command in COMMANDS:
        assert "--fault" not in command or command[command.index("--fault") + 1] in FAULTS


def test_one_shapes(right):
    letters, q, k = right["letters"], *(step(right, f"layers.0.attn.{p}") for p in "qk")
    assert (q["shape"], k["shape"]) == ("T H d", "T K d")
    assert ANSWERS[1].startswith(
        f"q is [T H d] with H = {q['sizes'][1]} and d = {q['sizes'][2]}, "
        f"k is [T K d] with K = {k['sizes'][1]}. {letters['G']} query heads share"
    )
    assert ANSWERS[1].endswith(f"hold {q['sizes'][1] // k['sizes'][1]} times less.")


def reads(model, ids, head, kv_head):
    """Whether a query head's scores in layer 0 change with the keys of a KV head."""

    def louder(k, name):
        k = k.clone()
        k[:, :, kv_head] *= 2
        return k

    def keep(scores, name):
        seen.append(scores[0, head].clone())

    seen: list[torch.Tensor] = []
    with torch.no_grad():
        for hooks in ([], [("layers.0.attn.rot_k", louder)]):
            model.run_with_hooks(ids, [*hooks, ("layers.0.attn.scores", keep)])
    return not torch.equal(*seen)


def test_two_which_kv_head_a_head_reads(embedded_model, right):
    ids = torch.tensor([[token["id"] for token in right["tokens"]]])
    K, G = right["letters"]["K"], right["letters"]["G"]
    (kv_head,) = [k for k in range(K) if reads(embedded_model, ids, 13, k)]
    assert right["layers"][0]["heads"][13]["kv_head"] == kv_head
    assert ANSWERS[2].startswith(f"KV head {kv_head}, because 13 // {G} = {13 // G}.")
    assert f"the {G} query heads of a group become rows" in ANSWERS[2]
    line, file = re.findall(r"`(.*?)`", ANSWERS[2])
    assert line in (ROOT / file).read_text()


def test_three_the_lines_that_change_the_residual_stream(right):
    for point in ("resid_mid", "resid_post"):
        (code,) = step(right, f"layers.0.{point}")["code"]
        assert f"`{code['text']}`" in ANSWERS[3]


def test_four_patterns_add_up_to_one(embedded_model, right):
    ids = torch.tensor([[token["id"] for token in right["tokens"]]])
    with torch.no_grad():
        _, seen = embedded_model.run_with_cache(ids, ["*.attn.pattern"])
    for pattern in seen.values():
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        assert (pattern[0, :, 0, 0] == 1).all()
    assert ANSWERS[4].startswith("To 1. ") and "its share is 1 in every head" in ANSWERS[4]


def test_five_bytes_of_the_cache(embedded_model, right):
    letters, config = right["letters"], embedded_model.config
    one = block_bytes(config, 1, 1, "bfloat16")
    pages = -(-1000 // 16)
    seven = block_bytes(official_config("7B"), 1, 1, "bfloat16")
    assert ANSWERS[5] == (
        f"{one:,} bytes: {len(right['layers'])} layers x 2 (key and value) x {letters['K']} KV "
        f"heads x {letters['d']} numbers x 2 bytes. 1,000 tokens need {pages} blocks, "
        f"{pages * 16 * one:,} bytes. The real 7B (28 layers, heads of 128) takes {seven:,} bytes "
        "a token."
    )
    cache = embedded_model.new_cache(pages, 16)  # in float32
    assert cache.pool.numel() * 2 == pages * 16 * one
    assert right["dtype"] == "bfloat16" and right["blocks"]["token_bytes"] == one


def test_six_where_a_key_lies(right):
    S = right["blocks"]["size"]
    assert S == 4 and (9 // S, 9 % S) == (2, 1)
    assert (
        "third block of the table, at place 1: 9 = 2 x 4 + 1. Its slot is block x 4 + 1"
        in (ANSWERS[6])
    )


def test_seven_the_last_row_of_the_lens(right):
    last = right["layers"][-1]["lens"]
    assert last["rank"] == 1 and last["predictions"][0] == right["predictions"][0]
    assert ANSWERS[7].startswith("Number 1, always: ")


def test_eight_the_parts_add_up_to_the_logit(right):
    total = right["embed_adds"]
    for layer in right["layers"]:
        total += layer["mlp_adds"] + layer["rest_adds"] + sum(h["adds"] for h in layer["heads"])
    parts = [right["embed_adds"], *(layer["mlp_adds"] for layer in right["layers"])]
    parts += [head["adds"] for layer in right["layers"] for head in layer["heads"]]
    assert total == pytest.approx(right["logit"], abs=2**-7 * sum(map(abs, parts)))  # bfloat16
    assert ANSWERS[8].startswith("The logit of the predicted token, to rounding.")


def test_nine_a_contribution_is_not_what_the_logit_falls_by(embedded_model, right):
    """For heads of the first layer, which all others read."""
    ids = torch.tensor([[token["id"] for token in right["tokens"]]])
    chosen, heads = right["predictions"][0]["id"], right["layers"][0]["heads"]
    strongest = sorted(heads, key=lambda head: -abs(head["adds"]))[:4]

    def falls_by(head):
        """What the logit loses without the head."""

        def off(z, name):
            z = z.clone()
            z[:, :, head] = 0
            return z

        without = embedded_model.run_with_hooks(ids, [("layers.0.attn.z", off)])
        return (logits - without)[0, -1, chosen].item()

    with torch.no_grad():
        logits = embedded_model(ids)
        gaps = [abs(falls_by(h["head"]) - h["adds"]) / abs(h["adds"]) for h in strongest]
    assert max(gaps) > 0.1
    assert ANSWERS[9].startswith("Not exactly: later layers read what the head wrote")


def test_ten_rope_interleaved(told):
    (it,) = of_fault(told, "rope-interleaved")
    assert ANSWERS[10].startswith(f"At `{it['first']['point']}`, token {it['first']['token']}.")
    assert [place["same"] for place in it["places"]][:2] == [True, False]
    assert ANSWERS[10].endswith("Its logits have the same bits.")


def test_eleven_heads_tiled(told):
    (it,) = of_fault(told, "heads-tiled")
    letters, first = it["right"]["letters"], it["first"]
    right = [h for h in range(letters["H"]) if h % letters["K"] == h // letters["G"]]
    head = int(first["at"].strip("[]").split(", ")[0])
    assert ANSWERS[11] == (
        f"Heads {', '.join(map(str, right[:-1]))} and {right[-1]}. The first wrong number is that "
        f"of head {head}, at `{first['point']}`, already at token {first['token']}."
    )
    # So does the model: in layer 0, where the inputs are right, these heads read what they should.
    sides = [it[side]["layers"][0]["heads"] for side in ("right", "wrong")]
    same = [a["head"] for a, b in zip(*sides) if a["pattern"] == b["pattern"]]
    assert same == right
    assert f"h % {letters['K']} in place of h // {letters['G']}" in PAGE


def test_twelve_final_norm_missing(told):
    (it,) = of_fault(told, "final-norm-missing")
    streams = [p for p in it["points"] if p["point"].endswith("resid_post")]
    assert all(each["size"] == 0 for each in streams)
    assert ANSWERS[12].startswith(f"0 after all {len(streams)} layers: nothing before `")
    assert f"`{it['first']['point']}`" in ANSWERS[12]


def test_thirteen_stale_block(told):
    short, long = of_fault(told, "stale-block")
    assert len(short["places"]) == 16 and short["first"] is None
    assert all(place["same"] for place in short["places"])
    wrong = [place["position"] for place in long["places"] if not place["same"]]
    assert ANSWERS[13].startswith(f"Token {wrong[0]}, the first of the second block.")
    assert long["first"]["token"] == wrong[0]


def test_fourteen_what_is_reported(told):
    (it,) = of_fault(told, "logprobs-of-temperature")
    assert it["first"] is None and all(point["size"] == 0 for point in it["points"])
    right, wrong = (it[side]["predictions"] for side in ("right", "wrong"))
    assert [p["id"] for p in right] == [p["id"] for p in wrong]
    assert wrong[0]["probability"] > right[0]["probability"]
    assert ANSWERS[14].startswith("None: the logits are right")
    assert len(FAULTS) > 70
