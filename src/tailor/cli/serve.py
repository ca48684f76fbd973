"""`tailor serve`: bases and their customizations over the OpenAI protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import SCHEMA_VERSION, AsJson, Device, Dtype, Quantize, say
from tailor.cli.serve_vllm import Engine, Force, Output, handed_over

if TYPE_CHECKING:
    from tailor.inference.engine import EngineSettings
    from tailor.inference.service import Service
    from tailor.models.base import Base
    from tailor.server.settings import ServerSettings
    from tailor.server.workshop import Workshop

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
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8", help="Decode with weights in 8 bits on a CPU: quicker for large bases, a little less exact."
    ),
]
MaxModelsGb = Annotated[
    float | None, typer.Option("--max-models-gb", min=0, help="Memory for full fine-tunes and merged models.")
]
Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="TAILOR_DATABASE",
        help="URL of the database of files and jobs, for several servers (PostgreSQL); SQLite in TAILOR_HOME if not.",
    ),
]
AdapterFolders = Annotated[
    list[Path] | None,
    typer.Option("--adapter-folder", help="Where load_lora_adapter may read, beside the artifacts; may be repeated."),
]
Jobs = Annotated[
    int, typer.Option("--jobs", min=0, help="Fine-tuning jobs that run at once; 0: they wait for another worker.")
]
JobLease = Annotated[
    float,
    typer.Option(
        "--job-lease",
        min=5,
        help="Seconds of silence after which a server elsewhere has lost its jobs to the others. The same for all.",
    ),
]
JobThreads = Annotated[
    int | None, typer.Option("--job-threads", min=1, help="Threads of a job; half of the cores when not given.")
]
JobNiceness = Annotated[
    int,
    typer.Option(
        "--job-niceness",
        min=0,
        max=20,
        help="How far jobs give way to answers. 0: not at all; 20: they only get the time that nothing else wants.",
    ),
]
Record = Annotated[bool, typer.Option("--record", help="Keep chats that are sent with `store: true`.")]
RecordAll = Annotated[bool, typer.Option("--record-all", help="Keep all chats.")]
Redact = Annotated[
    list[str] | None,
    typer.Option(
        "--redact",
        metavar="NAME|PATTERN",
        help="What to remove from chats and feedback that are kept: email, phone, credit_card, iban, api_key, all, "
        "or a regular expression; may be repeated.",
    ),
]
Grace = Annotated[float, typer.Option("--grace", min=0, help="Seconds that running answers may go on after Ctrl-C.")]


@app.command()
def serve(
    context: typer.Context,
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
    int8: Int8 = False,
    jobs: Jobs = 1,
    job_threads: JobThreads = None,
    job_niceness: JobNiceness = 19,
    job_lease: JobLease = 120.0,
    record: Record = False,
    record_all: RecordAll = False,
    redact: Redact = None,
    database: Database = None,
    adapter_folder: AdapterFolders = None,
    grace: Grace = 10.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    engine: Engine = "tailor",
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Serve bases and their customizations over the OpenAI protocol, all of them in one batch."""
    if handed_over(context):
        return
    settings = settings_of(context.params)
    check_start(settings)
    bases, names = chosen(models or [], base or [])

    blocks = {name: {"name": name, "device": device, "dtype": dtype, "quantize": quantize} for name in bases}
    worker = {"concurrency": jobs, "num_threads": job_threads, "niceness": job_niceness, "lease_seconds": job_lease}
    workshop = open_workshop(blocks, settings, worker)

    def service() -> Service:
        from tailor.inference.engine import EngineSettings

        engine = EngineSettings(
            max_sequences=max_sequences, max_waiting=max_waiting, max_kv_bytes=_bytes(max_kv_gb), int8=int8
        )
        loaded = [_loaded(name, device, dtype, quantize) for name in bases]
        return open_service(loaded, names, engine, _bytes(max_models_gb), workshop, device, dtype, quantize)

    run_server(service, settings, as_json, workshop)


