"""What clients may ask: OpenAI's fields, and vLLM's beside them.

A field that nobody knows is refused: it would change the answer elsewhere. Fields that change
nothing here (`user`, `metadata`, ...) are taken. Values are checked where they are used; here are
only their types. Of many mistakes the first is told, and the others are not looked for: a body has
room for millions, and pydantic keeps a kilobyte for each.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from minqwen.files import printable

Flag = Annotated[bool, Field(strict=True)]
Integer = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]
TokenIds = Items[Integer]
NUMBER: TypeAdapter[float] = TypeAdapter(Number)


class Model(BaseModel):
    """An object with these fields only."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def of_unknown_fields_one(cls, value: Any) -> Any:
        """The value without the unknown fields after the first of them."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        left_out = set([name for name in value if name not in known][1:])
        return {name: part for name, part in value.items() if name not in left_out}


# ---- parts --------------------------------------------------------------------------------------


class StreamOptions(Model):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False
    include_obfuscation: Flag | None = None  # nothing is padded


class JsonSchema(BaseModel):
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | Flag | None, Field(alias="schema")] = None
    strict: Flag | None = None  # the grammar is always followed


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Structured(Model):
    """vLLM's structured_outputs: one of these."""

    json_: Annotated[dict[str, Any] | Text | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Items[Text] | None = None
    grammar: Text | None = None
    json_object: Flag | None = None


class FunctionOfTool(BaseModel):
    name: Annotated[str, Field(strict=True, min_length=1, max_length=256)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class ToolShape(BaseModel):
    type: Literal["function"]
    function: FunctionOfTool


class PartOfContent(BaseModel):
    type: Literal["text"]
    text: Text


class FunctionOfCall(BaseModel):
    name: Text
    arguments: Text | dict[str, Any]


class CallShape(BaseModel):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionOfCall


class MessageShape(BaseModel):
    role: Text
    content: Text | Items[PartOfContent] | None = None
    tool_calls: Items[CallShape] | None = None


def _has_shape_of_tool(value: dict[str, Any]) -> dict[str, Any]:
    return _checked(ToolShape, value)


def _has_shape_of_message(value: dict[str, Any]) -> dict[str, Any]:
    return _checked(MessageShape, value)


def _checked(shape: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """The value itself, as the client wrote it: the template sees its keys in their order."""
    try:
        shape.model_validate(value)
    except ValidationError as error:
        raise ValueError(first_mistake(error.errors())[1]) from None
    return value


def first_mistake(errors: Any) -> tuple[str, str]:
    """The field, and what is wrong with it, of the first of pydantic's errors."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = str(first["msg"]).removeprefix("Value error, ")
    return place, f"{place}: {message}" if place else message


_FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
    },
    "required": ["name"],
}
Tool = Annotated[
    dict[str, Any],
    AfterValidator(_has_shape_of_tool),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _FUNCTION_SCHEMA},
            "required": ["type", "function"],
        }
    ),
]
Message = Annotated[
    dict[str, Any],
    AfterValidator(_has_shape_of_message),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "role": {"type": "string"},
                "content": {"anyOf": [{"type": kind} for kind in ("string", "array", "null")]},
            },
            "required": ["role"],
        }
    ),
]


def _are_numbers(value: dict[str, Any]) -> dict[str, float]:
    for key, number in value.items():
        try:
            value[key] = NUMBER.validate_python(number)
        except ValidationError as error:
            mistake = first_mistake(error.errors())[1]
            raise ValueError(f"{printable(key[:20])}: {mistake}") from None
    return value


Numbers = Annotated[
    dict[str, Any],
    AfterValidator(_are_numbers),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


class NamedFunction(BaseModel):
    name: Text


class NamedTool(Model):
    type: Literal["function"] = "function"
    function: NamedFunction


# ---- requests -----------------------------------------------------------------------------------


class Sampled(Model):
    """What /v1/completions and /v1/chat/completions have in common."""

    model: Text | None = None
    n: Integer | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: Numbers | None = None
    seed: Integer | None = None
    stop: Text | Items[Text] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: Integer | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None
    min_tokens: Integer | None = None
    bad_words: Items[Text] | None = None
    skip_special_tokens: Flag | None = None
    prompt_logprobs: Integer | None = None
    structured_outputs: Structured | None = None
    return_token_ids: Flag | None = None
    return_tokens_as_token_ids: Flag | None = None
    cache_salt: Text | None = None
    # These change nothing.
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: Flag | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


class CompletionRequest(Sampled):
    prompt: Text | TokenIds | Items[Text] | Items[TokenIds]
    echo: Flag = False
    logprobs: Integer | None = None
    best_of: Integer | None = None
    suffix: Text | None = None
    add_special_tokens: Flag = True


class OfChat(Model):
    """What makes the prompt of a chat."""

    messages: Items[Message]
    tools: Items[Tool] | None = None
    documents: Items[dict[str, Any]] | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag = False
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(OfChat, Sampled):
    continue_token_ids: TokenIds | None = None  # ours: they follow the prompt of the messages
    max_completion_tokens: Integer | None = None
    logprobs: Flag | None = None
    top_logprobs: Integer | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag | None = None
    modalities: Items[Literal["text"]] | None = None
    echo: Literal[False] = False


class TokenizeRequest(Model):
    """A prompt, or the messages of a chat."""

    model: Text | None = None
    prompt: Text | None = None
    add_special_tokens: Flag = True
    return_token_strs: Flag = False
    messages: Items[Message] | None = None
    tools: Items[Tool] | None = None
    documents: Items[dict[str, Any]] | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Model):
    model: Text | None = None
    tokens: TokenIds
    return_token_bytes: Flag = False  # ours
