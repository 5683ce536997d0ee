"""Structured output: whatever the logits are, a text that finishes parses and validates."""

import json
import lzma
import re
import sys

import jsonschema
import llguidance  # noqa: F401  (the extra [json], which [test] brings as well)
import numpy as np
import pytest
import torch
from support.paths import DATA
from support.sampling import make_row

from minqwen.errors import SamplingError
from minqwen.sampling.draw import sample
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.structured import ConstraintCompiler, StructuredOutputs
from minqwen.tokenizer import Tokenizer
from minqwen.tokenizer.backends import ByteLevelBPE

MERGES = 6000  # of Qwen2.5's 151,387: short to load, and with the tokens that JSON is made of
END, IM_END = 256 + MERGES, 256 + MERGES + 1
WIDTH = 256 + MERGES + 100  # the model has more logits than the tokenizer has tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("small_qwen")
    merges = (
        lzma.decompress((DATA / "tokenizer" / "merges.txt.xz").read_bytes()).decode().splitlines()
    )
    merges = [line for line in merges if not line.startswith("#version")][:MERGES]
    vocab = {symbol: i for i, symbol in enumerate(ByteLevelBPE.alphabet)}
    for line in merges:
        vocab[line.replace(" ", "")] = len(vocab)
    assert len(vocab) == END
    (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    special = {
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    added = {
        str(END): {"content": "<|endoftext|>", **special},
        str(IM_END): {"content": "<|im_end|>", **special},
        str(IM_END + 1): {"content": "<tool_call>", **special, "special": False},
    }
    (path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added}), encoding="utf-8"
    )
    return Tokenizer.from_dir(path)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return ConstraintCompiler(tokenizer, WIDTH, [END, IM_END])


def closing(tokenizer, value):
    """Logits [V]: `value` for tokens with a quote or a closing bracket, else 0."""
    out = torch.zeros(WIDTH)
    out[
        [i for i in range(tokenizer.vocab_size) if re.search(rb'["}\]]', tokenizer.token_bytes(i))]
    ] = value
    return out


def write(compiler, tokenizer, spec, seed, limit=400, bias=None, temperature=1.0):
    """Random logits, masked: (text, finished?). What closes a string or an object is likelier."""
    rng = np.random.default_rng(seed)
    constraint = compiler.constraint(spec)
    noise = torch.from_numpy(rng.normal(0, 2, WIDTH)).float()
    tilt = closing(tokenizer, 5.0) + noise if bias is None else bias
    out = []
    while not constraint.finished and len(out) < limit:
        mask = constraint.mask()
        assert mask.shape == (WIDTH,) and mask.dtype == torch.bool and mask.any()
        assert not mask[tokenizer.vocab_size :].any() and bool(mask[END]) == bool(mask[IM_END])
        logits = tilt + torch.from_numpy(rng.normal(0, 2, WIDTH)).float()
        row = make_row(SamplingParams(temperature=temperature), (), out, seed, mask=mask)
        (token,), _ = sample(logits[None], [row])
        constraint.accept(token)
        out.append(token)
    text = tokenizer.decode([t for t in out if t not in (END, IM_END)])
    assert not constraint.finished or (constraint.mask().nonzero()[:, 0].tolist() == [END, IM_END])
    return text, constraint.finished


SCHEMAS = {
    "person": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "age"],
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "mail": {"type": "string", "maxLength": 5},
        },
    },
    "numbers": {
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": {"type": "number", "minimum": -2, "maximum": 7.5},
    },
    "multiples": {
        "type": "array",
        "maxItems": 3,
        "items": {"type": "integer", "multipleOf": 7, "maximum": 1000, "minimum": 0},
    },
    "choices": {"enum": ["red", 5, None, True, {"a": [1, 2]}, '\u00e9\n"\\', -1.5]},
    "any_of": {
        "anyOf": [
            {"type": "boolean"},
            {"type": "array", "items": {"const": "x"}, "maxItems": 3},
            {"type": "null"},
        ]
    },
    "one_of": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "all_of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 99}]},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "additionalProperties": False,
                "required": ["v"],
                "properties": {"v": {"enum": [0, 1]}, "next": {"$ref": "#/$defs/node"}},
            }
        },
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
    "open": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["a"],
        "additionalProperties": {"type": "string", "maxLength": 2},
        "maxProperties": 3,
        "minProperties": 1,
    },
    "keys": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "null"}},
        "additionalProperties": False,
    },
    "date": {"type": "string", "format": "date", "title": "a day", "description": "any"},
}


def test_only_what_the_regex_allows_may_come_next(compiler, tokenizer):
    def allowed():
        return {tokenizer.id_to_token(i) for i in constraint.mask().nonzero()[:, 0].tolist()}

    constraint = compiler.constraint(StructuredOutputs(regex="[0-9]a?"))
    assert allowed() == set("0123456789")
    constraint.accept(tokenizer.token_to_id("7"))
    assert allowed() == {"a", "<|endoftext|>", "<|im_end|>"}
    constraint.accept(tokenizer.token_to_id("a"))
    assert constraint.finished


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_finishes_validates(compiler, tokenizer, name):
    spec, finished = StructuredOutputs(json=SCHEMAS[name]), 0
    for seed in range(8):
        text, done = write(compiler, tokenizer, spec, seed, limit=200)
        if done:
            finished += 1
            jsonschema.validate(json.loads(text), SCHEMAS[name], jsonschema.Draft202012Validator)
    assert finished >= 4


