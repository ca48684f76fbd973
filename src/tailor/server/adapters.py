"""vLLM's routes that load and unload an artifact while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from tailor.errors import ConflictError, NotFoundError, OverloadedError, ResourceError
from tailor.runs import home
from tailor.server.errors import ApiError, without_paths
from tailor.server.protocol import LoadAdapterRequest, UnloadAdapterRequest
from tailor.server.settings import ServerSettings

if TYPE_CHECKING:
    from tailor.inference.service import Service


TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
"""Errors are JSON here as everywhere, so the routes cannot have a text class as a whole."""


def adapter_router(service: Service, settings: ServerSettings) -> APIRouter:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""
    router = APIRouter(tags=["models"])

    @router.post("/v1/load_lora_adapter", response_model=None, responses=TEXT)
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        """Serve an artifact, or a PEFT folder, under a name."""
        path = None if body.lora_path is None else _allowed(body.lora_path, settings)
        try:
            await service.load(body.lora_name, path)
        except NotFoundError as error:
            raise ApiError(404, without_paths(error.message), code="adapter_not_found", param="lora_path") from error
        except OverloadedError:
            raise
        except ResourceError as error:
            headers = {"x-should-retry": "false"}
            raise ApiError(503, without_paths(error.message), code="out_of_memory", headers=headers) from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_model=None, responses=TEXT)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        """Stop serving it; its files stay."""
        try:
            await service.unload(body.lora_name)
        except ConflictError as error:
            raise ApiError(403, without_paths(error.message), code="base_model_protected", param="lora_name") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _allowed(text: str, settings: ServerSettings) -> Path:
    """The folder, with links followed. Raises ApiError 403 outside the artifacts and the folders of the settings."""
    folders = [folder.resolve() for folder in (home() / "artifacts", *settings.adapter_folders)]
    try:
        path = (folders[0] / text).resolve()  # an absolute one stays as it is
        exists = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise ApiError(400, "lora_path is no path.", code="invalid_value", param="lora_path") from error
    if not any(path.is_relative_to(folder) and path != folder for folder in folders):
        message = "lora_path must lie in the artifacts of this server, or in one of its adapter_folders."
        raise ApiError(403, message, code="path_not_allowed", param="lora_path")
    if not exists:
        raise ApiError(404, f"There is no folder {path.name!r} there.", code="adapter_not_found", param="lora_path")
    return path
