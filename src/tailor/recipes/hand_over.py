"""Hand over to vLLM: model folders, the command lines that serve them, and a check that the answers are the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import Artifact
from tailor.artifacts.files import write_model
from tailor.errors import ConfigError, ConflictError, NotFoundError, TailorError
from tailor.inference.load import Customized, load_local
from tailor.models.base import Base, dtype_name, load_base
from tailor.models.files import EMBEDDED, is_hosted, resolve
from tailor.models.placement import read_config
from tailor.recipes.hand_over_files import (
    Server,
    as_client_settings,
    write_lora,
    write_programs,
    write_readme,
    write_serve,
    write_soft,
    write_weights,
)
from tailor.recipes.hand_over_probe import make_probes
from tailor.recipes.hand_over_routes import Refused, Route, expand, refuse, route, strange_targets, why_not_on
from tailor.store import atomic_folder, write_json
from tailor.techniques.lora import LoRA
from tailor.text.render import PlainRenderer

EXPECTED = "expected.json"
"""Also what tells a folder that --force may replace."""

TOLERANCE = 0.1
"""Nats by which the mean logprob of a probe may differ: 16-bit kernels differ by some hundredths."""


@dataclass(frozen=True)
class HandOver:
    """What was written, and what vLLM cannot serve."""

    folder: Path
    servers: tuple[Server, ...]
    refused: tuple[Refused, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "folder": str(self.folder),
            "servers": [
                {
                    "name": server.name,
                    "url": server.url,
                    "command": ["vllm", "serve", server.model, *server.options()],
                    "models": [{"name": route.name, "served": route.told} for route in server.routes],
                }
                for server in self.servers
            ],
            "refused": [{"name": one.name, "reason": one.reason} for one in self.refused],
        }


@dataclass(frozen=True)
class _Written:
    """What one customization came to: its route as it was taken, and what the programs of the folder need of it."""

    route: Route
    model: dict[str, Any]
    client: dict[str, Any]
    rank: int | None = None


def hand_over(
    names: Sequence[str],
    folder: Path,
    *,
    base: str | None = None,
    port: int = 8000,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> HandOver:
    """Write into `folder` what vLLM needs to serve these artifacts, or all that it can when none is named.

    `base` is where the artifacts' base is, when not where they were tuned on; servers take ports from `port` on.
    Raises ConfigError naming every artifact that vLLM cannot serve, ConflictError when `folder` exists and `force` is
    not given.
    """
    found = [artifacts.find(name) for name in dict.fromkeys(names)] if names else artifacts.every()
    routes, refused = _routes(found, base)
    if refused and (names or not routes):
        raise refuse(refused)
    if not routes:
        raise NotFoundError("there are no artifacts to hand over", hint="make one with `tailor tune`")
    notes: list[str] = []
    with atomic_folder(folder, force=force) as draft:
        servers: list[Server] = []
        expected: list[dict[str, Any]] = []
        clients: dict[str, Any] = {}
        for group in _by_base(routes, base):
            for server, written in _write_group(draft, group, base, port + len(servers), device, dtype, notes):
                servers.append(server)
                expected.append(_expected(server, written))
                clients |= {one.route.name: {"url": server.url, **one.client} for one in written}
        _check_names(servers)
        write_json(draft / EXPECTED, {"schema_version": 1, "tolerance": TOLERANCE, "servers": expected})
        write_json(draft / "models.json", clients)
        write_programs(draft)
        write_serve(draft, servers)
        write_readme(draft, servers, refused, notes)
    return HandOver(folder, tuple(servers), tuple(refused))


def _routes(found: Sequence[Artifact], base: str | None) -> tuple[list[Route], list[Refused]]:
    every = [_route(name, one, base) for artifact in found for name, one in expand(artifact)]
    return [r for r in every if isinstance(r, Route)], [r for r in every if isinstance(r, Refused)]


def _route(name: str, artifact: Artifact, base: str | None) -> Route | Refused:
    if artifact.is_base or artifact.kind == "hosted":
        return route(name, artifact, "")
    where = base or artifact.base_name
    if is_hosted(where):
        return Refused(name, f"its base is hosted ({where})")
    if not where:
        raise ConfigError(f"{artifact.folder} does not say which base it is for", hint="name it with --base")
    try:
        config = read_config(resolve(where, weights=False))
    except TailorError as error:
        return Refused(name, f"its base cannot be loaded: {error.message}")
    found = route(artifacts.check_name(name), artifact, str(config.model_type))
    if isinstance(found, Route) and (reason := why_not_on(found, config)):
        return Refused(name, reason)
    return found


def _by_base(routes: Iterable[Route], base: str | None) -> list[list[Route]]:
    """The routes of each base together; a model of its own is a base."""
    groups: dict[tuple[str, ...], list[Route]] = {}
    for one in routes:
        facts = one.artifact.manifest["base"]
        if one.weights == "model":
            key: tuple[str, ...] = (str(one.artifact.folder),)
        else:
            key = (base or one.artifact.base_name, facts.get("dtype", "auto"), facts.get("quantize") or "")
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _write_group(
    draft: Path, routes: Sequence[Route], base: str | None, port: int, device: str, dtype: str, notes: list[str]
) -> list[tuple[Server, list[_Written]]]:
    """Load a base once, write what its customizations need, and say which servers they take."""
    if routes[0].weights == "model":
        one = routes[0]
        customized = load_local(one.artifact.folder.absolute(), device=device, dtype=dtype)
        return [_alone(_write(draft, one, customized), customized.base, port)]
    facts = routes[0].artifact.manifest["base"]
    precision = dtype if dtype != "auto" else str(facts.get("dtype", "auto"))
    loaded = load_base(base or routes[0].artifact.base_name, device, precision, facts.get("quantize"))
    shared: list[_Written] = []
    alone: list[_Written] = []
    for one in routes:
        artifact = one.artifact
        customized = load_local(artifact.folder.absolute(), loaded, task=artifact.task)
        assert customized.slot is not None
        try:
            written = _write(draft, _fitting(one, customized), customized)
        finally:
            loaded.host.detach(customized.slot)
        (alone if written.route.owns_server else shared).append(written)
    servers = []
    if shared:
        servers.append((_shared(draft, shared, loaded, port, notes), shared))
    return servers + [_alone(one, loaded, port + len(servers) + k) for k, one in enumerate(alone)]


def _fitting(one: Route, customized: Customized) -> Route:
    """The route, or that of a merged model where the LoRA sits on layers that vLLM has none for."""
    assert customized.slot is not None
    model_type = customized.base.host.placement.model_type
    if one.weights != "lora" or not (strange := strange_targets(list(customized.slot.deltas), model_type)):
        return one
    note = f"merged, because vLLM has no LoRA for its targets {', '.join(strange)}"
    return replace(one, weights="merged", notes=(*one.notes, note))


def _write(draft: Path, one: Route, customized: Customized) -> _Written:
    """Write one customization's files, and compute what it must answer."""
    rank = None
    if one.weights == "lora":
        assert customized.slot is not None
        (lora,) = (technique for technique in one.artifact.techniques if isinstance(technique, LoRA))
        rank = write_lora(draft / "lora" / one.name, lora, customized.slot, customized.base)
    elif one.owns_server:
        write_weights(draft / "models" / one.name, one, customized)
    soft = None if one.soft is None else write_soft(draft, one, customized)
    probes, differs = make_probes(one, customized)
    renderer = customized.base.renderer
    served = _served_name(customized.base) if one.weights == "base" else one.name
    client = {
        "model": served,
        "prompting": as_client_settings(one.prompting),
        "soft": soft,
        "plain": isinstance(renderer, PlainRenderer),
        "stop_token_ids": list(renderer.stop),
    }
    return _Written(one, {"name": one.name, "model": served, "differs": differs, "probes": probes}, client, rank)


