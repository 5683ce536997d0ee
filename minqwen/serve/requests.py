"""What clients may ask: OpenAI's fields, and vLLM's beside them.

A field that nobody knows is refused: it would change the answer elsewhere. Fields that change
nothing here (`user`, `metadata`, ...) are taken. Values are checked where they are used; here are
only their types.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

Flag = Annotated[bool, Field(strict=True)]
Integer = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
TokenIds = list[Integer]


class Model(BaseModel):
    """An object with these fields only."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


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
    choice: list[Text] | None = None
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
    content: Text | list[PartOfContent] | None = None
    tool_calls: list[CallShape] | None = None


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
    return place, f"{place}: {first['msg']}" if place else str(first["msg"])


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
    logit_bias: dict[str, Number] | None = None
    seed: Integer | None = None
    stop: Text | list[Text] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: Integer | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None
    min_tokens: Integer | None = None
    bad_words: list[Text] | None = None
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
    prompt: Text | TokenIds | list[Text] | list[TokenIds]
    echo: Flag = False
    logprobs: Integer | None = None
    best_of: Integer | None = None
    suffix: Text | None = None
    add_special_tokens: Flag = True


class OfChat(Model):
    """What makes the prompt of a chat."""

    messages: list[Message]
    tools: list[Tool] | None = None
    documents: list[dict[str, Any]] | None = None
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
    modalities: list[Literal["text"]] | None = None
    echo: Literal[False] = False


class TokenizeRequest(Model):
    """A prompt, or the messages of a chat."""

    model: Text | None = None
    prompt: Text | None = None
    add_special_tokens: Flag = True
    return_token_strs: Flag = False
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Model):
    model: Text | None = None
    tokens: TokenIds
    return_token_bytes: Flag = False  # ours
