"""Load a customization by name and talk to it: `tailor.load("tickets-lora").generate("Where is my parcel?")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.artifacts.artifact import Artifact, attach, find
from tailor.artifacts.integrity import intact
from tailor.data.rows import RowError, describe
from tailor.data.turns import messages
from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError
from tailor.inference.backend import Backend, Completion, Request, SamplingParams
from tailor.inference.hosted import HostedBackend, HostedCustomization
from tailor.inference.hosted_endpoint import hosted_endpoint
from tailor.inference.local import LocalBackend
from tailor.models.base import Base, load_base
from tailor.models.files import EMBEDDED, is_hosted
from tailor.models.slots import Slot
from tailor.runs import home
from tailor.techniques.prompting import Prompting
from tailor.text.messages import Message, user
from tailor.text.render import Tools

Turn = Message | Mapping[str, Any]
"""A message, or a dict as the OpenAI protocol has it: `{"role": …, "content": …}`."""

Prompt = str | Turn | Sequence[Turn]


class Answering:
    """What is asked by prompts, wherever it runs: `backend` answers for the `name`, None being the plain model."""

    backend: Backend

    @property
    def name(self) -> str | None:
        """What requests call it."""
        raise NotImplementedError

    def generate(self, prompt: Prompt, *, tools: Tools = (), task: str | None = None, **sampling: Any) -> str:
        """The answer's text; `sampling` are SamplingParams (max_new_tokens, temperature, seed, …).

        `task` is one of a prompt table's. What is asked of a task whose template has other fields than `{prompt}` is a
        JSON object of them.
        """
        return self.complete([prompt], tools=[tools], task=task, **sampling)[0].text

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        tools: Sequence[Tools] | None = None,
        task: str | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """One completion per prompt: generated together, or by a hosted model several at once.

        `tools` holds each prompt's tool schemas. Prompt k draws with `seed` + k, so that one prompt given several
        times gets several answers.
        """
        params = SamplingParams(**sampling)
        offered = [()] * len(prompts) if tools is None else tools
        seeded = [params.model_copy(update={"seed": params.seed + k}) for k in range(len(prompts))]
        requests = [
            Request(as_messages(prompt), self.name, drawn, tuple(schemas), task)
            for prompt, drawn, schemas in zip(prompts, seeded, offered, strict=True)
        ]
        return self.backend.generate(requests)


@dataclass(frozen=True)
class Customized(Answering):
    """A base with one artifact attached (or none: the base itself), ready to answer."""

    base: Base
    backend: LocalBackend
    artifact: Artifact | None = None
    slot: Slot | None = None

    @property
    def name(self) -> str | None:
        """What requests call it: None for a base or a model of its own."""
        return self.artifact.name if self.artifact is not None and self.slot is not None else None


@dataclass(frozen=True)
class HostedCustomized(Answering):
    """A hosted model, plain or with an artifact: a prompt around it, or a model that was tuned at the same place."""

    backend: HostedBackend
    artifact: Artifact | None = None

    @property
    def name(self) -> str | None:
        """What requests call it: None for the plain model."""
        return self.artifact.name if self.artifact is not None else None

    def stream(self, prompt: Prompt, *, tools: Tools = (), **sampling: Any) -> Iterator[str]:
        """The answer's text in pieces, as they come."""
        return self.backend.stream(Request(as_messages(prompt), self.name, SamplingParams(**sampling), tuple(tools)))


