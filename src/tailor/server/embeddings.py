"""POST /v1/embeddings: unit vectors as numbers, or as base64 of little-endian float32 (the client's choice)."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tailor.errors import OverloadedError, ResourceError
from tailor.server.answers import headers_of
from tailor.server.errors import invalid
from tailor.server.protocol import EmbeddingRequest
from tailor.server.responses import EmbeddingRow, Embeddings, EmbeddingUsage
from tailor.server.stream import Stopping, while_connected
from tailor.server.translate import check_ids

if TYPE_CHECKING:
    from torch import Tensor

    from tailor.inference.service import Service


def embeddings_router(service: Service, stopping: Stopping) -> APIRouter:
    """The route of embeddings."""
    router = APIRouter(tags=["inference"])

    @router.post("/v1/embeddings", responses={200: {"model": Embeddings}}, response_class=JSONResponse)
    async def create_embeddings(body: EmbeddingRequest, request: HttpRequest) -> Response:
        """One vector per input, in order."""
        await service.warm(body.model)
        inputs = _inputs(service, body)
        try:
            vectors, num_tokens = await while_connected(request, stopping, service.embed(body.model, inputs))
        except OverloadedError:
            raise
        except ResourceError as error:
            raise invalid("input", error.message, "context_length_exceeded") from error
        if body.dimensions is not None:
            vectors = _shortened(vectors, body.dimensions)
        as_text = body.encoding_format == "base64"
        rows = [
            EmbeddingRow(object="embedding", index=k, embedding=_encoded(row) if as_text else row.tolist())
            for k, row in enumerate(vectors.float().cpu())
        ]
        usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
        answer = Embeddings(object="list", data=rows, model=body.model, usage=usage)
        ignored = ["input_type"] if body.input_type is not None else []
        return JSONResponse(answer.to_dict(), headers=headers_of(body.model, ignored))

    return router


def _inputs(service: Service, body: EmbeddingRequest) -> list[str | tuple[int, ...]]:
    given: Any = body.input
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    for each in several:
        if isinstance(each, list):
            check_ids(service, body.model, each, "input")
    return [each if isinstance(each, str) else tuple(each) for each in several]


def _shortened(vectors: Tensor, dimensions: int) -> Tensor:
    """The first dimensions, at unit length again. Raises ApiError 400 for more than there are."""
    import torch

    if dimensions > vectors.shape[1]:
        raise invalid("dimensions", f"dimensions is {dimensions}; this model's vectors have {vectors.shape[1]}.")
    return torch.nn.functional.normalize(vectors[:, :dimensions].float(), dim=1)


def _encoded(row: Tensor) -> str:
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii")
