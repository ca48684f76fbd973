"""A request in OpenAI's words as requests to the service: messages, sampling, structure, tools."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tailor.errors import ConfigError
from tailor.inference import structured
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.structured import Structure
from tailor.server.errors import invalid, unsupported
from tailor.server.protocol import (
    IGNORED,
    ChatMessage,
    ChatRequest,
    Extension,
    Function,
    Part,
    Sampling,
    StructuredOutputs,
    ToolChoice,
)
from tailor.text.messages import Message

if TYPE_CHECKING:
    from tailor.inference.service import Service

MAX_SEED = 1 << 63

LIKELIEST_ALONE = 1e-9
"""top_p 0 leaves the likeliest token, as any share below its probability does."""


def messages_of(turns: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The conversation. Raises ApiError 400 for what is not text, or stands where it cannot."""
    return tuple(_message(turn, f"messages[{index}]") for index, turn in enumerate(turns))


def _message(turn: ChatMessage, where: str) -> Message:
    calls = [call.model_dump() for call in turn.tool_calls or ()]
    if turn.function_call is not None:
        calls.append({"type": "function", "function": turn.function_call.model_dump()})
    if calls and turn.role != "assistant":
        raise invalid(f"{where}.tool_calls", f"Only assistant messages have tool calls; {where} is a {turn.role}'s.")
    if turn.role == "tool" and turn.tool_call_id is None:
        raise invalid(
            f"{where}.tool_call_id",
            f"Missing required parameter: '{where}.tool_call_id'.",
            "missing_required_parameter",
        )
    content = _text(turn, where)
    if content is None and not calls:
        raise invalid(f"{where}.content", f"Invalid value for '{where}.content': expected text, got null.")
    role = {"developer": "system", "function": "tool"}.get(turn.role, turn.role)
    return Message(role, content or "", turn.name, tuple(calls), turn.tool_call_id)


def _text(turn: ChatMessage, where: str) -> str | None:
    if isinstance(turn.content, list):
        return "".join(_part(part, f"{where}.content[{k}]") for k, part in enumerate(turn.content))
    return turn.content if turn.content is not None else turn.refusal


def _part(part: Part, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise invalid(where, f"This model reads text only: {where} is of type {part.type!r}.", "unsupported_value")
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        name = f"{where}.{part.type}"
        raise invalid(name, f"Missing required parameter: {name!r}.", "missing_required_parameter")
    return text


def check_ids(service: Service, model: str, ids: Iterable[int], param: str) -> None:
    """Raise ApiError 400 for ids the vocabulary does not have: the rows of soft prompts lie past it."""
    size = service.vocab_size(model)
    for token_id in ids:
        if not 0 <= token_id < size:
            raise invalid(param, f"Token id {token_id} is not in the vocabulary of {model} (0 to {size - 1}).")


def words(service: Service, model: str, ids: Iterable[int]) -> list[int]:
    """The ids that have a text; those of soft prompts are nobody's business."""
    size = service.vocab_size(model)
    return [token_id for token_id in ids if token_id < size]


def asked(messages: Sequence[Message], *, prompt: str | None = None, **more: Any) -> Request:
    """A request that is only to be tokenised: as little as possible is to follow."""
    return Request(tuple(messages), sampling=SamplingParams(max_new_tokens=1), prompt=prompt, **more)


def task_of(extension: Extension | None) -> str | None:
    """The prompt table's task. Raises ApiError 400 for names that are kept for later."""
    if extension is None:
        return None
    for name in sorted(extension.model_fields_set - {"task"}):
        raise unsupported(f"tailor.{name}", "this server does not have it.")
    return extension.task


def ignored_of(body: ChatRequest) -> list[str]:
    """Parameters that were sent and have no effect. Raises ApiError 400 for those that would change the answer."""
    for name, reason in _refused(body):
        raise unsupported(name, reason)
    ignored = [name for name in IGNORED if getattr(body, name) is not None]
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        ignored.append("stream_options.include_obfuscation")
    return ignored


def _refused(body: ChatRequest) -> Iterable[tuple[str, str]]:
    text_only = "this server reads and writes text only."
    template = "the chat template is rendered one way, the way of training."
    checks = (
        ("audio", body.audio is not None, text_only),
        ("modalities", body.modalities not in (None, ["text"]), text_only),
        ("web_search_options", body.web_search_options is not None, "this server does not search the web."),
        ("chat_template_kwargs", bool(body.chat_template_kwargs), template),
        ("add_generation_prompt", body.add_generation_prompt is False, template),
        ("continue_final_message", bool(body.continue_final_message), template),
        ("top_logprobs", body.top_logprobs is not None and not body.logprobs, "it needs `logprobs: true`."),
    )
    return ((name, reason) for name, wrong, reason in checks if wrong)


def sampling_of(
    service: Service, body: Sampling, max_new_tokens: int, top_logprobs: int, structure: Structure | None
) -> SamplingParams:
    """How tokens are chosen, with OpenAI's defaults: temperature 1, and a random seed."""
    if body.skip_special_tokens is False:
        raise unsupported("skip_special_tokens", "special tokens are never part of the text.")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
    top_p = 1.0 if body.top_p is None else max(body.top_p, LIKELIEST_ALONE)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=top_p,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(service, body),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        seed=secrets.randbits(31) if body.seed is None else body.seed % MAX_SEED,
        min_new_tokens=min(body.min_tokens or 0, max_new_tokens),
        ignore_stop=bool(body.ignore_eos),
        num_top_logprobs=top_logprobs,
        structure=structure,
    )


