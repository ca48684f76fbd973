"""What can be set about a server: where it listens, whom it trusts, and how much it takes."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field

from tailor.config import Strict


class ServerSettings(Strict):
    """The HTTP server's settings; those of the engine (memory, batch) belong to the service."""

    host: str = Field("127.0.0.1", description="address to listen on; others than this machine's need an API key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    api_keys: tuple[str, ...] = Field((), repr=False, description="keys with all rights, beside those of keys_file")
    keys_file: Path | None = Field(None, description="where `tailor keys` keeps hashed keys; None: no such keys")
    allowed_hosts: tuple[str, ...] = Field((), description="Host headers to answer beside the address itself; *: any")
    cors_origins: tuple[str, ...] = Field((), description="web pages (https://host) that may call from a browser")
    max_body_bytes: int = Field(16 << 20, ge=1, description="largest JSON body")
    max_upload_bytes: int = Field(512 << 20, ge=1, description="largest file to upload")
    max_choices: int = Field(128, ge=1, description="most answers of one request (prompts times n or best_of)")
    requests_per_minute: int | None = Field(None, ge=1, description="of one key; None: no limit")
    heartbeat: float = Field(12.0, gt=0, description="seconds of silence after which a stream sends a comment")
    grace: float = Field(10.0, ge=0, description="seconds that running requests may go on when the server stops")
    adapter_folders: tuple[Path, ...] = Field((), description="where load_lora_adapter may read beside the artifacts")
    database: str | None = Field(None, repr=False, description="URL of files and jobs; None: in TAILOR_HOME")
    record: bool = Field(False, description="record chat completions that are sent with `store`")
    record_all: bool = Field(False, description="record every chat completion, not only those sent with `store`")
    redact: tuple[str, ...] = Field((), description="what is removed before anything is recorded: names or patterns")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
