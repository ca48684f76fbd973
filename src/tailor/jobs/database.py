"""The database of jobs and files: an engine with its settings, and tables that know which version they are of."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Engine, Integer, MetaData, String, Table, create_engine, event, select, text
from sqlalchemy.engine import Connection, make_url

from tailor.errors import ConflictError
from tailor.runs import home

Serial = BigInteger().with_variant(Integer, "sqlite")
"""A row number that the database gives: SQLite counts up only a plain INTEGER."""

BUSY_SECONDS = 30
"""How long a writer waits for another one."""

_VERSIONS = Table(
    "schema_versions",
    MetaData(),
    Column("component", String(40), primary_key=True),
    Column("version", Integer, nullable=False),
)
_MAKING_TABLES = 0x7A110
"""The number of the lock in PostgreSQL under which tables are made: two servers may start at once."""


def open_database(url: str | None = None) -> Engine:
    """An engine for `url`; `<home>/server.db` (SQLite) when none is given.

    SQLite writes ahead (readers never wait), and a transaction that may write takes the lock at its beginning, so that
    two writers wait for each other instead of failing. Use `reading(engine)` for transactions that only read.
    """
    if url is None:
        home().mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{home() / 'server.db'}"
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def reading(engine: Engine) -> Engine:
    """The same database for transactions that only read."""
    return engine.execution_options(tailor_reading=True)


def make_tables(engine: Engine, component: str, version: int, tables: MetaData) -> None:
    """Make the tables of a part of the program that are not there yet.

    Raises ConflictError when a newer program, whose tables mean something else, has been at the database.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MAKING_TABLES})
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


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions by itself, and too late
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_SECONDS * 1000}", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    only_reads = connection.get_execution_options().get("tailor_reading")
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")
