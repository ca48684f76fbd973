"""Packing: shifted targets, groups together, shared beginnings stored once, nothing lost and nothing padded."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor.data.examples import Example
from tailor.data.packing import Batch, Placed, Segment, pack, shared_prefix
from tailor.text.tokenizer import VIRTUAL


def example(tokens: str, mask: str, group: int = -1, **more: object) -> Example:
    """Letters are tokens (a = 1), digits their loss mask."""
    return Example([ord(c) - 96 for c in tokens], [int(m) for m in mask], group, **more)  # type: ignore[arg-type]


def letters(batch: Batch) -> str:
    return "".join(chr(i + 96) for i in batch.input_ids.tolist())


def test_two_rows_by_hand() -> None:
    batch = pack([Placed(example("abcd", "0011"), 0, 0), Placed(example("xyz", "001"), 0, 1)], 100)[0]
    assert letters(batch) == "abcdxyz"
    assert batch.targets.tolist() == [2, 3, 4, 0, 25, 26, 0]
    assert batch.loss_mask.tolist() == [False, True, True, False, False, True, False]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.segments == (Segment(0, 4, index=0), Segment(4, 7, index=1))
    assert batch.num_tokens == 7
    assert [s.length for s in batch.segments] == [4, 3]


def test_columns_follow_the_targets() -> None:
    """Entry t of a column belongs to the token that position t predicts."""
    rows = [
        example("abcd", "0011", columns={"advantages": [0.0, 1.0, 2.0, 3.0]}, values={"margin": 0.5}),
        example("xyz", "011", columns={"advantages": [7.0, 8.0, 9.0]}, values={"margin": 2.0}),
    ]
    batch = pack([Placed(e, 0, k) for k, e in enumerate(rows)], 100)[0]
    assert batch.columns["advantages"].tolist() == [1.0, 2.0, 3.0, 0.0, 8.0, 9.0, 0.0]
    assert batch.values["margin"].tolist() == [0.5, 2.0]


def test_columns_of_a_shared_beginning_are_zero_and_the_rest_stays_aligned() -> None:
    rows = [
        example("pqrab", "00011", 0, columns={"c": [0.0, 0.0, 0.0, 4.0, 5.0]}, values={"v": 1.0}),
        example("pqrxyz", "000111", 0, columns={"c": [0.0, 0.0, 0.0, 7.0, 8.0, 9.0]}, values={"v": 2.0}),
    ]
    batch = pack([Placed(e, 0, k) for k, e in enumerate(rows)], 100, share_prefixes=True)[0]
    assert letters(batch) == "pq" + "rab" + "rxyz"
    assert batch.columns["c"].tolist() == [0.0, 0.0, 4.0, 5.0, 0.0, 7.0, 8.0, 9.0, 0.0]
    assert batch.values["v"].tolist() == [0.0, 1.0, 2.0]
    # wherever a token counts, the column is the one that was written beside that token
    assert batch.columns["c"][batch.loss_mask].tolist() == [4.0, 5.0, 7.0, 8.0, 9.0]


def test_slots_with_different_columns_share_a_batch() -> None:
    """A slot that learns from rewards trains beside one that does not: its columns must not be lost."""
    rows = [
        Placed(example("abc", "011"), 1, 0),
        Placed(example("xyz", "011", columns={"c": [7.0, 8.0, 9.0]}, values={"v": 2.0}), 2, 0),
    ]
    for order in (rows, rows[::-1]):
        batch = pack(order, 100)[0]
        assert batch.columns["c"].tolist() == [0.0, 0.0, 0.0, 8.0, 9.0, 0.0]
        assert batch.values["v"].tolist() == [0.0, 2.0]


def test_virtual_tokens_are_never_targets() -> None:
    row = Example([VIRTUAL, VIRTUAL + 1, 5, VIRTUAL + 2, 6], [1, 1, 1, 1, 1])
    batch = pack([Placed(row)], 100)[0]
    assert batch.input_ids.tolist() == list(row.token_ids)
    assert batch.targets.tolist() == [0, 5, 0, 6, 0]
    assert batch.loss_mask.tolist() == [False, True, False, True, False]


def test_slots_are_sorted_and_the_order_inside_a_slot_is_kept() -> None:
    order = [(2, "a"), (0, "b"), (1, "c"), (2, "d"), (0, "e")]
    placed = [Placed(example(c + c, "01"), slot, k) for k, (slot, c) in enumerate(order)]
    batch = pack(placed, 100)[0]
    assert letters(batch) == "bbeeccaadd"
    assert [(s.slot, s.index) for s in batch.segments] == [(0, 1), (0, 4), (1, 2), (2, 0), (2, 3)]


def test_a_batch_is_filled_in_order_and_never_beyond_its_size() -> None:
    sizes = [3, 4, 5, 2, 9, 1]
    placed = [Placed(Example([1] * n, [1] * n), 0, k) for k, n in enumerate(sizes)]
    batches = pack(placed, 7)
    assert [[s.index for s in b.segments] for b in batches] == [[0, 1], [2, 3], [4], [5]]
    assert [b.num_tokens for b in batches] == [7, 7, 9, 1], "a longer sequence gets a batch of its own"


def test_nothing_makes_no_batch() -> None:
    assert pack([], 10) == []


def test_groups_stay_together_even_when_they_are_too_large() -> None:
    placed = [Placed(example("abc", "011", group), 0, k) for k, group in enumerate([0, 1, 0, -1, 1, 0])]
    batches = pack(placed, 7)
    assert [[s.index for s in b.segments] for b in batches] == [[0, 2, 5], [1, 4], [3]]
    assert [[s.group for s in b.segments] for b in batches] == [[0, 0, 0], [1, 1], [-1]]


def test_equal_groups_of_different_slots_are_strangers() -> None:
    rows = [Placed(example("pqra", "0001", 0), slot, k) for k, slot in enumerate([1, 2, 1, 2])]
    batch = pack(rows, 100, share_prefixes=True)[0]
    assert [(s.slot, s.parent) for s in batch.segments] == [(1, -1), (1, 0), (1, 0), (2, -1), (2, 3), (2, 3)]
    assert len(pack(rows, 8)) == 2


def test_the_layout_of_a_shared_beginning_by_hand() -> None:
    rows = [example("pqrsab", "000011", 3), example("pqrsxyz", "0000111", 3), example("mno", "001")]
    batch = pack([Placed(e, 4, k) for k, e in enumerate(rows)], 100, share_prefixes=True)[0]
    # p q r once; s is repeated, because its target is each branch's own first token
    assert letters(batch) == "pqr" + "sab" + "sxyz" + "mno"
    assert batch.segments == (
        Segment(0, 3, 4, -1, 0, 3, -1),
        Segment(3, 6, 4, 0, 3, 3, 0),
        Segment(6, 10, 4, 0, 3, 3, 1),
        Segment(10, 13, 4, -1, 0, -1, 2),
    )
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 1, 2]
    assert [chr(t + 96) for t in batch.targets[batch.loss_mask].tolist()] == list("abxyzo")
    assert not batch.loss_mask[:3].any()


def beginnings(batch: Batch) -> list[tuple[str, int]]:
    """What every segment holds, and the row it continues."""
    return [(letters(batch)[s.start : s.end], s.parent) for s in batch.segments]


def test_an_instruction_that_rows_have_in_common_is_stored_once() -> None:
    """Rows keep their order; the row that only begins alike shares what it can, and short beginnings are not cut."""
    rows = [RULES + TASK + "ay", RULES + "bn", "zz", RULES + TASK + "cy", "zy"]
    placed = [Placed(example(row, "0" * (len(row) - 1) + "1"), 3, k) for k, row in enumerate(rows)]
    batch = pack(placed, 1000, share_prefixes=True)[0]
    assert beginnings(batch) == [(RULES, -1), (TASK, 0), ("ay", 1), ("cy", 1), ("bn", 0), ("zz", -1), ("zy", -1)]
    assert [s.index for s in batch.segments] == [-1, -1, 0, 3, 1, 2, 4]
    assert [s.group for s in batch.segments] == [-1] * 7


def test_the_pairs_of_one_instruction_share_it_and_each_its_prompt() -> None:
    rows = [(RULES + "pqa", 0), (RULES + "pqb", 0), (RULES + "stc", 1), (RULES + "std", 1)]
    placed = [Placed(example(row, "0" * (len(row) - 1) + "1", g), 0, k) for k, (row, g) in enumerate(rows)]
    batch = pack(placed, 1000, share_prefixes=True)[0]
    expected = [(RULES, -1), ("p", 0), ("qa", 1), ("qb", 1), ("s", 0), ("tc", 4), ("td", 4)]
    assert beginnings(batch) == expected
    assert [s.group for s in batch.segments] == [-1, 0, 0, 0, 1, 1, 1]


def test_room_is_counted_as_stored() -> None:
    """Ten rows of 31 tokens, 29 of them in common: 29 + 10 · 2 tokens fit into one micro-batch of 60."""
    rows = [RULES + "pqrstuvw" + chr(97 + k) + "y" for k in range(10)]
    placed = [Placed(example(row, "0" * 30 + "1"), 0, k) for k, row in enumerate(rows)]
    assert [b.num_tokens for b in pack(placed, 60, share_prefixes=True)] == [49]
    assert len(pack(placed, 60)) == 10


def test_slots_apart_share_within_their_groups_only() -> None:
    rows = [(RULES + "pqa", 0), (RULES + "pqb", 0), (RULES + "stc", -1)]
    placed = [
        Placed(example(row, "0" * (len(row) - 1) + "1", g), slot, k)
        for slot in (0, 1)
        for k, (row, g) in enumerate(rows)
    ]
    batch = pack(placed, 1000, share_prefixes=True, apart={1})[0]
    assert [s.parent for s in batch.segments] == [-1, 0, 1, 1, 0, -1, 5, 5, -1]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((("abcd", "0001"), ("abce", "0001")), 2),
        ((("abcd", "0011"), ("abce", "0011")), 1),  # b must be repeated: c counts in both
        ((("abcd", "0111"), ("abcd", "0111")), 0),
        ((("abcd", "0000"), ("abcd", "0000")), 3),  # one token each must remain
        ((("ab", "00"), ("abcd", "0001")), 1),
        ((("xbcd", "0001"), ("abcd", "0001")), 0),
        ((("abcd", "0001"), ("abxd", "0001"), ("abcd", "0001")), 1),
        ((("abcd", "0001"), ("abcd", "0100")), 0),
        ((("a", "0"), ("a", "0")), 0),
    ],
)
def test_how_much_is_shared(rows: tuple[tuple[str, str], ...], expected: int) -> None:
    assert shared_prefix([example(*row) for row in rows]) == expected


RULES, TASK = "answerinoneortwowords", "sortthisintooneofthese"
"""Beginnings worth storing once (MIN_SHARED), the second inside the first's family."""


