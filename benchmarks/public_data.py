"""Public data sets as rows to learn from and rows to test on, in the home format, never one prompt on both sides.

The data is not part of the project: give the folder that holds banking77/, e2e/, ... A data set's own split is kept
where it has one; else the rows are divided by a hash of what must stay together (the prompt, a dialogue, a task).

    python benchmarks/public_data.py DATA OUT [--names banking77 e2e ...] [--max-train N] [--max-test N]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row and its side: "train", "test", or None to be decided by the hash of `together` (of the prompt when "")."""

    side: str | None
    prompt: str
    completion: str
    together: str = ""


@dataclass(frozen=True)
class DataSet:
    """How one data set is read, and in one line what its rows ask for.

    `answer_pattern` reads the answer out of a completion. `test_tenths` is the share of test rows that a hash draws.
    """

    rows: Callable[[Path], Iterator[Row]]
    about: str
    answer_pattern: str | None = None
    test_tenths: int = 1


@dataclass(frozen=True)
class Prepared:
    """The two files of a data set. `notes` says which rows were left out and why."""

    name: str
    train: Path
    test: Path
    num_train: int
    num_test: int
    answer_pattern: str | None
    about: str
    notes: tuple[str, ...]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _side(split: str) -> str:
    """Everything that is not for training (dev, val, test) is for testing."""
    return "train" if split == "train" else "test"


def _banking77(folder: Path) -> Iterator[Row]:
    for row in read(folder / "banking77/train.jsonl.gz"):
        yield Row(None, row["text"], row["category"])


def _clinc150(folder: Path) -> Iterator[Row]:
    for file in ("train", "oos_train", "val", "oos_val"):
        for row in read(folder / f"clinc150/{file}.jsonl.gz"):
            yield Row("train" if file.endswith("train") else "test", row["text"], row["intent"])


def _sentence_polarity(folder: Path) -> Iterator[Row]:
    for row in read(folder / "sentiment/sentence_polarity.jsonl.gz"):
        yield Row(_side(row["suggested_split"]), row["text"], row["label"])


def _product_review_aspects(folder: Path) -> Iterator[Row]:
    """Sentences with rated aspects, and of those without any three in ten ("none")."""
    for row in read(folder / "sentiment/product_review_aspects.jsonl.gz"):
        rated = [(a["aspect"], "positive" if a["score"] > 0 else "negative") for a in row["aspects"] if a["score"]]
        if rated or _tenth(row["text"]) < 3:
            found = "; ".join(f"{aspect}: {feeling}" for aspect, feeling in rated)
            yield Row(_side(row["suggested_split"]), row["text"], found or "none")


def _e2e(folder: Path) -> Iterator[Row]:
    for row in read(folder / "e2e/devset.jsonl.gz"):
        yield Row(_side(row["suggested_split"]), row["mr"], row["ref"])


def _sgd_nlg(folder: Path) -> Iterator[Row]:
    for row in read(folder / "sgd/nlg.train.jsonl.gz"):
        yield Row(None, f"{row['service'].rpartition('_')[0]}: {row['mr']}", row["text"])


def _sgd_tool_calls(folder: Path) -> Iterator[Row]:
    for row in read(folder / "sgd/tool_calls.dev.jsonl.gz"):
        yield Row(None, "\n".join(row["history"]), json.dumps(row["call"], ensure_ascii=False), row["dialogue_id"])


def _mts_dialog(folder: Path) -> Iterator[Row]:
    for file in ("train", "dev"):
        for row in read(folder / f"mts-dialog/{file}.jsonl.gz"):
            yield Row(_side(file), f"Section: {row['section_header']}\n{row['dialogue']}", row["section_text"])


def _scitldr(folder: Path) -> Iterator[Row]:
    for row in read(folder / "scitldr/train.jsonl.gz"):
        yield Row(None, " ".join(row["source"]), row["target"][0])


