"""PostgreSQL: how it is connected to, and what is said when it does not answer. Passwords are never shown."""

from __future__ import annotations

import logging
import threading
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from tailor.errors import ConfigError, UnavailableError, require

DRIVER = "postgresql+psycopg"
DRIVERS = ("postgresql", "postgres", DRIVER)
"""What a URL may begin with; all mean the same."""

CONNECTING = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "client_encoding": "utf8",
    "application_name": "tailor",
}
"""Parameters of libpq, which those of the URL go before: a machine that falls silent is noticed in half a minute."""

SESSION = {"lock_timeout": "30s", "idle_in_transaction_session_timeout": "60s"}
"""Settings of every session: nobody waits for ever for a server that was lost within a transaction."""

_AWAY = ("08", "57P", "53", "40", "55P03", "25006")
"""How the codes (sqlstate) begin of errors that pass: connection lost, shutdown, too many connections, a deadlock, a
lock not given, a server that only reads. Its own connecting errors have none."""
_FULL = "53100"

log = logging.getLogger(__name__)


def open_postgresql(url: URL) -> Engine:
    """An engine that survives a database that goes away and comes back.

    Raises MissingDependencyError without the driver. While the database is away, whatever is asked of the engine
    raises UnavailableError; the log says once that it is away, and once that it is back.
    """
    require("psycopg", "postgres")
    if "@" in (url.host or ""):
        raise ConfigError(
            "the database's URL has an '@' too many",
            hint="write special characters of the user and the password as %40 for '@', %2F for '/', …",
        )
    engine = create_engine(
        url.set(drivername=DRIVER),
        connect_args={key: value for key, value in CONNECTING.items() if key not in url.query},
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _prepare)
    outage = _Outage(shown(url))
    event.listen(engine, "connect", outage.ended)
    event.listen(engine, "handle_error", outage.noticed, retval=True)
    return engine


def shown(url: URL) -> str:
    """A URL for people: without its password and its parameters, which may hold one.

    >>> from sqlalchemy.engine import make_url
    >>> shown(make_url("postgresql://ann:secret@db:5433/tailor?password=secret"))
    'postgresql://ann@db:5433/tailor'
    """
    return URL.create(url.get_backend_name(), url.username, None, url.host, url.port, url.database).render_as_string()


def reason(error: BaseException) -> str:
    """What a driver said, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or type(error).__name__


def _prepare(connection: Any, record: Any) -> None:
    for name, value in SESSION.items():
        connection.execute(f"SET {name} = '{value}'")
    connection.commit()


class _Outage:
    """Turns the errors of a database that is away into UnavailableError, and logs the beginning and the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._away = False
        self._lock = threading.Lock()

    def noticed(self, context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        if context.is_pre_ping or not _passes(error, context.sqlalchemy_exception):
            return None
        told = f"the database {self._name} does not answer: {reason(error)}"
        with self._lock:
            first, self._away = not self._away, True
        if first:
            log.warning("%s; it is tried again", told)
        return UnavailableError(told, hint="see that it runs and that its URL (--database) is right")

    def ended(self, connection: Any, record: Any) -> None:
        with self._lock:
            back, self._away = self._away, False
        if back:
            log.warning("the database %s answers again", self._name)


def _passes(error: BaseException, wrapped: object) -> bool:
    """Whether an error is of the connection or of the moment, and not of what was asked."""
    import psycopg

    if not isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError)):
        return isinstance(wrapped, DBAPIError) and wrapped.connection_invalidated
    code = error.sqlstate
    return code is None or (code.startswith(_AWAY) and code != _FULL)
