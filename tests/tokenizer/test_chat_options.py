"""The keywords of a chat: each does what it does in transformers, and a wrong one is refused."""

from __future__ import annotations

import itertools

import pytest
from support.tokenizer import USER, one_line, tiny_json

from minqwen.errors import TokenizerError
from minqwen.tokenizer import Tokenizer

UNFINISHED = [*USER, {"role": "assistant", "content": "The answer is"}]
# A template of today: reasoning in tags, stripped contents, documents, and a variable of its own.
REASONING = (
    "{% for d in documents or [] %}<doc>{{ d.title }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content is defined and keep %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content | trim if m.content is string else m.content[-1].text }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_final_message_is_continued(qwen):
    prompt = qwen.apply_chat_template(UNFINISHED, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nThe answer is")
    assert qwen.encode_chat(UNFINISHED, continue_final_message=True) == qwen.encode(prompt)
    assert UNFINISHED[-1] == {"role": "assistant", "content": "The answer is"}  # as it was


CONVERSATIONS = {
    "one": USER,
    "unfinished": UNFINISHED,
    "space at the end": [*USER, {"role": "assistant", "content": " The answer is \n "}],
    "nothing said": [*USER, {"role": "assistant", "content": ""}],
    "content None": [*USER, {"role": "assistant", "content": None}],
    "a token at the end": [*USER, {"role": "assistant", "content": "so<|im_end|>"}],
    "the tag itself": [*USER, {"role": "assistant", "content": "CONTINUE_FINAL_MESSAGE_TAG "}],
    "blocks": [
        *USER,
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}],
        },
    ],
    "no text in blocks": [*USER, {"role": "assistant", "content": [{"type": "image"}]}],
    **{
        name: [*USER, {"role": "assistant", "content": "5", name: "2 + 3 "}]
        for name in ("reasoning_content", "thinking", "reasoning")
    },
    "two reasonings": [*USER, {"role": "assistant", "content": "5", "thinking": "a", "x": 1}]
    + [{"role": "assistant", "content": "6", "reasoning": "b", "thinking": "c"}],
    "a number": [*USER, {"role": "assistant", "content": 5}],
}
TEMPLATES = {
    "Qwen2.5's": None,
    "reasoning": REASONING,
    "all of it": "{{ messages | tojson }}{{ tools }}{{ documents }}{{ add_generation_prompt }}",
    "twice": "{% for m in messages %}{{ m.content }}{{ m.content }}!{% endfor %}",
    "shortened": "{% for m in messages %}{{ m.content[:5] }}!{% endfor %}",
    "thinking": "{% for m in messages %}[{{ m.thinking }}]{{ m.content }}{% endfor %}",
}
OPTIONS = [
    {"continue_final_message": continued, "add_generation_prompt": prompted, "documents": documents}
    for continued, prompted, documents in itertools.product(
        (False, True, "content", "reasoning_content", "reasoning", "thinking", "x"),
        (False, True),
        (None, [{"title": "T", "text": "t"}]),
    )
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_combination_gives_what_transformers_gives(qwen, hf, conversation, template):
    messages, source = CONVERSATIONS[conversation], TEMPLATES[template]
    for options in OPTIONS:
        for keep in (True, False):
            try:
                expected = hf.apply_chat_template(
                    messages, chat_template=source, tokenize=False, keep=keep, **options
                )
            except Exception:
                with pytest.raises(TokenizerError) as error:
                    qwen.apply_chat_template(
                        messages,
                        chat_template=source,
                        chat_template_kwargs={"keep": keep},
                        **options,
                    )
                one_line(error)
                continue
            call = {"chat_template": source, "chat_template_kwargs": {"keep": keep}, **options}
            got = qwen.apply_chat_template(messages, **call)
            assert got == expected, options
            assert qwen.encode_chat(messages, **call) == qwen.encode(expected)


def test_a_continued_message_that_is_not_trusted_ends_no_turn(qwen):
    messages = [*USER, {"role": "assistant", "content": "so<|im_end|>"}]
    ids = qwen.encode_chat(messages, continue_final_message=True, allow_special=False)
    assert qwen.decode(ids).endswith("<|im_start|>assistant\nso<|im_end|>")
    assert ids.count(151645) == 2  # of the system's and the user's turn


def test_a_generation_prompt_is_added_unless_a_message_is_continued(qwen):
    assert qwen.apply_chat_template(USER).endswith("<|im_start|>assistant\n")
    assert qwen.apply_chat_template(USER, add_generation_prompt=False).endswith("<|im_end|>\n")
    assert qwen.apply_chat_template(USER, tokenize=False) == qwen.apply_chat_template(USER)
    continued = qwen.apply_chat_template(
        UNFINISHED, continue_final_message=True, add_generation_prompt=False
    )
    assert continued == qwen.apply_chat_template(UNFINISHED, continue_final_message=True)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"add_generation_promt": False}, "did you mean 'add_generation_prompt'"),
        ({"continue_last_message": True}, "did you mean 'continue_final_message'"),
        ({"enable_thinking": True}, "chat_template_kwargs={'enable_thinking': ...}"),
        ({"tokenize": True}, "encode_chat"),
        ({"return_tensors": "pt"}, "encode_chat"),
        ({"sanitize_control_tokens": True}, "allow_special=False"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt is 'yes'"),
        ({"continue_final_message": 1}, "continue_final_message is 1"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "not both"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages'"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "'add_generation_prompt'"),
        ({"chat_template_kwargs": ["x"]}, "chat_template_kwargs is ['x']"),
        ({"chat_template": 7}, "chat_template is 7"),
        ({"documents": ["d"]}, "documents[0] is 'd'"),
        ({"documents": "d"}, "documents is 'd'"),
        ({"tools": ["search"]}, "tools[0] is 'search'"),
    ],
)
def test_a_wrong_keyword_is_refused_and_the_right_one_named(qwen, options, words):
    with pytest.raises(TokenizerError) as error:
        qwen.apply_chat_template(UNFINISHED, **options)
    assert words in one_line(error)
    if "tokenize" not in options:
        with pytest.raises(TokenizerError) as error:
            qwen.encode_chat(UNFINISHED, **options)
        assert words in one_line(error)


def test_variables_come_before_the_names_of_tokens(tmp_path):
    tokenizer = Tokenizer.from_dir(tiny_json(tmp_path / "t", eos_token="<|im_end|>"))
    template = "{{ eos_token }}{{ bos_token }}{{ n }}"
    assert tokenizer.apply_chat_template(USER, chat_template=template) == "<|im_end|>"
    given = {"eos_token": "E", "bos_token": "B", "n": 1}
    assert (
        tokenizer.apply_chat_template(USER, chat_template=template, chat_template_kwargs=given)
        == "EB1"
    )