def _shared(draft: Path, written: Sequence[_Written], base: Base, port: int, notes: list[str]) -> Server:
    """The server of the base, with its LoRAs."""
    name, model = _served_name(base), _place(base)
    if base.quantize is not None:
        model = f"models/{name}-dequantised"
        (draft / model).mkdir(parents=True)
        write_model(draft / model, base, {})
        notes.append(
            f"{name} was quantised to {base.quantize} in training: its weights are here as they were computed with, "
            "dequantised; vLLM's own quantisation of the original would be another model"
        )
    ranks = tuple(one.rank for one in written if one.rank is not None)
    dtype = dtype_name(base.dtype)
    if ranks and dtype not in ("bfloat16", "float16"):
        notes.append(f"{name} was in {dtype}; vLLM's LoRA kernels take 16 bits, so it is served in bfloat16")
        dtype = "bfloat16"
    return Server(name, model, port, dtype, tuple(one.route for one in written), True, ranks)


def _alone(written: _Written, base: Base, port: int) -> tuple[Server, list[_Written]]:
    """The server of one customization with weights of its own."""
    one = written.route
    return Server(one.name, f"models/{one.name}", port, dtype_name(base.dtype), (one,), False), [written]


def _served_name(base: Base) -> str:
    """What requests call the base: its hub id, or its folder's name."""
    return base.name if _is_hub_id(base) or base.name in EMBEDDED else base.folder.name


def _place(base: Base) -> str:
    """What vLLM loads: a hub id, or the absolute path of a folder."""
    return base.name if _is_hub_id(base) else str(base.folder.absolute())


def _is_hub_id(base: Base) -> bool:
    return base.name not in EMBEDDED and base.name.count("/") == 1 and not Path(base.name).expanduser().is_dir()


def _expected(server: Server, written: Sequence[_Written]) -> dict[str, Any]:
    models = [one.model for one in written]
    base = server.name if server.shared else None
    return {"name": server.name, "url": server.url, "base": base, "models": models}


def _check_names(servers: Sequence[Server]) -> None:
    """Raise ConflictError for two things that one name would call."""
    names = [server.name for server in servers if server.shared]
    names += [route.name for server in servers for route in server.routes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConflictError(f"two models would be called {twice[0]!r}", hint="hand them over in two folders")