def _logit_bias(service: Service, body: Sampling) -> tuple[tuple[int, float], ...]:
    biases = []
    for key, bias in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 19):
            raise invalid("logit_bias", f"Invalid key in 'logit_bias': {key!r} is no token id.")
        biases.append((int(key), float(bias)))
    check_ids(service, body.model, [token_id for token_id, _ in biases], "logit_bias")
    return tuple(biases)


Wanted = tuple[str, Literal["json_object", "json_schema", "regex", "choice", "grammar"], Any]
"""The parameter, what kind of structure it asks for, and the structure's content."""


def structure_of(body: Sampling) -> Structure | None:
    """What the text must be, by `response_format` or vLLM's names. Raises ApiError 400 for two, or a bad one."""
    found = [*_response_format(body), *_guided(body)]
    if len(found) > 1:
        raise invalid(found[1][0], f"{found[0][0]} and {found[1][0]} both say what the answer must be.")
    return checked(*found[0]) if found else None


def checked(
    param: str, kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"], content: Any
) -> Structure:
    """The structure, when answers can be held to it. Raises ApiError 400."""
    try:
        structure = Structure(kind=kind, content=content)
        structured.check(structure)
    except ConfigError as error:
        code = "invalid_json_schema" if kind == "json_schema" else "invalid_value"
        raise invalid(param, error.message + (f" ({error.hint})" if error.hint else ""), code) from error
    return structure


def _guided(body: Sampling) -> Iterable[Wanted]:
    """By vLLM's names, the newer and the older."""
    new = body.structured_outputs or StructuredOutputs()
    if new.json_object:
        yield "structured_outputs.json_object", "json_object", None
    for kind, content, older in (
        ("json", new.json_, body.guided_json),
        ("regex", new.regex, body.guided_regex),
        ("choice", new.choice, body.guided_choice),
        ("grammar", new.grammar, body.guided_grammar),
    ):
        for param, wanted in ((f"structured_outputs.{kind}", content), (f"guided_{kind}", older)):
            if wanted is not None:
                yield param, _KINDS[kind], tuple(wanted) if isinstance(wanted, list) else wanted


_KINDS: dict[str, Literal["json_schema", "regex", "choice", "grammar"]] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def _response_format(body: Sampling) -> Iterable[Wanted]:
    wanted = body.response_format if isinstance(body, ChatRequest) else None
    if wanted is None or wanted.type == "text":
        return
    if wanted.type == "json_schema" and wanted.json_schema is None:
        name = "response_format.json_schema"
        raise invalid(name, f"Missing required parameter: {name!r}.", "missing_required_parameter")
    schema = wanted.json_schema.schema_ if wanted.json_schema is not None else None
    if wanted.type == "json_object" or schema is None:
        yield "response_format", "json_object", None
    else:
        yield "response_format", "json_schema", schema