def load(
    name: str | Path,
    base: str | Base | None = None,
    *,
    task: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> Customized | HostedCustomized:
    """An artifact by name or folder (a PEFT folder will do), or a base by name; with `task` one of a prompt table's.

    A base `openai:MODEL@URL` is a hosted one, and so is what was made on it: nothing is loaded, its endpoint is asked.
    For the others see `load_local`. Raises NotFoundError, ConfigError, AuthError, ConflictError.
    """
    if is_hosted(name):
        if base is not None:
            raise ConfigError(f"{name} is a base: no other goes under it", hint="load it without a base")
        return HostedCustomized(HostedBackend(hosted_endpoint(str(name))))
    artifact = find_or_none(name, task)
    if artifact is not None and is_hosted(str(base or artifact.base_name)):
        return _hosted(artifact, None if base is None else str(base))
    return load_local(name, base, task=task, device=device, dtype=dtype, quantize=quantize)


def _hosted(artifact: Artifact, base: str | None) -> HostedCustomized:
    """An artifact of a hosted base, or a prompt from anywhere put around one."""
    kinds = [technique["type"] for technique in artifact.manifest["techniques"]]
    if others := [kind for kind in kinds if kind != "prompting"]:
        raise ConfigError(
            f"{artifact.name} is {' and '.join(others)}: that needs the base's weights, and {base} is hosted",
            hint="on a hosted base: prompting, or `tailor hosted tune`",
        )
    foreign = base is None and artifact.folder.absolute().parent != home() / "artifacts"
    endpoint = hosted_endpoint(base or artifact.base_name, foreign=foreign)
    prompting = next((t for t in artifact.techniques if isinstance(t, Prompting)), None)
    own = HostedCustomization(artifact.manifest.get("model"), prompting)
    return HostedCustomized(HostedBackend(endpoint, {artifact.name: own}), artifact)


def load_local(
    name: str | Path,
    base: str | Base | None = None,
    *,
    task: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> Customized:
    """An artifact or base whose weights are here, or are fetched.

    `base` overrides where the artifact's base is found, or passes one that is loaded already. An artifact's base is
    quantised when it was in training, a model of its own and a base by name when `quantize` says so. Raises
    NotFoundError, DamageError when the artifact's files have changed since they were written, and ConflictError when
    the base's weights are not those the artifact was made on.
    """
    artifact = find_or_none(name, task)
    if artifact is not None and base is None and is_hosted(artifact.base_name):
        name, artifact = artifact.base_name, None  # loading it says what can be done with a hosted base
    if artifact is None:
        loaded = load_base(name, device, dtype, quantize)
        return Customized(loaded, LocalBackend(loaded))
    if artifact.is_base:
        if base is not None:
            raise ConflictError(
                f"artifact {artifact.name!r} is a model of its own ({artifact.kind}): no other base goes under it",
                hint="load it without a base",
            )
        artifact = intact(artifact)
        loaded = load_base(artifact.folder, device, dtype if dtype != "auto" else _trained_dtype(artifact), quantize)
        return Customized(loaded, LocalBackend(loaded), artifact)
    if artifact.kind == "hosted":
        raise ConflictError(
            f"artifact {artifact.name!r} is a model at {artifact.base_name}: no base here goes under it",
            hint="load it without a base",
        )
    if isinstance(base, Base):
        loaded = base
    else:
        where = str(base or artifact.base_name)
        if not where:
            raise ConfigError(f"{artifact.folder} does not say which base it is for", hint="name it with --base")
        quantize = quantize or artifact.manifest["base"].get("quantize")
        loaded = load_base(where, device, dtype if dtype != "auto" else _trained_dtype(artifact), quantize)
    slot = attach(loaded, artifact)
    return Customized(loaded, LocalBackend(loaded, {artifact.name: slot}), artifact, slot)


def _trained_dtype(artifact: Artifact) -> str:
    """What was trained is what is served: the precision of the training run unless another is asked for."""
    return str(artifact.manifest["base"].get("dtype", "auto"))


def find_or_none(name: str | Path, task: str | None = None) -> Artifact | None:
    """The artifact, or the task of it (the only one when none is named); None when the name is a base's.

    Raises NotFoundError when it is neither, or has no such task.
    """
    try:
        artifact = find(name)
    except NotFoundError as error:
        text = str(name)
        if is_hosted(text) and task is None:
            return None
        if not (text in EMBEDDED or Path(text).expanduser().is_dir() or text.count("/") == 1):
            raise NotFoundError(f"there is no artifact or base {text!r}", hint=error.hint) from None
        if task is not None:
            raise NotFoundError(f"base {text!r} has no task {task!r}: tasks are in prompt tables") from None
        return None
    return artifact if task is None and len(artifact.tasks) > 1 else artifact.of_task(task)


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt in any of its spellings as turns. Raises DataError for what is no message."""
    if isinstance(prompt, str):
        return (user(prompt),)
    turns = [prompt] if isinstance(prompt, Message | Mapping) else prompt
    return tuple(turn if isinstance(turn, Message) else _message(turn) for turn in turns)


def _message(turn: Mapping[str, Any]) -> Message:
    try:
        if not isinstance(turn, Mapping):
            raise RowError(f"a turn is {describe(turn)}")
        return messages([turn])[0]
    except RowError as error:
        raise DataError(
            f"a prompt cannot be read: {error}", hint='a prompt is text, or a list of {"role": …, "content": …}'
        ) from error
