"""JSON schemas: the limits of llguidance are refused by name, or never reach a result."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from support.hostile import values as hostile
from support.structured import END, Writer, byte_tokenizer

from minqwen.errors import SamplingError
from minqwen.sampling.json_schema import KEYWORDS, for_grammar, read_schema
from minqwen.sampling.structured import ConstraintCompiler, StructuredOutputs
from minqwen.sampling.text_check import text_check


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return Writer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def test_a_schema_is_given_as_a_dict_or_as_json():
    schema = {"type": "array", "items": {"maximum": 3}}
    for form in (schema, json.dumps(schema)):
        assert StructuredOutputs(json=form).json == schema


@pytest.mark.parametrize("word", sorted(KEYWORDS))
def test_every_keyword_takes_a_value_or_is_told_with_its_place(word):
    """A pattern that is a number, patternProperties that are a list, and so on."""
    for value in hostile.VALUES.values():
        for schema in ({word: value}, {"properties": {"a": {word: value}}}):
            line = hostile.refusal(
                lambda schema=schema: for_grammar(read_schema("it", schema)), SamplingError
            )
            assert line is None or "it" in line, line


@pytest.mark.parametrize("word", ["type", "required"])
def test_names_are_texts_however_many_there_are(word):
    """jsonschema would compare all of them with each other."""
    with pytest.raises(SamplingError, match=rf"#/{word} is \[.*, expected a list of texts"):
        StructuredOutputs(json={word: [[]] + ["x"] * 50_000})
    assert StructuredOutputs(json={word: ["string", "null"]})


def test_a_pattern_is_a_text_and_patterns_of_names_are_an_object():
    for wrong, what in (("pattern", "a regex"), ("patternProperties", "an object of schemas")):
        with pytest.raises(SamplingError, match=f"#/{wrong} is 1.5, expected {what}"):
            StructuredOutputs(json={wrong: 1.5})


# ---- numbers ------------------------------------------------------------------------------------

BOUNDS = (-2, -1.5, -1, -0.75, -0.5, 0, 0.25, 0.5, 1, 1.5, 2, 10, 10.5)
TEXTS = [
    sign + whole + part
    for sign in ("", "-")
    for whole in ("0", "1", "2", "9", "10", "11")
    for part in ("", ".0", ".00", ".01", ".25", ".250", ".3", ".5", ".51", ".75", ".9")
]


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize("low_word", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("high_word", ["maximum", "exclusiveMaximum"])
def test_no_number_outside_its_bounds_can_be_written(writer, kind, low_word, high_word):
    """llguidance lets 0 through in (0, 0.5] and 1 in (1, 1.5]."""
    written = 0
    for low, high in itertools.combinations(BOUNDS, 2):
        if high - low > 2:  # both far away: nothing special
            continue
        schema = {"type": kind, low_word: low, high_word: high}
        near = [text for text in TEXTS if low - 1 <= float(text) <= high + 1]
        try:
            found = writer.lets_through(schema, *near)
        except SamplingError as error:
            assert kind == "integer" and "Unsatisfiable" in str(error)
            continue
        check = text_check(schema)
        for text in found:
            check(text)
        written += len(found)
    assert written > 20


def test_numbers_beside_an_exclusive_bound_can_still_be_written(writer):
    for low, high, text in ((0, 0.5, "0.000001"), (1, 1.5, "1.0000001"), (0, 1, "0.01")):
        above = {"type": "number", "exclusiveMinimum": low, "maximum": high}
        below = {"type": "number", "minimum": -high, "exclusiveMaximum": -low}
        assert writer.lets_through(above, text) and not writer.lets_through(above, str(low))
        assert writer.lets_through(below, f"-{text}")
        assert not writer.lets_through(below, f"-{low}")


def test_a_bound_is_replaced_wherever_it_stands_and_the_given_schema_stays():
    bound = {"exclusiveMinimum": 1, "minimum": 0, "maximum": 1.5}
    schema = {"properties": {"exclusiveMinimum": {"allOf": [{"items": bound}]}}}
    before = json.dumps(schema)
    found = for_grammar(schema)["properties"]["exclusiveMinimum"]["allOf"][0]["items"]
    assert found == {"minimum": 1.00000000000001, "maximum": 1.5}
    assert json.dumps(schema) == before
    assert for_grammar({"exclusiveMinimum": 0.5}) == {"exclusiveMinimum": 0.5}
    assert for_grammar({"exclusiveMaximum": 0, "maximum": -2}) == {"maximum": -2}


@pytest.mark.parametrize(
    "number, text",
    [(n, str(n)) for n in (2**53, 2**62, -(2**60), 0.1, 1 / 3, 0)]
    + [(1e18, "1000000000000000000"), (-2.5e-9, "-0.0000000025")],
)
def test_a_number_that_llguidance_holds_can_be_written(writer, number, text):
    for schema in ({"const": number}, {"enum": [None, number]}):
        assert writer.lets_through(schema, text)
        text_check(schema)(text)


BIG = [2**53 + 1, 10**30, 2**63, -(2**63), 1e21, 1e300, 0.9999999999999999, 459.01735416537804]


@pytest.mark.parametrize("number", BIG)
@pytest.mark.parametrize("word", ["const", "enum", "minimum", "maximum", "exclusiveMinimum"])
def test_a_number_that_llguidance_rounds_is_refused_with_its_place(word, number):
    schema = {"type": "integer", word: [{"x": [number]}] if word == "enum" else number}
    with pytest.raises(SamplingError) as error:
        StructuredOutputs(json={"properties": {"a/b": schema}})
    message = str(error.value)
    assert f"structured_outputs.json#/properties/a~1b/{word} is {number!r}, expected" in message
    assert "\n" not in message


def test_an_exclusive_bound_has_room_for_one_more():
    StructuredOutputs(json={"minimum": 2**53})
    with pytest.raises(SamplingError, match="#/exclusiveMinimum is 9007199254740992, expected"):
        StructuredOutputs(json={"exclusiveMinimum": 2**53})


# ---- dead ends ----------------------------------------------------------------------------------

DECLARED = {"x1": {"type": "integer"}, "b": {"type": "null"}}


@pytest.mark.parametrize(
    "schema, where",
    [
        (
            {"properties": DECLARED, "patternProperties": {"^x1$": {}}},
            "#/patternProperties/^x1$: no name is left",
        ),
        (
            {"properties": {"o": {"required": ["b"], "patternProperties": {"^(b|x1)$": {}}}}}
            | {"$defs": {"d": {"properties": DECLARED}}},
            "#/properties/o/patternProperties/^(b|x1)$: no name is left",
        ),
        ({"patternProperties": {"^[\x01-\x03]$": {}}}, "]$: no name is left"),
        ({"properties": {"a": {"pattern": "^\x01$"}}}, "#/properties/a/pattern: no string fits"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "#/$defs/a: its $ref leads"),
        (
            {"type": "string", "allOf": [{"pattern": "^[\x01-\x03]"}, {"pattern": "^.$"}]},
            "json#/allOf/0/pattern: no string fits",
        ),
        (
            {"type": "string", "allOf": [{"pattern": "^[\x01a]$"}, {"pattern": "^[\x01b]$"}]},
            "json: no text fits",
        ),
        ({"pattern": r"^a\x7f?"}, "/pattern: holds DEL, which"),
        ({"patternProperties": {r"[\u007F]": {}}}, "patternProperties/[\\u007F]: holds DEL, which"),
        ({"pattern": "^\x7f"}, "/pattern: holds DEL, which"),
        ({"pattern": "^(?:ab){2}+$"}, "/pattern: holds a possessive quantifier"),
        ({"anyOf": [{"$ref": "#"}]}, "json#: its $ref leads back to itself"),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"oneOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#"}},
            },
            "its $ref leads back to itself",
        ),
    ],
)
def test_what_would_leave_no_token_is_refused_with_its_place(writer, schema, where):
    schema = {"type": "object", "additionalProperties": False, **schema}
    if "pattern" in schema:
        schema["type"] = "string"
    with pytest.raises(SamplingError) as error:
        writer.begin(schema)
    assert where in str(error.value) and "\n" not in str(error.value)


def test_a_panic_of_llguidance_is_told_in_one_line(writer, monkeypatch):
    panic = type("PanicException", (BaseException,), {})  # pyo3's is no Exception either

    class Fails:
        grammar_from_json_schema = staticmethod(LLMatcher.grammar_from_json_schema)

        def __init__(self, *_, **__):
            raise panic("called `Option::unwrap()`\non a `None` value")

    monkeypatch.setattr(writer.compiler, "matcher_class", Fails)
    with pytest.raises(SamplingError) as error:
        writer.begin({"type": "null"})
    expected = (
        "structured_outputs.json: llguidance fails: called `Option::unwrap()` on a `None` value"
    )
    assert str(error.value) == expected


def test_patterns_beside_declared_names_are_fine_while_other_names_are_left(writer):
    schema = {
        "type": "object",
        "properties": DECLARED,
        "patternProperties": {"^x[0-9]$": {"type": "null"}},
        "additionalProperties": False,
    }
    schema["properties"] = {"x1": {"type": "null"}, "b": {"type": "null"}}
    assert writer.lets_through(schema, '{"x1":null,"b":null,"x2":null}')
    assert not writer.lets_through(schema, '{"c":null}')
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    assert writer.lets_through(tree, '{"next":{"next":{}}}')


def test_a_schema_that_is_wrong_is_told_with_its_place(writer):
    with pytest.raises(SamplingError, match="^structured_outputs.json#/properties/a/minLength: -1"):
        writer.begin({"properties": {"a": {"minLength": -1}}})
    with pytest.raises(SamplingError, match=r"^structured_outputs.json#/pattern: '\(' is not a"):
        writer.begin({"pattern": "("})


@pytest.mark.parametrize("depth", [10, 120, 250, 400, 3000])
@pytest.mark.parametrize("word", ["anyOf", "items", "properties", "const", "$ref"])
def test_a_schema_may_be_deep_or_is_refused_in_one_line(writer, word, depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {
            "anyOf": {"anyOf": [schema]},
            "items": {"type": "array", "items": schema},
            "properties": {"properties": {"a": schema}},
            "const": {"const": [schema.get("const")]},
            "$ref": schema,
        }[word]
    if word == "$ref":
        names = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(depth)}
        schema = {"$ref": "#/$defs/d0", "$defs": {**names, f"d{depth}": {"type": "null"}}}
    try:
        writer.begin(schema)
    except SamplingError as error:
        assert depth > 100 and len(str(error)) < 400 and "\n" not in str(error)


@pytest.mark.parametrize(
    "pattern, fits, others",
    [
        (r"^\W$", "!", "é"),
        (r"^[\W]$", "!", "éa"),
        (r"^[^\w]$", "!", "éa"),
        (r"^\D$", "aé", "7٣"),
        (r"^[^\d]$", "aé", "7٣"),
        (r"^\w\d?$", "a_7", "é!"),
        (r"^[\\W]$", "\\W", "w!"),
        (r"^\\W$", "", "w!"),
    ],
)
def test_letters_beyond_ascii_are_letters_for_python_and_none_for_the_grammar(
    writer, pattern, fits, others
):
    """JSON Schema's \\w is ASCII, Python's is not. What is written satisfies both."""
    schema = {"type": "string", "pattern": pattern}
    texts = [json.dumps(mark, ensure_ascii=False) for mark in fits + others]
    assert writer.lets_through(schema, *texts) == texts[: len(fits)]
    for text in texts[: len(fits)]:
        text_check(schema)(text)


@pytest.mark.parametrize(
    "pattern, fits, others",
    [
        (r'^[^"]$', "a\n\\", '"'),
        (r"^[^\\]$", 'a\n"', "\\"),
        (r"^[\x00-\x20]$", "\n\b ", '"\\a'),
        (r"^[\u0000-\u001f!]$", "\n!", '"\\a'),
        (r"^[^\S]$", "\n ", '"a'),
        (r"^[^\W]$", "a_", '"\n'),
        (r"^[^]a]$", 'b["', "a]"),
        (r"^[]a]$", "a]", '"['),
        (r"^[a[]$", "a[", '"]'),
        (r"^[\]\[]$", "][", '"\\'),
        (r"^[\s\S]$", 'a"\n\\', ""),
        (r"^.$", 'a"\\\t', "\n"),
        (r"^\++$|^[+*]+$", "+*", "a"),
    ],
)
def test_a_class_with_all_control_characters_lets_no_quote_through(writer, pattern, fits, others):
    """llguidance writes such a class as if quote and backslash were in it."""
    schema = {"type": "string", "pattern": pattern}
    texts = [json.dumps(mark, ensure_ascii=False) for mark in fits + others]
    assert writer.lets_through(schema, *texts) == texts[: len(fits)]
    for text in texts[: len(fits)]:
        text_check(schema)(text)


# ---- whatever the schema ------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "x1", "x2", "yy"])
NUMBERS = st.sampled_from([0, 1, -1, 2, 5, 10, -3, 0.5, 1.5, -0.5, 0.25])
BOUND_WORDS = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]
NUMERIC = st.builds(
    lambda kind, bounds: {"type": kind, **bounds},
    st.sampled_from(["number", "integer"]),
    st.dictionaries(st.sampled_from(BOUND_WORDS), NUMBERS, max_size=2),
)
STRINGS = st.fixed_dictionaries(
    {"type": st.just("string"), "maxLength": st.integers(0, 4)},
    optional={"pattern": st.sampled_from(["^[a-z]*$", "[0-9]", "b$", "^[^a]+$", "^$"])},
)
VALUES = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(["", "x1", "\n", '"q"']))
CONSTANTS = st.one_of(
    st.builds(lambda value: {"const": value}, VALUES | st.lists(VALUES, max_size=2)),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=3)),
    st.builds(lambda d: {"const": d}, st.dictionaries(NAMES, VALUES, max_size=2)),
)
LEAVES = st.one_of(NUMERIC, STRINGS, CONSTANTS, st.just({"$ref": "#/$defs/d"}))
PATTERNS = st.sampled_from(["^x[0-9]$", "^x1$", "^(a|b)$", "^y+$"])


def branches(inner):
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "additionalProperties": st.just(False) | inner},
        optional={
            "properties": st.dictionaries(NAMES, inner, max_size=3),
            "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
            "required": st.lists(NAMES, max_size=2, unique=True),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "maxItems": st.integers(0, 3)},
        optional={"items": inner, "prefixItems": st.lists(inner, min_size=1, max_size=2)},
    )
    several = st.builds(
        lambda word, schemas: {word: schemas},
        st.sampled_from(["anyOf", "allOf", "oneOf"]),
        st.lists(inner, min_size=1, max_size=2),
    )
    return objects | arrays | several


SCHEMAS = st.builds(
    lambda schema, definition: {**schema, "$defs": {"d": definition}},
    st.recursive(LEAVES, branches, max_leaves=5),
    st.one_of(NUMERIC, STRINGS, CONSTANTS),
)


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_a_schema_is_refused_or_every_walk_through_the_mask_fits(writer, schema, seed):
    try:
        check = text_check(schema)
        writer.begin(schema)
    except SamplingError as error:
        assert "\n" not in str(error)
        return
    for more in range(3):
        text = writer.walk(schema, seed + more)
        if text is not None:
            check(text)


# ---- a tokenizer and a model of two sizes -------------------------------------------------------


@pytest.mark.parametrize("width", [40, 255, 257, 300])
def test_a_model_may_have_fewer_rows_than_the_tokenizer_tokens_or_more(tmp_path, width):
    tokenizer = byte_tokenizer(tmp_path)
    constraint = ConstraintCompiler(tokenizer, width, [7, END]).constraint(
        StructuredOutputs(regex=".?")
    )
    mask = constraint.mask()
    assert mask.shape == (width,) and mask[7] and int(mask.sum()) > 30
    assert not mask[END + 1 :].any()
    other = next(i for i in mask.nonzero()[:, 0].tolist() if i not in (7, END))
    constraint.accept(other)
    assert constraint.finished


def test_an_end_token_that_the_model_cannot_write_is_refused(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    for ends in ([END], []):
        with pytest.raises(SamplingError, match="needs an end token that the model can write"):
            ConstraintCompiler(tokenizer, 200, ends)
