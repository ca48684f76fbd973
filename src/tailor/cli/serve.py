"""`tailor serve`: bases and their customizations over the OpenAI protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tailor.cli.output import SCHEMA_VERSION, AsJson, Device, Dtype, Quantize, say

if TYPE_CHECKING:
    from tailor.inference.service import Service
    from tailor.models.base import Base
    from tailor.server.settings import ServerSettings

app = typer.Typer(add_completion=False)

NUM_LISTED = 12
"""Models named on the screen at the start; `GET /v1/models` lists all."""

GIGABYTE = 1 << 30


Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...", help="Artifacts to serve; all that were made on the bases when none is named."
    ),
]
Bases = Annotated[
    list[str] | None,
    typer.Option("--base", "-b", help="A base to serve; may be repeated. That of the artifacts when not given."),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; others than this machine's need an API key.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0: any free one.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option("--api-key", envvar="TAILOR_API_KEY", help="A key with all rights; see also `tailor keys`."),
]
AllowedHosts = Annotated[
    list[str] | None, typer.Option("--allowed-host", help="A Host header to answer beside the address itself.")
]
CorsOrigins = Annotated[
    list[str] | None, typer.Option("--cors-origin", help="A web page (https://host) that may call from a browser.")
]
RequestsPerMinute = Annotated[
    int | None, typer.Option("--requests-per-minute", min=1, help="Most requests of one key.")
]
MaxSequences = Annotated[int, typer.Option("--max-sequences", min=1, help="Answers under way at once.")]
MaxWaiting = Annotated[
    int, typer.Option("--max-waiting", min=0, help="Requests that may wait; more are told to come back.")
]
MaxKvGb = Annotated[float | None, typer.Option("--max-kv-gb", min=0, help="Memory for keys and values of each base.")]
MaxModelsGb = Annotated[
    float | None, typer.Option("--max-models-gb", min=0, help="Memory for full fine-tunes and merged models.")
]
Grace = Annotated[float, typer.Option("--grace", min=0, help="Seconds that running answers may go on after Ctrl-C.")]


@app.command()
def serve(
    models: Models = None,
    base: Bases = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKeys = None,
    allowed_host: AllowedHosts = None,
    cors_origin: CorsOrigins = None,
    requests_per_minute: RequestsPerMinute = None,
    max_sequences: MaxSequences = 64,
    max_waiting: MaxWaiting = 512,
    max_kv_gb: MaxKvGb = None,
    max_models_gb: MaxModelsGb = None,
    grace: Grace = 10.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Serve bases and their customizations over the OpenAI protocol, all of them in one batch."""
    from tailor.errors import require

    for module in ("fastapi", "uvicorn"):  # the other modules import them at their top
        require(module, "server")
    from tailor.server.auth import keys_path
    from tailor.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        keys_file=keys_path(),
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        requests_per_minute=requests_per_minute,
        grace=grace,
    )
    check_start(settings)
    bases, names = chosen(models or [], base or [])

    def service() -> Service:
        from tailor.inference.engine import EngineSettings
        from tailor.inference.library import Library
        from tailor.inference.service import Service

        engine = EngineSettings(max_sequences=max_sequences, max_waiting=max_waiting, max_kv_bytes=_bytes(max_kv_gb))
        loaded = [_loaded(name, device, dtype, quantize) for name in bases]
        return Service(Library(loaded, names=names, settings=engine, max_base_bytes=_bytes(max_models_gb)))

    run_server(service, settings, as_json)


def run_server(load: Callable[[], Service], settings: ServerSettings, as_json: bool) -> None:
    """Take the port, load, and serve until a signal. Raises ConflictError for a port in use."""
    from tailor.server.app import create_app
    from tailor.server.running import Server, listen

    socket = listen(settings)
    service = load()
    server = Server(create_app(service, settings), settings, lambda port: _announce(service, settings, port, as_json))
    try:
        server.run(sockets=[socket])
    except KeyboardInterrupt:  # the ordinary way to stop
        say("stopped")


def check_start(settings: ServerSettings) -> None:
    """Say what is wrong before anything is loaded. Raises ConfigError for an open address without a key."""
    from tailor.server.auth import KeyRing, check_address

    check_address(settings, KeyRing(settings.keys_file, settings.api_keys))


def chosen(models: Sequence[str], bases: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The bases to load, and the artifacts to serve (None: all made on them).

    Models may be named among the artifacts or be bases themselves. Without any base it is the artifacts' one, or the
    embedded base when there are none. Raises ConfigError when it could be several, NotFoundError for unknown names.
    """
    from tailor.artifacts.artifact import every
    from tailor.errors import ConfigError
    from tailor.inference.load import find_or_none

    found = {name: find_or_none(name) for name in models}
    wanted = [*bases, *(name for name, artifact in found.items() if artifact is None)]
    names = [artifact.name for artifact in found.values() if artifact is not None]
    artifacts = [artifact for artifact in found.values() if artifact is not None] if models else every()
    if not wanted:
        used = dict.fromkeys(artifact.base_name for artifact in artifacts if not artifact.is_base)
        if len(used) > 1:
            raise ConfigError(
                f"the artifacts were made on {len(used)} bases: {', '.join(used)}",
                hint="name those to load with --base, each one once",
            )
        wanted = list(used) or ["tailor-nano"]
    return list(dict.fromkeys(wanted)), names if models else None


def _loaded(name: str, device: str, dtype: str, quantize: str | None) -> Base:
    from tailor.models.base import load_base

    say(f"loading {name}")
    return load_base(name, device, dtype, quantize)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * GIGABYTE)


def _announce(service: Service, settings: ServerSettings, port: int, as_json: bool) -> None:
    """One screen: where, what, and how to ask."""
    cards = service.models()
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{shown}:{port}/v1"
    if as_json:
        told = {"schema_version": SCHEMA_VERSION, "url": url, "models": [card.id for card in cards]}
        print(json.dumps(told, ensure_ascii=False), flush=True)
        return
    width = max(len(card.id) for card in cards)
    lines = [f"serving {len(cards)} models at {url}   (documentation: {url.removesuffix('/v1')}/docs)", ""]
    lines += [f"  {card.id:<{width}}  {card.kind}" for card in cards[:NUM_LISTED]]
    if len(cards) > NUM_LISTED:
        lines.append(f"  and {len(cards) - NUM_LISTED} more: curl {url}/models")
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_keys else ""
    body = json.dumps({"model": cards[-1].id, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    lines += ["", f"  curl {url}/chat/completions -H 'Content-Type: application/json'{key} \\", f"    -d '{body}'", ""]
    print("\n".join([*lines, "Ctrl-C stops."]), flush=True)