@st.composite
def draws(draw: st.DrawFn) -> list[Placed]:
    """Examples of several slots and groups, some with common beginnings."""
    placed = []
    for index in range(draw(st.integers(1, 9))):
        head = draw(st.sampled_from(["", "pq", "pqrst", "pqx", RULES, RULES + "pq", RULES + TASK, RULES + TASK + "x"]))
        tail = draw(st.text("abcd", min_size=1, max_size=5))
        mask = "0" * len(head) + "".join(draw(st.sampled_from("01")) for _ in tail)
        group = draw(st.integers(-1, 2))
        row = example(head + tail, mask, group, columns={"c": [float(k) for k in range(len(mask))]})
        placed.append(Placed(row, draw(st.integers(0, 2)), index))
    return placed


def unpacked(batches: list[Batch]) -> dict[int, tuple[list[int], list[tuple[int, int, float]]]]:
    """index → (all tokens, parents' included; (position, target, column) of every counted token)."""
    rows = {}
    for batch in batches:
        for segment in batch.segments:
            ids, parent = [], segment.parent
            while parent >= 0:
                above = batch.segments[parent]
                ids = batch.input_ids[above.start : above.end].tolist() + ids
                assert above.slot == segment.slot
                parent = above.parent
            assert segment.position0 == len(ids)
            ids += batch.input_ids[segment.start : segment.end].tolist()
            own = range(segment.start, segment.end)
            assert batch.position_ids[segment.start : segment.end].tolist() == list(range(segment.position0, len(ids)))
            counted = [
                (int(batch.position_ids[t]), int(batch.targets[t]), float(batch.columns["c"][t]))
                for t in own
                if batch.loss_mask[t]
            ]
            if segment.index < 0:
                assert counted == []
            else:
                rows[segment.index] = (ids, counted)
    return rows