def _medquad(folder: Path) -> Iterator[Row]:
    """Without the rows whose answer is a table of symptoms, which is no text to learn from."""
    for file in ("train", "dev"):
        for row in read(folder / f"medquad/qa.{file}.jsonl.gz"):
            if not row.get("phenotype_table"):
                yield Row(_side(file), row["question"], row["answer"])


def _factbook(folder: Path) -> Iterator[Row]:
    texts = {row["doc_id"]: row["text"] for row in read(folder / "factbook-rag/docs.jsonl.gz")}
    for row in read(folder / "factbook-rag/questions.jsonl.gz"):
        prompt = f"{texts[row['doc_id']]}\n\nQuestion: {row['question']}"
        yield Row(_side(row["suggested_split"]), prompt, row["answer"])


def _gsm8k(folder: Path) -> Iterator[Row]:
    for row in read(folder / "gsm8k/train.jsonl.gz"):
        yield Row(None, row["question"], row["answer"])


def _strategyqa(folder: Path) -> Iterator[Row]:
    for row in read(folder / "strategyqa/train.jsonl.gz"):
        yield Row(None, row["question"], "yes" if row["answer"] else "no")


def _toxicity(folder: Path) -> Iterator[Row]:
    """The offensive text is only ever what is read; what is learned to write is the label."""
    for row in read(folder / "toxicity/comments.jsonl.gz"):
        yield Row(_side(row["suggested_split"]), row["text"], row["is_toxic"].lower())


def _instruct(task: str, *templates: str) -> Callable[[Path], Iterator[Row]]:
    """Some phrasings of a task of instruct-tasks. Each lists the same 200 cases, and a case stays on one side."""

    def rows(folder: Path) -> Iterator[Row]:
        seen: dict[str, int] = {}
        for row in read(folder / f"instruct-tasks/{task}.jsonl.gz"):
            if row["template"] in templates:
                seen[row["template"]] = case = seen.get(row["template"], -1) + 1
                together = f"{task} {case}" if len(templates) > 1 else row["prompt"]
                yield Row(None, row["prompt"], row["completion"], together)

    return rows


DATA_SETS: dict[str, DataSet] = {
    "banking77": DataSet(_banking77, "question of a bank's customer → one of 77 intents"),
    "clinc150": DataSet(_clinc150, "request to an assistant → one of 150 intents, or oos (out of scope)"),
    "sentence_polarity": DataSet(_sentence_polarity, "sentence of a film review → positive or negative"),
    "product_review_aspects": DataSet(_product_review_aspects, "sentence of a review → aspects with feelings"),
    "e2e": DataSet(_e2e, "facts of a restaurant → a sentence"),
    "sgd-nlg": DataSet(_sgd_nlg, "an assistant's dialogue acts → its sentence"),
    "sgd-tool-calls": DataSet(_sgd_tool_calls, "dialogue → the API call as JSON"),
    "mts-dialog": DataSet(_mts_dialog, "talk of doctor and patient → a section of the note"),
    "scitldr": DataSet(_scitldr, "abstract of a paper → one sentence"),
    "medquad": DataSet(_medquad, "question on health → an answer from memory"),
    "factbook": DataSet(_factbook, "text on a country and a question → words of the text"),
    "gsm8k": DataSet(_gsm8k, "problem of school mathematics → steps and a number", r"#### (.*)"),
    "strategyqa": DataSet(_strategyqa, "question that takes several steps → yes or no"),
    "toxicity": DataSet(_toxicity, "comment → toxic or not toxic"),
    "common_gen": DataSet(
        _instruct("common_gen", "Given_concepts_type_1"), "a few words → a sentence with them", test_tenths=3
    ),
    "quarel": DataSet(
        _instruct("quarel", "choose_between", "logic_test"), "story → one of two words in it", test_tenths=3
    ),
    "quartz": DataSet(
        _instruct("quartz", "use_info_from_question_paragraph", "answer_question_below"),
        "fact and question → one of two words in it",
        test_tenths=3,
    ),
    "wiqa": DataSet(
        _instruct("wiqa", "effect_with_string_answer"),
        "process and a change → more, less or no effect",
        test_tenths=3,
    ),
    "wiki_bio": DataSet(_instruct("wiki_bio", "who"), "facts of a person → a biography", test_tenths=3),
}
"""dbpedia_14 of instruct-tasks is missing: all its completions are one and the same."""