@dataclass(frozen=True)
class Toolbox:
    """The functions a chat may call. `forced` are those one of which must be called; `legacy`: asked the old way."""

    functions: tuple[Function, ...] = ()
    forced: tuple[str, ...] = ()
    legacy: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the functions."""
        return tuple(function.name for function in self.functions)

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        """For the chat template."""
        kept = ("name", "description", "parameters")
        shown = [f.model_dump(include=set(kept), exclude_none=True) for f in self.functions]
        return tuple({"type": "function", "function": function} for function in shown)

    def structure(self) -> Structure | None:
        """Holds the answer to one call of a forced function. Raises ApiError 400 for a schema that cannot be held."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": f.name}, "arguments": f.parameters or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for f in self.functions
            if f.name in self.forced
        ]
        if not calls:
            return None
        schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return checked("functions" if self.legacy else "tools", "json_schema", schema)


def toolbox_of(body: ChatRequest) -> Toolbox:
    """The functions by either generation of names. Raises ApiError 400 for other kinds of tools and unknown names."""
    legacy = body.functions is not None or body.function_call is not None
    if legacy and (body.tools is not None or body.tool_choice is not None):
        raise invalid("functions", "Give `tools` and `tool_choice`, or the older `functions` and `function_call`.")
    functions = tuple(body.functions or ()) if legacy else tuple(_functions(body))
    box = Toolbox(functions, legacy=legacy)
    choice: Any = body.function_call if legacy else body.tool_choice
    param = "function_call" if legacy else "tool_choice"
    if choice is not None and choice != "none" and not functions:
        raise invalid(param, f"{param!r} is only allowed when functions are specified.")
    if choice == "none":
        return Toolbox()
    if choice == "required":
        return replace(box, forced=box.names)
    if isinstance(choice, ToolChoice):
        return _chosen(box, choice)
    if choice is not None and choice != "auto":
        return replace(box, forced=(_known(box, choice.name, param),))
    return box


def _functions(body: ChatRequest) -> Iterable[Function]:
    for index, tool in enumerate(body.tools or ()):
        where = f"tools[{index}]"
        if tool.type != "function":
            raise invalid(
                where, f"Only tools of type 'function' are supported, not {tool.type!r}.", "unsupported_value"
            )
        if tool.function is None:
            raise invalid(where, f"Missing required parameter: '{where}.function'.", "missing_required_parameter")
        yield tool.function


def _chosen(box: Toolbox, choice: ToolChoice) -> Toolbox:
    if choice.type == "function" and choice.function is not None:
        return replace(box, forced=(_known(box, choice.function.name, "tool_choice"),))
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = [tool.function.name for tool in choice.allowed_tools.tools if tool.function is not None]
        names = [_known(box, name, "tool_choice") for name in allowed]
        kept = replace(box, functions=tuple(f for f in box.functions if f.name in names))
        return replace(kept, forced=kept.names) if choice.allowed_tools.mode == "required" else kept
    raise invalid("tool_choice", f"A tool_choice of type {choice.type!r} is not supported.", "unsupported_value")


def _known(box: Toolbox, name: str, param: str) -> str:
    if name not in box.names:
        raise invalid(param, f"{param} names the function {name!r}, which is not among the tools.")
    return name


def variants(request: Request, count: int) -> list[Request]:
    """The request `count` times, each with the next seed."""
    params = request.sampling
    seeds = [(params.seed + k) % MAX_SEED for k in range(count)]
    return [replace(request, sampling=params.model_copy(update={"seed": seed})) for seed in seeds]


def check_count(count: int, limit: int, param: str) -> None:
    """Raise ApiError 400 for more answers than one request may ask for."""
    if count > limit:
        raise invalid(param, f"{count} answers are asked for; one request may ask for {limit}.")
