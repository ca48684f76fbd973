"""BLEU and chrF over a whole set of rows, computed by sacrebleu (Post 2018, arXiv:1804.08771)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailor.errors import DataError, require


@dataclass(frozen=True, slots=True)
class CorpusScore:
    """A score from 0 to 100 and the signature that says how it was computed; quote both."""

    score: float
    signature: str


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    """Corpus BLEU; `references[i]` are the one or more right texts of row i (the number may differ between rows)."""
    return _score("BLEU", predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    """Corpus chrF2, over characters: needs no tokeniser, so it suits every language."""
    return _score("CHRF", predictions, references)


def _score(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    sacrebleu = require("sacrebleu.metrics", "eval")
    if not predictions or len(predictions) != len(references):
        raise DataError(f"{name} needs one list of references per prediction: {len(predictions)} and {len(references)}")
    if missing := [row for row, texts in enumerate(references) if not texts]:
        raise DataError(f"{name}: no reference for row {missing[0]} (and {len(missing) - 1} more)")
    most = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    metric = getattr(sacrebleu, name)()
    score = metric.corpus_score(list(predictions), streams).score
    return CorpusScore(float(score), str(metric.get_signature()))
