"""OpenAI's names: what requests hold. Unknown names are refused with the nearest known one. Sampling names are vLLM's.

Answers are in `responses.py`. Nowhere else in the project do these names stand for anything.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """A JSON object of a request. Numbers must be numbers; names must be known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, data: Any) -> Any:
        names = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data if isinstance(data, dict) else ():
            if key not in names:
                close = difflib.get_close_matches(str(key), names, n=1)
                clause = f" (did you mean {close[0]!r}?)" if close else ""
                raise PydanticCustomError("unknown_parameter", "{clause}", {"name": str(key), "clause": clause})
        return data


class Whole(Body):
    """The body of a request."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, data: Any) -> Any:
        """JSON can spell half a surrogate pair, which no tokenizer and no answer can hold."""
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise PydanticCustomError("not_unicode", "The body holds text that is no Unicode") from None
        except (TypeError, ValueError):  # no JSON at all: bytes of another content type
            pass
        return data


class Loose(BaseModel):
    """A JSON object whose other keys are looked at later, or are nobody's business."""

    model_config = ConfigDict(extra="allow", strict=True)


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


def _first(value: Any) -> str:
    """Which of the spellings of an input this is, told by its first item, so that a mistake is reported once."""
    if not isinstance(value, list):
        return "<one>"
    first = value[0] if value else ""
    return "<ids>" if isinstance(first, int) else "<id lists>" if isinstance(first, list) else "<many>"


Stop = (
    Annotated[
        Annotated[NonEmpty, Tag("<one>")] | Annotated[list[NonEmpty], Field(max_length=4), Tag("<many>")],
        Discriminator(lambda value: "<many>" if isinstance(value, list) else "<one>"),
    ]
    | None
)
LogitBias = dict[str, Annotated[float, Field(ge=-100, le=100)]] | None
JsonObject = dict[str, JsonValue]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Body):
    """vLLM's constrained decoding: one of these."""

    json_: JsonObject | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None


class Extension(Body):
    """Our own parameters, under the one name `tailor`. The reserved ones are refused by name."""

    task: str | None = Field(None, description="one task of a prompt table")
    lora_scale: JsonValue = Field(None, description="reserved")
    steerlm: JsonValue = Field(None, description="reserved")
    rag: JsonValue = Field(None, description="reserved")
    guardrails: JsonValue = Field(None, description="reserved")


class Sampling(Whole):
    """What chat and text completions share."""

    model: NonEmpty
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 when not given")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: Stop = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="random when not given")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = None
    user: str | None = None
    top_k: int | None = Field(None, ge=-1, description="-1 or 0: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    tailor: Extension | None = None


class Part(Loose):
    """A piece of a message's content; texts and refusals can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


Content = (
    Annotated[
        Annotated[str, Tag("<one>")] | Annotated[list[Part], Tag("<many>")],
        Discriminator(lambda value: "<many>" if isinstance(value, list) else "<one>"),
    ]
    | None
)


class FunctionCall(Body):
    """What an assistant called, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Loose):
    """One call in an assistant's turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One turn. What a response's message holds may be sent back as it is."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    annotations: list[JsonValue] | None = None
    audio: None = None
    parsed: JsonValue = None


class Function(Body):
    """A function the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Loose):
    """A tool; only functions are supported."""

    type: str
    function: Function | None = None


class NamedFunction(Loose):
    """The name alone."""

    name: str


class NamedTool(Loose):
    """A tool by its name."""

    type: str
    function: NamedFunction | None = None


class AllowedTools(Body):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class ToolChoice(NamedTool):
    """The tool that must be called, or those that may."""

    allowed_tools: AllowedTools | None = None


class JsonSchema(Body):
    """A schema the answer must follow."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, description="what the context leaves when not given")
    max_tokens: int | None = Field(None, ge=1, json_schema_extra={"deprecated": True})
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = Field(None, json_schema_extra={"deprecated": True})
    function_call: Literal["none", "auto"] | NamedFunction | None = Field(None, json_schema_extra={"deprecated": True})
    response_format: ResponseFormat | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    service_tier: JsonValue = Field(None, description="ignored")
    prompt_cache_key: JsonValue = Field(None, description="ignored")
    prompt_cache_options: JsonValue = Field(None, description="ignored")
    prompt_cache_retention: JsonValue = Field(None, description="ignored")
    verbosity: JsonValue = Field(None, description="ignored")
    prediction: JsonValue = Field(None, description="ignored")
    moderation: JsonValue = Field(None, description="ignored")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="the thinking switch of the model's chat template; ignored where it has none"
    )
    modalities: list[str] | None = None
    audio: JsonValue = Field(None, description="refused")
    web_search_options: JsonValue = Field(None, description="refused")
    chat_template_kwargs: JsonObject | None = Field(None, description="refused unless empty")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


IGNORED = (
    *("service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("verbosity", "prediction", "moderation"),
)
"""Taken, named in the header x-ignored-params, and without effect."""


Ids = Annotated[list[TokenId], Field(min_length=1)]

Prompt = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[list[str], Field(min_length=1), Tag("<many>")]
    | Annotated[Ids, Tag("<ids>")]
    | Annotated[list[Ids], Field(min_length=1), Tag("<id lists>")],
    Discriminator(_first),
]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, description="16 when not given")
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    suffix: str | None = Field(None, description="refused")


EmbeddingInput = Annotated[
    Annotated[NonEmpty, Tag("<one>")]
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=2048), Tag("<many>")]
    | Annotated[Ids, Tag("<ids>")]
    | Annotated[list[Ids], Field(min_length=1, max_length=2048), Tag("<id lists>")],
    Discriminator(_first),
]


class EmbeddingRequest(Whole):
    """POST /v1/embeddings."""

    model: NonEmpty
    input: EmbeddingInput
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    input_type: Literal["query", "document"] | None = Field(None, description="for models with different prefixes")


class TokenizeRequest(Whole):
    """POST /tokenize: a text or messages."""

    model: NonEmpty
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Whole):
    """POST /detokenize."""

    model: NonEmpty
    tokens: list[TokenId]


class LoadAdapterRequest(Whole):
    """POST /v1/load_lora_adapter (vLLM)."""

    lora_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}$")]
    lora_path: NonEmpty | None = Field(None, description="its folder; the artifact of that name when not given")


class UnloadAdapterRequest(Whole):
    """POST /v1/unload_lora_adapter (vLLM)."""

    lora_name: NonEmpty