def settings_of(asked: Mapping[str, Any]) -> ServerSettings:
    """The HTTP server's settings among the command's parameters. Raises MissingDependencyError without the extra."""
    from tailor.errors import require

    for module in ("fastapi", "uvicorn", "sqlalchemy"):  # the other modules import them at their top
        require(module, "server")
    from tailor.server.auth import keys_path
    from tailor.server.settings import ServerSettings

    names = ("host", "port", "requests_per_minute", "grace", "record", "record_all", "database")
    same = {name: asked[name] for name in names}
    lists = {"api_keys": "api_key", "allowed_hosts": "allowed_host", "cors_origins": "cors_origin"}
    lists |= {"redact": "redact", "adapter_folders": "adapter_folder"}
    several = {name: tuple(asked[option] or ()) for name, option in lists.items()}
    return ServerSettings(keys_file=keys_path(), **same, **several)


def open_service(
    bases: Sequence[Base],
    names: Sequence[str] | None,
    engine: EngineSettings,
    max_base_bytes: int | None,
    workshop: Workshop,
    device: str,
    dtype: str,
    quantize: str | None,
) -> Service:
    """A service of these bases, for this thread to `work`, which knows the models that the workshop's jobs have made.

    Models of their own are loaded with `device`, `dtype` and `quantize` too.
    """
    from tailor.inference.library import Library
    from tailor.inference.service import Service

    library = Library(
        bases,
        names=names,
        settings=engine,
        max_base_bytes=max_base_bytes,
        device=device,
        dtype=dtype,
        quantize=quantize,
        alias=workshop.jobs.artifact_of,
        aliases=workshop.aliases,
    )
    return Service(library, own_thread=False)


def open_workshop(
    blocks: Mapping[str, Mapping[str, str | None]], settings: ServerSettings, worker: Mapping[str, float | None]
) -> Workshop:
    """What tunes models beside the server, for the bases that these recipe blocks name; `worker`: its settings."""
    from tailor.jobs.worker import WorkerSettings
    from tailor.recipes.tune_settings import BaseSettings
    from tailor.server.workshop import Workshop

    bases = {name: BaseSettings.model_validate(block).absolute() for name, block in blocks.items()}
    return Workshop(bases, settings, WorkerSettings.model_validate(worker))


def run_server(
    load: Callable[[], Service], settings: ServerSettings, as_json: bool, workshop: Workshop | None = None
) -> None:
    """Take the port, load, and serve until a signal. Raises ConflictError for a port in use."""
    from tailor.server.app import create_app
    from tailor.server.running import Server, listen, run_beside

    socket = listen(settings)
    service = load()
    routers, lifespans = (workshop.routers, (workshop.lifespan,)) if workshop else ((), ())
    record = workshop.record if workshop else None
    app = create_app(service, settings, routers=routers, lifespans=lifespans, record=record)
    server = Server(app, settings, lambda port: _announce(service, settings, port, as_json))
    try:
        run_beside(server, [socket], service.work, service.stop)
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
    from tailor.artifacts.artifact import survey
    from tailor.errors import ConfigError
    from tailor.inference.load import find_or_none
    from tailor.models.files import is_hosted

    found = {name: find_or_none(name) for name in models}
    wanted = [*bases, *(name for name, artifact in found.items() if artifact is None)]
    names = [artifact.name for artifact in found.values() if artifact is not None]
    artifacts = [artifact for artifact in found.values() if artifact is not None] if models else survey()[0]
    if elsewhere := [artifact.name for artifact in artifacts if models and is_hosted(artifact.base_name)]:
        raise ConfigError(
            f"{', '.join(elsewhere)}: made on a hosted model, which answers elsewhere", hint="serve local ones here"
        )
    if not wanted:
        local = [artifact for artifact in artifacts if not artifact.is_base and not is_hosted(artifact.base_name)]
        used = dict.fromkeys(artifact.base_name for artifact in local)
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
