"""What is beside a server that answers: files, the queue of jobs and their worker, the traffic log, and feedback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import APIRouter

from tailor.feedback.feedback import FeedbackLog
from tailor.feedback.redact import redactor
from tailor.jobs.database import claim_home, open_database
from tailor.jobs.queue import Queue
from tailor.jobs.worker import Worker, WorkerSettings
from tailor.recipes.tune_settings import BaseSettings
from tailor.server.chat import Record
from tailor.server.feedback import feedback_router, recorder, server_traffic
from tailor.server.file_store import FileSettings, FileStore
from tailor.server.files import files_router
from tailor.server.fine_tuning import fine_tuning_router
from tailor.server.fine_tuning_jobs import FineTuning
from tailor.server.settings import ServerSettings


class Workshop:
    """Files and fine-tuning jobs over one database: TAILOR_HOME/server.db, or that of the settings' `database`.

    `record` writes chats to the traffic log where the settings want one.
    """

    def __init__(self, bases: Mapping[str, BaseSettings], settings: ServerSettings, worker: WorkerSettings) -> None:
        engine = open_database(settings.database)
        claim_home(engine)
        queue = Queue(engine)
        self.files = FileStore(engine, FileSettings(max_bytes=settings.max_upload_bytes))
        self.jobs = FineTuning(queue, self.files, lambda: bases)
        self.worker = Worker(queue, worker, finished=self.jobs.finished)
        self._bases = bases
        traffic = server_traffic(settings, self._artifact_of)
        self.record: Record | None = None if traffic is None else recorder(traffic)
        self.routers: tuple[APIRouter, ...] = (
            files_router(self.files),
            fine_tuning_router(self.jobs, settings.heartbeat),
            feedback_router(FeedbackLog(redact=redactor(settings.redact)), traffic),
        )

    def aliases(self) -> dict[str, str]:
        """The ids of the models that jobs have made, and their artifacts."""
        return {model.id: model.artifact for model in self.jobs.fine_tuned()}

    def _artifact_of(self, model: str) -> str | None:
        """What a model's name means on disk; None for a base."""
        return None if model in self._bases else self.jobs.artifact_of(model) or model

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Take and run jobs while the block runs; at its end running ones save their checkpoints and wait."""
        self.jobs.start()
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            await asyncio.to_thread(self.jobs.stop)
