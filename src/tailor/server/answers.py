"""What chat and text answers share: usage, logprobs with their bytes, ids, and the fingerprint of what answered."""

from __future__ import annotations

import codecs
import hashlib
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tailor import __version__
from tailor.inference.backend import TokenLogprob
from tailor.server import responses

if TYPE_CHECKING:
    from tailor.inference.service import Service


SECONDS_BELIEVED = 5.0


def new_id(kind: str) -> str:
    """A random id such as `chatcmpl-…`."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


class Fingerprints:
    """What answered: changes whenever the same seed could give another answer (model, its base, this version).

    Looking a model up reads files, so what was found is believed for some seconds.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._known: dict[str, tuple[float, str]] = {}

    def of(self, model: str) -> str:
        """The fingerprint of a model. Raises NotFoundError."""
        found = self._known.get(model)
        if found is None or time.monotonic() - found[0] > SECONDS_BELIEVED:
            card = self.service.card(model)
            told = f"{card.id}\0{card.base}\0{card.root}\0{card.created}\0{__version__}"
            found = (time.monotonic(), "fp_" + hashlib.sha256(told.encode()).hexdigest()[:12])
            self._known[model] = found
        return found[1]


def headers_of(model: str, ignored: Sequence[str] = ()) -> dict[str, str]:
    """`openai-model`, and what was ignored. A model's name may hold letters that headers cannot."""
    headers = {"openai-model": model.encode("ascii", "replace").decode()} if model.isprintable() else {}
    if ignored:
        headers["x-ignored-params"] = ", ".join(ignored)
    return headers


def usage_of(num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int) -> responses.Usage:
    """The token counts in OpenAI's shape."""
    return responses.Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=num_prompt_tokens + num_completion_tokens,
        prompt_tokens_details=responses.PromptDetails(cached_tokens=num_cached_tokens, audio_tokens=0),
        completion_tokens_details=responses.CompletionDetails(
            reasoning_tokens=0, audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0
        ),
    )


def shown(token: bytes) -> str:
    """A token as text; a piece of a character in OpenAI's notation.

    >>> shown("é".encode()), shown(b"\\xc3")
    ('é', 'bytes:\\\\xc3')
    """
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class ChatLogprobs:
    """The logprobs of one chat answer. Tokens that are no part of the text (the end of the turn) are left out."""

    def __init__(self, service: Service, model: str, count: int) -> None:
        self.service = service
        self.model = model
        self.count = count
        self._said = self._told = 0

    def of(self, text: str, tokens: Iterable[TokenLogprob], *, last: bool) -> responses.ChatLogprobs:
        """Those of the answer's next piece."""
        self._said += len(text.encode())
        content = []
        for token in tokens:
            if last and self._told >= self._said:
                break
            told = self._token(token)
            self._told += len(told.bytes or ())
            content.append(told)
        return responses.ChatLogprobs(content=content, refusal=None)

    def _token(self, token: TokenLogprob) -> responses.TokenLogprob:
        top = [self._one(token_id, logprob) for token_id, logprob in token.top[: self.count]]
        own = self._one(token.token_id, token.logprob)
        return responses.TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _one(self, token_id: int, logprob: float) -> responses.TopLogprob:
        data = self.service.token_bytes(self.model, token_id)
        return responses.TopLogprob(token=shown(data), logprob=finite(logprob), bytes=list(data))


def finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI writes -9999 for what cannot come."""
    return max(logprob, -9999.0)


class TextLogprobs:
    """The logprobs of one text completion, in the older shape: parallel lists, and where each token begins."""

    def __init__(self, service: Service, model: str, count: int, num_unseen: int = 0) -> None:
        """The first `num_unseen` characters of the tokens are no part of the text (a tokenizer's own bos)."""
        self.service = service
        self.model = model
        self.count = count
        self._offset = -num_unseen
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, token_ids: Sequence[int], tokens: Sequence[TokenLogprob | None]) -> responses.TextLogprobs:
        """Those of the next tokens; None is a token that nothing precedes."""
        texts, offsets = [], []
        for token_id in token_ids:
            data = self.service.token_bytes(self.model, token_id)
            texts.append(shown(data))
            offsets.append(max(self._offset, 0))
            self._offset += len(self._decoder.decode(data))
        return responses.TextLogprobs(
            tokens=texts,
            token_logprobs=[None if token is None else finite(token.logprob) for token in tokens],
            top_logprobs=[None if token is None else self._top(token) for token in tokens],
            text_offset=offsets,
        )

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens' texts, and the token's own."""
        found: dict[str, float] = {}
        for token_id, logprob in (*token.top[: self.count], (token.token_id, token.logprob)):
            found.setdefault(shown(self.service.token_bytes(self.model, token_id)), finite(logprob))
        return found
