"""Sampled tokens to text as it grows: what has been given out never changes, and the whole is what `parse` says."""

from __future__ import annotations

from collections.abc import Sequence

from tailor.text.render import Renderer, before_stop

WINDOW = 8
"""Tokens that are decoded again with every new one: a character may be spread over several."""


class TextStream:
    """The text of one answer. It ends before the first of the `stop` texts.

    `push` takes tokens and returns what is certain by now: no half character, no beginning of a stop text, nothing
    that the renderer may yet cut off.
    """

    def __init__(self, renderer: Renderer, stop: Sequence[str] = ()) -> None:
        self.renderer = renderer
        self.stop = tuple(text for text in stop if text)
        self.token_ids: list[int] = []
        self.stopped = False
        self._text = ""  # of the tokens before _begin and of those that follow, as far as it is whole
        self._begin = 0
        self._before = ""
        self._given = 0
        self._over = False
        self._new = ""
        self._longest = max((len(text) for text in (*self.stop, renderer.trail)), default=0)

    def push(self, token_id: int) -> str:
        """The text that is new with this token."""
        self.token_ids.append(token_id)
        self._over = self._over or token_id in self.renderer.stop
        if self._over:
            return ""
        tail = self.renderer.tokenizer.decode(self.token_ids[self._begin :], continues=True)
        self._text = self._before + tail
        if len(self.token_ids) - self._begin > 2 * WINDOW:
            self._move(tail)
        found = first_stop(self._content(), self.stop)
        if found is not None:
            self.stopped = True
        return self._give(self._certain() if found is None else self._content()[:found])

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the newest of the tokens completes a stop text; its text waits for `take`."""
        self._new += self.push(token_ids[-1])
        return self.stopped

    def take(self) -> str:
        """The text that `ends` has found since the last time."""
        new, self._new = self._new, ""
        return new

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        return self._give(self.content)

    @property
    def content(self) -> str:
        """The answer's whole text so far, as if it ended here."""
        return answer_text(self.renderer, self.token_ids, self.stop)

    def _content(self) -> str:
        return self._text.removeprefix(self.renderer.lead)

    def _certain(self) -> str:
        """The text without an end that may still change: a broken character, part of a stop text or of the trail."""
        text = self._content()
        if self.renderer.lead.startswith(self._text):
            return ""
        text = text.rstrip("\ufffd")
        for size in range(min(self._longest, len(text)), 0, -1):
            end = text[-size:]
            if any(whole.startswith(end) for whole in (*self.stop, self.renderer.trail)):
                return text[:-size]
        return text

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given += len(new)
        return new

    def _move(self, tail: str) -> None:
        """Let the decoded window begin later, where its text is the end of what it was."""
        later = self._begin + WINDOW
        rest = self.renderer.tokenizer.decode(self.token_ids[later:], continues=True)
        if rest and tail.endswith(rest) and not rest.startswith("\ufffd"):
            self._before += tail[: -len(rest)]
            self._begin = later


def answer_text(renderer: Renderer, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """The text of an answer: before the first of the stop texts, else what the renderer reads."""
    if stop:
        said = renderer.tokenizer.decode(before_stop(token_ids, renderer.stop), continues=True)
        text = said.removeprefix(renderer.lead)  # what it would cut off behind may be part of a stop text
        if (found := first_stop(text, stop)) is not None:
            return text[:found]
    return renderer.parse(token_ids).content


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins."""
    places = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(places) if places else None
