from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from tailor.errors import DataError
from tailor.metrics.classification import accuracy, confusion, label_f1, macro_f1

LABELS = ["card", "loan", "fraud", "other"]
ROWS = st.lists(st.tuples(st.sampled_from([*LABELS, "junk"]), st.sampled_from(LABELS)), min_size=1, max_size=40)


@given(ROWS)
def test_equals_sklearn(rows: list[tuple[str, str]]) -> None:
    predictions, references = [row[0] for row in rows], [row[1] for row in rows]
    assert accuracy(predictions, references) == pytest.approx(accuracy_score(references, predictions), abs=1e-12)
    expected = f1_score(references, predictions, labels=LABELS, average="macro", zero_division=0.0)
    assert macro_f1(predictions, references, LABELS) == pytest.approx(expected, abs=1e-12)
    each = f1_score(references, predictions, labels=LABELS, average=None, zero_division=0.0)
    assert list(label_f1(predictions, references, LABELS).values()) == pytest.approx(list(each), abs=1e-12)
    names = [*LABELS, "junk"]
    counts = confusion(predictions, references)
    table = [[counts[right, predicted] for predicted in names] for right in names]
    assert table == confusion_matrix(references, predictions, labels=names).tolist()


def test_by_hand() -> None:
    predictions = ["card", "card", None, "loan"]
    references = ["card", "loan", "loan", "loan"]
    assert accuracy(predictions, references) == 0.5
    # card: 1 hit, 2 predicted, 1 right; loan: 1 hit, 1 predicted, 3 right; fraud: never
    assert label_f1(predictions, references, LABELS[:3]) == {"card": 2 / 3, "loan": 0.5, "fraud": 0.0}
    assert macro_f1(predictions, references, ["card", "loan"]) == pytest.approx(7 / 12)
    assert confusion(predictions, references)["loan", None] == 1


def test_bad_input() -> None:
    with pytest.raises(DataError, match="0 predictions, 0 rows"):
        accuracy([], [])
    with pytest.raises(DataError, match="2 predictions, 1 rows"):
        confusion(["a", "b"], ["a"])
    with pytest.raises(DataError, match="not in the label set: b"):
        macro_f1(["a", "b"], ["a", "b"], ["a"])