@settings(max_examples=150)
@given(placed=draws(), size=st.integers(1, 120), share=st.booleans())
def test_every_token_arrives_once_whatever_the_size_and_sharing(placed: list[Placed], size: int, share: bool) -> None:
    batches = pack(placed, size, share_prefixes=share)
    expected = {
        p.index: (
            list(p.example.token_ids),
            [
                (k - 1, p.example.token_ids[k], float(k))
                for k in range(1, len(p.example.token_ids))
                if p.example.loss_mask[k]
            ],
        )
        for p in placed
    }
    assert unpacked(batches) == expected
    for batch in batches:
        assert [s.start for s in batch.segments] == [0, *(s.end for s in batch.segments[:-1])]
        assert [s.slot for s in batch.segments] == sorted(s.slot for s in batch.segments)
        whole = [s for s in batch.segments if s.index >= 0]
        bundles = Counter((s.slot, s.group if s.group >= 0 else ("alone", s.index)) for s in whole)
        assert batch.num_tokens <= size or len(bundles) == 1, "only a bundle that must stay together may be larger"
    homes: dict[tuple[int, int], set[int]] = {}
    for number, batch in enumerate(batches):
        for s in batch.segments:
            if s.group >= 0:
                homes.setdefault((s.slot, s.group), set()).add(number)
    assert all(len(numbers) == 1 for numbers in homes.values())


@settings(max_examples=60)
@given(placed=draws(), size=st.integers(1, 40), order=st.randoms(use_true_random=False))
def test_what_arrives_does_not_depend_on_the_order(placed: list[Placed], size: int, order: object) -> None:
    shuffled = list(placed)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert unpacked(pack(placed, size)) == unpacked(pack(shuffled, size))
