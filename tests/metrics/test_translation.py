from __future__ import annotations

import sys

import pytest
import sacrebleu

from tailor.errors import DataError, MissingDependencyError
from tailor.metrics.translation import bleu, chrf

PREDICTIONS = ["the cat sat on the mat", "it rains in Köln today", ""]
REFERENCES = [["the cat sat on a mat", "a cat sat on the mat"], ["it is raining in Köln today"], ["empty"]]


def test_equals_sacrebleu_with_as_many_references_as_each_row_has() -> None:
    streams = [["the cat sat on a mat", "it is raining in Köln today", "empty"], ["a cat sat on the mat", None, None]]
    ours = bleu(PREDICTIONS, REFERENCES)
    assert ours.score == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, streams).score, abs=1e-12)
    assert "tok:13a" in ours.signature
    assert sacrebleu.__version__ in ours.signature
    ours = chrf(PREDICTIONS, REFERENCES)
    assert ours.score == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, streams).score, abs=1e-12)
    assert "nc:6" in ours.signature


def test_bounds() -> None:
    assert bleu(["a b c d e"], [["a b c d e"]]).score == pytest.approx(100)
    assert chrf(["東京です"], [["東京です"]]).score == pytest.approx(100)
    assert chrf(["abc"], [["xyz"]]).score == 0


def test_bad_shapes() -> None:
    with pytest.raises(DataError, match="1 and 2"):
        bleu(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="0 and 0"):
        chrf([], [])
    with pytest.raises(DataError, match="no reference for row 1"):
        bleu(["a", "b"], [["a"], []])


def test_the_extra_is_named_when_sacrebleu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingDependencyError) as caught:
        bleu(["a"], [["a"]])
    assert caught.value.hint == 'pip install "tailor-llm[eval]"'
