"""The OpenAPI document is true: generated requests, good and bad, get the answers that it promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted_service import BASE, ScriptedService

from tailor.server.app import create_app
from tailor.server.settings import ServerSettings


def schema_of(mode: GenerationMode) -> Any:
    app = create_app(ScriptedService(), ServerSettings(allowed_hosts=("*",)))
    found = schemathesis.openapi.from_asgi("/openapi.json", app)
    found.config.generation.update(modes=[mode])
    return found


GOOD, BAD = schema_of(GenerationMode.POSITIVE), schema_of(GenerationMode.NEGATIVE)
CONFORMS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
QUICK = settings(max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
ALONE = frozenset(
    {"temperature", "top_p", "stop", "seed", "logprobs", "echo", "user", "metadata", "prompt", "input", "store"}
)
"""Parameters whose generated values make sense whatever the others are."""

SEEN: Counter[tuple[str, int]] = Counter()


def sensible(body: dict[str, Any]) -> dict[str, Any]:
    """A generated body that can be answered: a model that is there, and nothing that excludes something else."""
    kept = {name: value for name, value in body.items() if name in ALONE}
    if "messages" in body:
        texts = [message.get("content") for message in body["messages"]]
        kept["messages"] = [{"role": "user", "content": text if isinstance(text, str) else "x"} for text in texts]
    return {"model": BASE, **kept}


@BAD.parametrize()
@QUICK
def test_bad_requests_are_refused(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict):
        case.body.pop("stream", None)
    case.call_and_validate(checks=[*CONFORMS, negative_data_rejection], base_url="http://localhost")


@GOOD.parametrize()
@QUICK
def test_good_requests_are_answered_as_promised(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and case.path.startswith("/v1/") and "lora" not in case.path:
        case.body = sensible(case.body)
    response = case.call_and_validate(checks=list(CONFORMS), base_url="http://localhost")
    SEEN[case.path, response.status_code] += 1


def test_answers_were_among_them() -> None:
    answered = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/metrics"}
    for path in answered & {path for path, _ in SEEN}:  # the others ran in another process
        assert SEEN[path, 200] > 0, SEEN
