"""The database of jobs and files: an engine with its settings, and tables that know which version they are of."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, DBAPIError

from tailor.errors import ConfigError, ConflictError, nearest
from tailor.jobs.postgresql import DRIVER, DRIVERS, open_postgresql, reason, shown
from tailor.runs import home
from tailor.store import write_text

Serial = BigInteger().with_variant(Integer, "sqlite")
"""A row number that the database gives: SQLite counts up only a plain INTEGER."""

_LIKE = f"{DRIVER}://USER:PASSWORD@HOST:5432/DATABASE"

DATABASE_VARIABLE = "TAILOR_DATABASE"
"""Where the URL may stand, so that no list of processes shows its password."""

BUSY_SECONDS = 30
"""How long a writer waits for another one."""

_VERSIONS = Table(
    "schema_versions",
    MetaData(),
    Column("component", String(40), primary_key=True),
    Column("version", Integer, nullable=False),
)
_HOMES = Table("homes", MetaData(), Column("id", String(64), primary_key=True))
"""The one TAILOR_HOME that a database belongs to."""

_MAKING_TABLES = 0x7A110
"""The number of the lock in PostgreSQL under which tables are made: two servers may start at once."""


def open_database(url: str | None = None) -> Engine:
    """An engine for the `url` of a PostgreSQL or SQLite database; `<home>/server.db` (SQLite) when none is given.

    SQLite writes ahead (readers never wait), and a transaction that may write takes the lock at its beginning, so that
    two writers wait for each other instead of failing. Use `reading(engine)` for transactions that only read.
    Nothing is connected to yet. Raises ConfigError for a URL that cannot be used.
    """
    if url is None:
        home().mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{home() / 'server.db'}"
    parsed = _parsed(url)
    if parsed.drivername in DRIVERS:
        return open_postgresql(parsed)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def is_shared(engine: Engine) -> bool:
    """Whether servers on several machines may use the database."""
    return engine.dialect.name != "sqlite"


def reading(engine: Engine) -> Engine:
    """The same database for transactions that only read."""
    return engine.execution_options(tailor_reading=True)


def make_tables(engine: Engine, component: str, version: int, tables: MetaData) -> None:
    """Make the tables of a part of the program that are not there yet.

    Raises ConflictError when a newer program, whose tables mean something else, has been at the database, and
    UnavailableError or ConfigError for one that cannot be used.
    """
    try:
        with engine.begin() as connection:
            _make_tables(connection, component, version, tables)
    except DBAPIError as error:
        cause = reason(error.orig) if error.orig is not None else reason(error)
        raise ConfigError(
            f"the database {shown(engine.url)} cannot be used: {cause}",
            hint="its user must be allowed to make tables, and another program's database is no place for ours",
        ) from error


def _make_tables(connection: Connection, component: str, version: int, tables: MetaData) -> None:
    _lock(connection)
    _VERSIONS.metadata.create_all(connection)
    found = connection.execute(select(_VERSIONS.c.version).where(_VERSIONS.c.component == component)).scalar()
    if found is not None and found > version:
        raise ConflictError(
            f"the database's {component} are of version {found}, this program knows version {version}",
            hint="upgrade tailor-llm, or give another TAILOR_HOME or database URL",
        )
    tables.create_all(connection)
    if found is None:
        connection.execute(_VERSIONS.insert().values(component=component, version=version))


def claim_home(engine: Engine) -> None:
    """Let a database that several servers may share belong to this TAILOR_HOME, where its files and models are.

    Raises ConflictError when it belongs to another one: its jobs and files would be looked for in vain here.
    """
    if not is_shared(engine):
        return
    make_tables(engine, "homes", 1, _HOMES.metadata)
    path = home() / "home.id"
    with engine.begin() as connection:
        _lock(connection)
        known = connection.execute(select(_HOMES.c.id)).scalar()
        mine = _home_id(path)
        if known is None:
            if mine is None:
                mine = secrets.token_hex(16)
                write_text(path, f"{mine}\n")
            connection.execute(insert(_HOMES).values(id=mine))
        elif known != mine:
            raise ConflictError(
                f"the database {shown(engine.url)} belongs to another TAILOR_HOME than {home()}",
                hint="servers that share a database share a TAILOR_HOME (mount the same folder everywhere); "
                "give a folder of its own a database of its own",
            )


def _home_id(path: Path) -> str | None:
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        return None


def _lock(connection: Connection) -> None:
    """Have what follows in this transaction to oneself; in SQLite every writer has."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MAKING_TABLES})


def _parsed(url: str) -> URL:
    """Raises ConfigError, which does not show the URL: there may be a password in it."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError("the database's URL cannot be read", hint=f"it looks like {_LIKE}") from None
    known = (*DRIVERS, "sqlite", "sqlite+pysqlite")
    if parsed.drivername not in known:
        raise ConfigError(
            f"the database cannot be one of {parsed.drivername[:40]!r}; {nearest(parsed.drivername[:40], known)}",
            hint=f"its URL looks like {_LIKE}",
        )
    return parsed


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions by itself, and too late
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_SECONDS * 1000}", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    only_reads = connection.get_execution_options().get("tailor_reading")
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")
