"""GET and DELETE /v1/models: what is served, by ids that may hold `/` and `:`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

from tailor.errors import ConflictError
from tailor.server.errors import NO_RETRY, ApiError, without_paths
from tailor.server.responses import DeletedModel, Model, ModelList

if TYPE_CHECKING:
    from tailor.inference.library import ModelCard
    from tailor.inference.service import Service


def model_of(card: ModelCard) -> Model:
    """A card in OpenAI's shape; `parent` and `root` as vLLM has them, ours with x_."""
    return Model(
        id=card.id,
        object="model",
        created=card.created,
        owned_by="tailor",
        parent=card.base,
        root=without_paths(card.root),
        x_kind=card.kind,
        x_status=card.status,
    )


def model_router(service: Service) -> APIRouter:
    """List, retrieve and delete models."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> ModelList:
        """All bases and artifacts."""
        return ModelList(object="list", data=[model_of(card) for card in service.models()])

    @router.get("/v1/models/{model:path}", response_model=Model)
    async def retrieve_model(model: str) -> Model:
        """One of them."""
        return model_of(service.card(model))

    @router.delete("/v1/models/{model:path}", response_model=DeletedModel)
    async def delete_model(model: str) -> DeletedModel:
        """Delete an artifact for good. Bases are protected, and so are files that were loaded from elsewhere."""
        card = service.card(model)
        try:
            await service.delete(card.id)
        except ConflictError as error:
            told = without_paths(error.message)
            if card.kind == "base":
                raise ApiError(403, told, code="base_model_protected", param="model") from error
            message = f"{told} (POST /v1/unload_lora_adapter)"
            raise ApiError(409, message, code="adapter_not_deletable", param="model", headers=NO_RETRY) from error
        return DeletedModel(id=card.id, object="model", deleted=True)

    return router