def test_a_schema_may_be_a_string_and_json_object_is_any_object(compiler, tokenizer):
    assert StructuredOutputs(json='{"type": "null"}') == StructuredOutputs(json={"type": "null"})
    assert write(compiler, tokenizer, StructuredOutputs(json='{"type": "null"}'), 0) == (
        "null",
        True,
    )
    for spec, kinds in (
        (StructuredOutputs(json_object=True), dict),
        (StructuredOutputs(json={}), object),
    ):
        bias = closing(tokenizer, 7.0)
        texts = [write(compiler, tokenizer, spec, seed, limit=100, bias=bias) for seed in range(8)]
        done = [json.loads(text) for text, finished in texts if finished]
        assert len(done) >= 4 and all(isinstance(value, kinds) for value in done)
        assert kinds is dict or not all(isinstance(value, dict) for value in done)


def test_a_name_has_one_spelling_only(compiler, tokenizer):
    """An escaped name would parse as the property it spells, and bring a value of another type."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    }

    def fits(text):
        constraint = compiler.constraint(StructuredOutputs(json=schema))
        try:
            for byte in text.encode():  # one token per byte
                constraint.accept(
                    next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte]))
                )
        except SamplingError:
            return False
        return constraint.finished

    assert fits('{"a":1,"b":"x"}') and fits('{"a": 1,\n                "b\\n":"\u00e9"}')
    for text in (
        '{"a":1,"\\u0061":"x"}',
        '{"a":1,"a":"x"}',
        '{"a":1,"b":"\\u00e9"}',
        '{"a":1,\n                 "b":"x"}',
        '{"a":1,  "b":"x"}',
        '{"a":1,\n\n"b":""}',
    ):
        assert not fits(text), text


def test_white_space_cannot_run_to_the_limit(compiler, tokenizer):
    blank = torch.tensor(
        [
            100.0 * len(b) if (b := tokenizer.token_bytes(i)) and not b.strip() else 0.0
            for i in range(tokenizer.vocab_size)
        ]
        + [0.0] * (WIDTH - tokenizer.vocab_size)
    )
    for name in ("person", "numbers", "any_of", "tuple"):
        spec = StructuredOutputs(json=SCHEMAS[name])
        text, done = write(compiler, tokenizer, spec, 1, bias=blank, temperature=0)
        assert done and max(map(len, re.findall(r"\s+", text)), default=0) <= 17
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize(
    "regex",
    [r"[a-f]{3}-[0-9]{2}", r"(yes|no|maybe)", r"(\+49|0)[1-9][0-9]{3,5}", r"[\u00e9\u4e2d]{2}"],
)
def test_regex(compiler, tokenizer, regex):
    for seed in range(6):
        text, done = write(compiler, tokenizer, StructuredOutputs(regex=regex), seed)
        assert done and re.fullmatch(regex, text)


def test_choice(compiler, tokenizer):
    choices = [
        "yes",
        "yes!",
        'a "quoted"\n one\\',
        "\U0001f600",
        "\u4e2d\u6587",
        " led by a space",
        "<|im_end|>",
    ]
    seen = set()
    for seed in range(30):
        text, done = write(compiler, tokenizer, StructuredOutputs(choice=choices), seed)
        assert done and text in choices
        seen.add(text)
    assert len(seen) >= 4


@pytest.mark.parametrize(
    "text",
    ["a\u0301", "\\a\u0301b", "e\u0301" * 9, "\u1e9b\u0323", "\u2126\u212b", "\ufb01n\u0303"],
)
def test_a_text_that_the_tokenizer_would_normalise_is_written_as_it_is(compiler, tokenizer, text):
    """Where the grammar forces a text, llguidance asks the tokenizer for its tokens."""
    for spec in (StructuredOutputs(choice=[text]), StructuredOutputs(json={"const": [text]})):
        for seed in range(3):
            written, done = write(compiler, tokenizer, spec, seed)
            assert done and text in written and (spec.json is None or json.loads(written) == [text])


def test_grammar(compiler, tokenizer):
    spec = StructuredOutputs(grammar='start: sum\nsum: NUM ("+" NUM)*\nNUM: /[1-9][0-9]?/')
    for seed in range(6):
        text, done = write(compiler, tokenizer, spec, seed)
        assert not done or eval(text) == sum(map(int, text.split("+")))


def test_special_tokens_only_end_and_only_a_complete_text(compiler, tokenizer):
    constraint = compiler.constraint(StructuredOutputs(regex="ab*"), stop_token_ids=[7])
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert not constraint.mask()[[7, END, IM_END, b]].any() and constraint.mask()[a]
    assert not constraint.finished
    for token in (b, END, 7):
        with pytest.raises(SamplingError, match=f"token {token} does not fit structured_outputs"):
            compiler.constraint(StructuredOutputs(regex="ab*"), [7]).accept(token)
    constraint.accept(a)
    assert constraint.mask()[[7, END, IM_END, b]].all() and not constraint.finished
    constraint.accept(7)
    assert constraint.finished
    with pytest.raises(SamplingError, match="does not fit"):
        constraint.accept(a)
    inside = compiler.constraint(StructuredOutputs(json={"type": "string"}))
    inside.accept(tokenizer.token_to_id('"'))
    assert (
        not inside.mask()[[END, IM_END]].any() and inside.mask()[IM_END + 1]
    )  # <tool_call> is text


def test_a_stop_token_is_no_text_even_where_the_grammar_has_it(compiler, tokenizer):
    seven, eight = tokenizer.token_to_id("7"), tokenizer.token_to_id("8")
    constraint = compiler.constraint(StructuredOutputs(regex="[0-9]{2}"), stop_token_ids=[seven])
    assert constraint.mask()[eight] and not constraint.mask()[seven]
    with pytest.raises(SamplingError, match=f"token {seven} does not fit"):
        constraint.accept(seven)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(), "no field"),
        (dict(regex="a", choice=["b"]), "regex and choice"),
        (dict(json_object=False), "no field"),
        (dict(json_object="yes"), "json_object"),
        (dict(json_object=0), "json_object is 0"),
        (dict(json="{"), "json is not JSON"),
        (dict(json="[]"), "json"),
        (dict(json=5), "json"),
        (dict(regex=""), "regex"),
        (dict(regex=5), "regex"),
        (dict(grammar=7), "grammar"),
        (dict(choice=[]), "choice"),
        (dict(choice="ab"), "choice"),
        (dict(choice=["a", ""]), "choice"),
        (dict(choice=5), "choice"),
        (dict(choice=["a", "\ud800"]), "choice"),
        (dict(regex="\ud800"), "regex"),
        (dict(grammar='start: "\ud800"'), "grammar"),
        (dict(json={"prefixItems": [{}] * 10_000}), "json# holds more than 10000 schemas"),
        (dict(json={"type": "array", "uniqueItems": True}), "'uniqueItems'"),
        (dict(json={"properties": {"a": {"not": {}}}}), "json#/properties/a: keyword 'not'"),
        (
            dict(json={"items": {"anyOf": [{}, {"dependencies": {}}]}}),
            "items/anyOf/1: keyword 'dependencies'",
        ),
        (dict(json={"x-guidance": {"lenient": True}}), "'x-guidance'"),
        (dict(json={"frobnicate": 1}), "'frobnicate'"),
        (dict(json={"requierd": ["a"]}), "did you mean 'required'?"),
        (dict(json={1: "a"}), "keyword 1"),
        (dict(json={"properties": {"a\n": {"not": 1}}}), "a\\n: keyword 'not'"),
        (
            dict(json={"type": "integer", "minimum": 3, "exclusiveMinimum": True}),
            "exclusiveMinimum",
        ),
        (dict(json={"multipleOf": 0.1}), "multipleOf"),
        (dict(json={"minProperties": 2}), "minProperties"),
        (dict(json={"minProperties": 2, "required": 5}), "minProperties"),
        (dict(json={"items": [{}]}), "items"),
        (dict(json={"properties": []}), "properties"),
        (dict(json={"anyOf": {}}), "anyOf"),
        (dict(json={"enum": ["a", "\x01"]}), "control character"),
        (dict(json={"const": "\x7f"}), "control character"),
        (dict(json={"const": "\ud800"}), "not JSON"),
        (dict(json={"const": float("nan")}), "not JSON"),
        (dict(json={"const": {1, 2}}), "not JSON"),
    ],
)
def test_a_bad_spec_is_refused_when_it_is_made(fields, words):
    with pytest.raises(SamplingError) as error:
        StructuredOutputs(**fields)
    message = str(error.value)
    assert words in message and "\n" not in message and "structured_outputs" in message


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(regex="a(?=b)"), "look"),
        (dict(regex="("), "regex"),
        (dict(json={"type": "strin"}), "strin"),
        (dict(json={"$ref": "http://x/y"}), "http://x/y"),
        (dict(json={"format": "zip"}), "zip"),
        (dict(json={"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (dict(json={"type": "integer", "minimum": 5, "maximum": 1}), "minimum"),
        (dict(grammar="start: other"), "other"),
    ],
)
def test_a_bad_grammar_is_refused_before_a_token_is_drawn(compiler, fields, words):
    with pytest.raises(SamplingError) as error:
        compiler.constraint(StructuredOutputs(**fields))
    message = str(error.value)
    assert message.startswith(f"structured_outputs.{next(iter(fields))}")
    assert words in message and "\n" not in message


def test_without_the_package_the_error_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SamplingError, match=r'pip install "minqwen\[json\]"'):
        ConstraintCompiler(tokenizer, WIDTH, [END])


def test_nothing_of_llguidance_that_compiles_is_loaded(compiler):
    assert "llguidance.torch" not in sys.modules