def prepare(
    folder: Path,
    name: str,
    out: Path,
    *,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Write `NAME-train.jsonl` and `NAME-test.jsonl` to `out`, at most so many rows each, drawn by `seed`.

    Left out and counted in the notes: rows without prompt or completion, repeated rows, and training rows whose prompt
    stands in the test rows (white space and case aside). A draw of test rows takes every prompt once before any twice.
    """
    data = DATA_SETS[name]
    sides: dict[str, dict[Row, None]] = {"train": {}, "test": {}}
    empty = total = 0
    for row in data.rows(folder):
        total += 1
        if not (row.prompt.strip() and row.completion.strip()):
            empty += 1
            continue
        side = row.side or ("test" if _tenth(row.together or row.prompt) < data.test_tenths else "train")
        sides[side][Row(side, row.prompt, row.completion)] = None
    repeated = total - empty - sum(map(len, sides.values()))
    tested = {_plain(row.prompt) for row in sides["test"]}
    train = [row for row in sides["train"] if _plain(row.prompt) not in tested]
    shared = len(sides["train"]) - len(train)
    train, test = _draw(train, max_train, seed), _draw(list(sides["test"]), max_test, seed)
    counts = {"without text": empty, "repeated": repeated, "in training with a prompt of the test rows": shared}
    notes = tuple(f"{count} rows {what} left out" for what, count in counts.items() if count)
    out.mkdir(parents=True, exist_ok=True)
    files = {side: out / f"{name}-{side}.jsonl" for side in sides}
    for side, rows in (("train", train), ("test", test)):
        lines = (json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows)
        files[side].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    about, pattern = data.about, data.answer_pattern
    return Prepared(name, files["train"], files["test"], len(train), len(test), pattern, about, notes)


def _draw(rows: list[Row], most: int | None, seed: int) -> list[Row]:
    if most is None or len(rows) <= most:
        return rows
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    seen: dict[str, int] = {}
    turns = []
    for place, index in enumerate(order):
        prompt = _plain(rows[index].prompt)
        seen[prompt] = seen.get(prompt, -1) + 1
        turns.append((seen[prompt], place, index))
    return [rows[index] for _, _, index in sorted(turns)[:most]]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _tenth(text: str) -> int:
    """A number from 0 to 9 that depends on nothing but the text."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10


def main() -> None:
    """Prepare the named data sets and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--names", nargs="+", default=list(DATA_SETS), choices=list(DATA_SETS), metavar="NAME")
    parser.add_argument("--max-train", type=int)
    parser.add_argument("--max-test", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder is None or arguments.out is None:
        print("skipped: this program needs the folder of the public data sets and one to write to (see --help)")
        return
    print(f"{'name':24s} {'train':>6s} {'test':>6s} {'prompt':>7s} {'completion':>10s}  (mean characters)")
    for name in arguments.names:
        made = prepare(
            arguments.folder,
            name,
            arguments.out,
            max_train=arguments.max_train,
            max_test=arguments.max_test,
            seed=arguments.seed,
        )
        with made.train.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        prompt, completion = (mean(len(row[key]) for row in rows) for key in ("prompt", "completion"))
        print(f"{name:24s} {made.num_train:6d} {made.num_test:6d} {prompt:7.0f} {completion:10.0f}  {made.about}")
        for note in made.notes:
            print(f"  {note}")


if __name__ == "__main__":
    main()
