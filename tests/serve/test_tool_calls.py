"""Calls in Qwen's format: found in a text however it is cut, told to the template, forced."""

from __future__ import annotations

import dataclasses
import json
import shutil

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import DATA
from support.serving import NAME, engine, served

from minqwen import Tokenizer
from minqwen.sampling.structured import StructuredOutputs
from minqwen.serve.requests import ChatRequest
from minqwen.serve.tool_calls import CallParser, CallPiece, message_for_template

ARGUMENTS = '{"city": "P\\"}]aris", "days": [1, {}]}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
REVERSED = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Ur", "Tyre"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def parsed(*texts: str) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls (name, arguments) of a text in pieces."""
    parser = CallParser()
    pieces = [piece for text in texts for piece in parser.push(text)]
    pieces += parser.push("", final=True)
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, str):
            content += piece
        elif piece.name is not None:
            assert piece.id.startswith("call_") and piece.index == len(calls)
            calls.append((piece.name, piece.arguments))
        else:
            calls[piece.index] = (calls[piece.index][0], calls[piece.index][1] + piece.arguments)
    return content, calls


def test_a_call_is_found_beside_text():
    text = f"I look.\n{CALL}"
    assert parsed(text) == ("I look.", [("weather", ARGUMENTS)])
    assert json.loads(ARGUMENTS)["city"] == 'P"}]aris'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call at all\n", "no call at all\n", []),
        (f"{CALL}\n{CALL}", "", [("weather", ARGUMENTS)] * 2),
        (f"{CALL}\n  and then\n", "and then\n", [("weather", ARGUMENTS)]),
        (REVERSED, "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("a\n<tool_call>oh</tool_call> b", "a\n<tool_call>oh</tool_call> b", []),
        ("a\n<tool_call>[1]</tool_call>", "a\n<tool_call>[1]</tool_call>", []),
        ('a\n<tool_call>{"name": "f', 'a\n<tool_call>{"name": "f', []),
        ('<tool_call>{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
        ("1 < 2 <tool", "1 < 2 <tool", []),
    ],
)
def test_what_is_a_call_and_what_is_text(text, content, calls):
    assert parsed(text) == (content, calls)


@given(
    st.lists(
        st.sampled_from(["a", "\n", " ", "<", "<tool_call>", "</tool_call>", CALL, REVERSED, "{"]),
        max_size=8,
    ),
    st.lists(st.integers(0, 400), max_size=6),
)
def test_it_does_not_matter_where_the_text_was_cut(parts, cuts):
    text = "".join(parts)
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    assert parsed(*(text[a:b] for a, b in zip(ends, ends[1:]))) == parsed(text)
    assert parsed(*text) == parsed(text)


def test_arguments_come_before_the_call_is_whole():
    parser = CallParser()
    parser.push('<tool_call>\n{"name": "f", "arguments": {"a')
    (piece,) = parser.push('": 1')
    assert piece == CallPiece(0, '": 1')


def test_earlier_calls_go_to_the_template_as_objects():
    function = {"name": "f", "arguments": '{"a": 1}'}
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    (call,) = message_for_template(message)["tool_calls"]
    assert call["function"]["arguments"] == {"a": 1} and function["arguments"] == '{"a": 1}'


# ---- a model that knows tools -------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory, embedded, embedded_model):
    """A server of the embedded model under Qwen2.5's own chat template."""
    directory = tmp_path_factory.mktemp("tools")
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(embedded / name, directory)
    config = json.loads((embedded / "tokenizer_config.json").read_text())
    qwen = json.loads((DATA / "tokenizer" / "tokenizer_config.json").read_text())
    config["chat_template"] = qwen["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    llm = engine(embedded_model, Tokenizer.from_dir(directory), max_model_len=1000, num_blocks=300)
    with served(llm) as running:
        yield running


def ask(running, **fields):
    fields = {"messages": [{"role": "user", "content": "?"}], "tools": [WEATHER, CLOCK], **fields}
    return running.client().chat.completions.create(model=NAME, **fields)


def forced(running, text, monkeypatch):
    """Let the model write this text."""
    loop = running.service.loop
    submit, only = loop.submit, StructuredOutputs(choice=[text])

    def submit_forced(job, listener):
        params = dataclasses.replace(job.params, structured_outputs=only)
        submit(dataclasses.replace(job, params=params), listener)

    monkeypatch.setattr(loop, "submit", submit_forced)


def test_calls_are_told_whole_and_in_pieces(with_tools, monkeypatch):
    forced(with_tools, f"I look.\n{CALL}\n{REVERSED}", monkeypatch)
    whole = ask(with_tools).choices[0]
    calls = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls]
    assert calls == [("weather", ARGUMENTS), ("f", '{"a": 1}')]
    assert whole.message.content == "I look." and whole.finish_reason == "tool_calls"
    content, names, arguments, reason = "", {}, {}, None
    for chunk in ask(with_tools, stream=True, logprobs=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            names[call.index] = call.function.name or names[call.index]
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert (content, reason) == ("I look.", "tool_calls")
    assert [(names[i], arguments[i]) for i in sorted(names)] == calls


def test_the_template_tells_the_model_of_tools_unless_it_may_not_call_any(with_tools):
    body = {"return_token_ids": True}
    told = ask(with_tools, max_tokens=1, extra_body=body).prompt_token_ids
    expected = with_tools.service.tokenizer.encode_chat(
        [{"role": "user", "content": "?"}], tools=[WEATHER, CLOCK]
    )
    assert told == expected
    untold = ask(with_tools, max_tokens=1, tool_choice="none", extra_body=body)
    assert len(untold.prompt_token_ids) < len(told)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_come_comes(with_tools, choice):
    """Whatever the model would write: it has never seen a tool."""
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    found = ask(
        with_tools, tools=tools, tool_choice=choice, parallel_tool_calls=False, temperature=0
    )
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name == "weather" and found.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Ur", "Tyre")


def test_a_conversation_with_calls_is_read_as_transformers_does(with_tools):
    function = {"name": "weather", "arguments": '{"city": "Ur"}'}
    messages = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
    ]
    body = {"return_token_ids": True}
    found = ask(with_tools, messages=messages, max_tokens=1, extra_body=body)
    text = with_tools.service.tokenizer.decode(found.prompt_token_ids)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>' in text
    assert "<tool_response>\ndry\n</tool_response>" in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "no function of this"),
        ({"tool_choice": "required", "tools": []}, "there are no tools"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
                ],
            },
            "f.parameters",
        ),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "combined"),
        ({"tools": [{"type": "function"}]}, "function: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    ],
)
def test_what_cannot_be_is_refused(with_tools, fields, said):
    with pytest.raises(openai.BadRequestError) as error:
        ask(with_tools, **fields)
    assert said in error.value.body["message"]


def test_a_message_needs_a_role():
    with pytest.raises(ValueError, match="role"):
        ChatRequest(messages=[{"content": "?"}])
