"""OpenAI's names: what answers hold. Only what is set is sent, so that a field may be null, or be left out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A JSON object of a response."""

    model_config = ConfigDict(protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """What is sent: the fields that were set."""
        return self.model_dump(exclude_unset=True)

    def event(self) -> str:
        """The same as JSON text, for a stream."""
        return self.model_dump_json(exclude_unset=True)


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Every error's envelope."""

    error: ErrorDetail


class PromptDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    audio_tokens: int


class CompletionDetails(Answer):
    """What the answer's tokens were for."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(Answer):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Logprobs of an answer's tokens."""

    content: list[TokenLogprob] | None
    refusal: None


class CalledFunction(Answer):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


class CalledTool(Answer):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Answer):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    tool_calls: list[CalledTool] = []
    function_call: CalledFunction | None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    logprobs: ChatLogprobs | None


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: Literal["default"]


class FunctionDelta(Answer):
    """A piece of a call."""

    name: str = ""
    arguments: str


class ToolDelta(Answer):
    """A piece of a tool call; the first has the id and the name."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class Delta(Answer):
    """What is new in a choice."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    tool_calls: list[ToolDelta] = []
    function_call: FunctionDelta | None = None


class ChunkChoice(Answer):
    """A choice of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"] | None


class ChatChunk(Answer):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"]
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Answer):
    """Logprobs of a text's tokens; None where nothing precedes."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    """One continuation; those of the first prompt come first."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Answer):
    """The answer of /v1/completions, and each event of it when streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None


class EmbeddingRow(Answer):
    """One input's vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: EmbeddingUsage


class Model(Answer):
    """A base or an artifact; `parent` and `root` as vLLM has them."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    root: str
    x_kind: str
    x_status: str


class ModelList(Answer):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class DeletedModel(Answer):
    """The answer of DELETE /v1/models/{model}."""

    id: str
    object: Literal["model"]
    deleted: bool


class Tokenized(Answer):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] = []


class Detokenized(Answer):
    """The answer of /detokenize."""

    prompt: str


class Status(Answer):
    """The answer of /health and /ready."""

    status: str
