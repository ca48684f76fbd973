from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BeforeValidator, Field, field_validator

from tailor.config import Strict, Translated, dump_yaml, load_recipe, write_resolved
from tailor.errors import ConfigError, NotFoundError


class LoRA(Strict):
    type: Literal["lora"] = "lora"
    rank: int = Field(default=8, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "auto"


class Full(Strict):
    type: Literal["full"] = "full"
    only: tuple[str, ...] = ()


class PromptTuning(Strict):
    type: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int
    text: str | None = None


def spelled_out(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Technique = Annotated[
    Annotated[LoRA | Full | PromptTuning, Field(discriminator="type")],
    BeforeValidator(spelled_out),
]


class Optim(Strict):
    lr: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"


class Settings(Strict):
    base: str = "tailor-nano"
    data: str
    technique: Technique | list[Technique] = LoRA()
    optim: Optim = Optim()
    max_steps: int | Literal["auto"] = "auto"
    labels: dict[str, float] = Field(default={})
    stop: bool = True

    @field_validator("base")
    @classmethod
    def no_spaces(cls, value: str) -> str:
        if " " in value:
            raise ValueError("a base has no spaces in its name")
        return value


def recipe(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path | None, *overrides: str) -> list[str]:
    """The error's lines with the folder's name taken off."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, Settings, overrides)
    text = caught.value.message
    assert "pydantic" not in text
    assert "Input should" not in text
    return (text.replace(f"{path.parent}/", "") if path else text).splitlines()


def test_values_follow_yaml_1_2(tmp_path: Path) -> None:
    path = recipe(tmp_path, "data: no\nbase: 2024-01-01\noptim: {lr: 1e-5}\nlabels: {yes: 1, no: 0.5}\nstop: false\n")
    loaded = load_recipe(path, Settings)
    assert loaded.recipe == Settings(
        data="no", base="2024-01-01", optim=Optim(lr=1e-5), labels={"yes": 1.0, "no": 0.5}, stop=False
    )
    assert loaded.files == (path,)


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        """\
# a comment
bse: x
data: [a]
technique:
  type: lora
  rnak: 4
  dropout: 1.5
optim:
  lr: fast
  schedule: cosin
max_steps: many
stop: maybe
base: two words
""",
    )
    assert problems(path) == [
        "r.yaml:2: bse: unknown setting (did you mean 'base'? "
        "choices: base, data, technique, optim, max_steps, labels, stop)",
        "r.yaml:3: data: wants text, got a list",
        "r.yaml:6: technique.rnak: unknown setting (did you mean 'rank'? choices: type, rank, dropout, targets)",
        "r.yaml:7: technique.dropout: wants a number less than 1.0, got 1.5",
        "r.yaml:9: optim.lr: wants a number, got 'fast'",
        "r.yaml:10: optim.schedule: unknown value 'cosin' (did you mean 'cosine'? choices: cosine, linear, constant)",
        "r.yaml:11: max_steps: wants a whole number or 'auto', got 'many'",
        "r.yaml:12: stop: wants true or false, got 'maybe'",
        "r.yaml:13: base: a base has no spaces in its name",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("technique: lroa", "technique: unknown type 'lroa' (did you mean 'lora'? choices: lora, full, prompt_tuning)"),
        (
            "technique: {type: lroa}",
            "technique.type: unknown type 'lroa' (did you mean 'lora'? choices: lora, full, prompt_tuning)",
        ),
        ("technique: {rank: 4}", "technique.type: is required (choices: lora, full, prompt_tuning)"),
        ("technique: prompt_tuning", "technique.num_virtual_tokens: is required"),
        ("technique: {type: lora, rank: -1}", "technique.rank: wants a number greater than 0, got -1"),
        ("technique: {type: lora, targets: {a: 1}}", "technique.targets: wants text or a list, got a mapping"),
        ("technique: {type: lora, targets: [q, [k]]}", "technique.targets.1: wants text, got a list"),
        ("technique: {type: full, rank: 2}", "technique.rank: unknown setting (choices: type, only)"),
        (
            "technique: [lora, {type: prompt_tunin}]",
            "technique.1.type: unknown type 'prompt_tunin' (did you mean 'prompt_tuning'? "
            "choices: lora, full, prompt_tuning)",
        ),
        ("technique: [lora, {type: lora, rank: x}]", "technique.1.rank: wants a whole number, got 'x'"),
        ("technique: 3", "technique: wants a mapping (key: value) or a list, got 3"),
        ("base: 12", "base: wants text, got 12; put it in quotes"),
        ("optim: {lr: .nan}", "optim.lr: wants a finite number, got nan"),
        ("optim: 3", "optim: wants a mapping (key: value), got 3"),
        ("max_steps: 1.5", "max_steps: wants a whole number or 'auto', got 1.5"),
        ("labels: {a: x}", "labels.a: wants a number, got 'x'"),
        ("labels: {1: 2}", "labels.1: a key must be text: write '1' in quotes"),
        ("base: !secret x", "base: YAML tags have no meaning here: remove !secret"),
        ("optim:\n", "optim: wants a mapping (key: value), got nothing"),
    ],
)
def test_one_mistake_gives_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(recipe(tmp_path, f"data: d\n{text}\n")) == [f"r.yaml:2: {expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "r.yaml:1: a recipe is a mapping (key: value), this file holds a list"),
        ("hello", "r.yaml:1: a recipe is a mapping (key: value), this file holds 'hello'"),
        ("data: x\noptim:\n\tlr: 1\n", "r.yaml:3: a tab cannot indent YAML: use spaces"),
        ("data: x\ndata: y\n", "r.yaml:2: data: this key stands twice in one mapping"),
        ("data: [x\n", "r.yaml:2: not YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "data: a: b\n",
            "r.yaml:1: not YAML: a ':' where none can stand (wrong indentation, or text that needs quotes)",
        ),
        ("data: \x00\n", "r.yaml:1: not YAML: special characters are not allowed"),
        ("data: x\n---\ndata: y\n", "r.yaml:2: not YAML: but found another document"),
        ("&a\ndata: *a\n", "r.yaml: nested too deeply, or an alias that contains itself"),
        ("data: " + "[" * 1500, "r.yaml: nested too deeply, or an alias that contains itself"),
        ("", "r.yaml: data: is required"),
        ("# only a comment\n", "r.yaml: data: is required"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(recipe(tmp_path, text)) == [expected]


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    recipe(tmp_path, "data: x", "banking.yaml")
    with pytest.raises(NotFoundError, match=r"no such recipe: .*bankng\.yaml .*did you mean 'banking\.yaml'"):
        load_recipe(tmp_path / "bankng.yaml", Settings)
    with pytest.raises(NotFoundError, match="no such recipe"):
        load_recipe(tmp_path / "nowhere" / "r.yaml", Settings)
    with pytest.raises(ConfigError, match="is a folder"):
        load_recipe(tmp_path, Settings)
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_recipe(tmp_path / "latin.yaml", Settings)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfdata: x\r\n")
    assert load_recipe(tmp_path / "bom.yaml", Settings).recipe.data == "x"


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base = recipe(tmp_path, "data: a\ntechnique: [full]\noptim: {lr: 0.1, schedule: linear}\n", "base.yaml")
    middle = recipe(tmp_path, "extends: base.yaml\ntechnique: lora\n", "middle.yaml")
    top = recipe(tmp_path, "extends: ../middle.yaml\ntechnique: {rank: 2}\noptim: {lr: 0.2}\n", "sub/top.yaml")
    loaded = load_recipe(top, Settings, defaults={"max_steps": 5, "data": "default"})
    assert loaded.recipe == Settings(
        data="a", technique=LoRA(rank=2), optim=Optim(lr=0.2, schedule="linear"), max_steps=5
    )
    assert [path.resolve() for path in loaded.files] == [top, middle, base]


def test_another_type_takes_nothing_over(tmp_path: Path) -> None:
    recipe(tmp_path, "data: a\ntechnique: {type: lora, rank: 4}\n", "base.yaml")
    path = recipe(tmp_path, "extends: base.yaml\ntechnique: {type: full}\n")
    assert load_recipe(path, Settings).recipe.technique == Full()


def test_errors_name_the_file_that_wrote_the_value(tmp_path: Path) -> None:
    recipe(tmp_path, "data: a\noptim:\n  lr: -1\n  schedule: x\n", "base.yaml")
    path = recipe(tmp_path, "# top\nextends: base.yaml\noptim: {schedule: y}\n")
    assert problems(path) == [
        "base.yaml:3: optim.lr: wants a number greater than 0.0, got -1",
        "r.yaml:3: optim.schedule: unknown value 'y' (choices: cosine, linear, constant)",
    ]


def test_extends_that_cannot_be_followed(tmp_path: Path) -> None:
    recipe(tmp_path, "extends: r.yaml\ndata: a\n", "base.yaml")
    assert problems(recipe(tmp_path, "extends: base.yaml\n")) == [
        "base.yaml:1: extends: r.yaml extends this file in turn"
    ]
    (line,) = problems(recipe(tmp_path, "data: x\nextends: bas.yaml\n"))
    assert line.startswith("r.yaml:2: extends: no such recipe: bas.yaml")
    assert "did you mean 'base.yaml'" in line
    assert problems(recipe(tmp_path, "data: x\nextends: [a]\n")) == [
        "r.yaml:2: extends: wants the path of one recipe, got a list"
    ]


def test_overrides(tmp_path: Path) -> None:
    path = recipe(tmp_path, "data: a\ntechnique: [lora, {type: lora, rank: 2}]\noptim: {lr: 0.5, schedule: linear}\n")
    loaded = load_recipe(
        path,
        Settings,
        [
            "technique.0.rank=4",
            "technique.1={type: full}",
            "~optim.schedule",
            "optim.lr=1e-3",
            "labels.a=1",
            "data=Answer: yes # no",
            'base="x"',
            "max_steps=7",
        ],
    )
    assert loaded.recipe == Settings(
        data="Answer: yes # no",
        base="x",
        technique=[LoRA(rank=4), Full()],
        optim=Optim(lr=1e-3),
        labels={"a": 1.0},
        max_steps=7,
    )


def test_overrides_need_no_file() -> None:
    assert load_recipe(None, Settings, ["data=x", "technique=full"]).recipe == Settings(data="x", technique=Full())
    assert problems(None) == ["settings: data: is required"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=no", "override 'optim.lr=no': optim.lr: wants a number, got 'no'"),
        ("optm.lr=1", "override 'optm.lr=1': optm: unknown setting (did you mean 'optim'? "),
        ("technique.rnk=1", "override 'technique.rnk=1': technique.rnk: unknown setting (did you mean 'rank'? "),
        ("~optim.schedul", "override '~optim.schedul': optim.schedul: nothing to delete (did you mean 'schedule'? "),
        ("~dat", "override '~dat': dat: nothing to delete (did you mean 'data'? "),
        ("optim.lr.x=1", "override 'optim.lr.x=1': optim.lr.x: there is 0.5 above 'x', which has no settings"),
        ("data", "override 'data': wants key=value, or ~key to delete"),
        ("=3", "override '=3': wants key=value, or ~key to delete"),
        ("~data=3", "override '~data=3': wants key=value, or ~key to delete"),
        ("labels=[1", "override 'labels=[1': labels: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("many.3.x=1", "override 'many.3.x=1': many.3.x: '3' is no position in a list of 1 (the first is 0)"),
        ("stop=", "override 'stop=': stop: wants true or false, got nothing"),
    ],
)
def test_wrong_overrides_are_quoted(tmp_path: Path, override: str, expected: str) -> None:
    path = recipe(tmp_path, "data: a\ntechnique: lora\noptim: {lr: 0.5, schedule: linear}\nmany: [1]\n")
    lines = problems(path, override)
    assert any(line.startswith(expected) for line in lines), lines


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "12")
    monkeypatch.delenv("NOT_THERE", raising=False)
    path = recipe(tmp_path, "data: /in/${env:STEPS}/x\nmax_steps: ${env:STEPS}\n")
    assert load_recipe(path, Settings).recipe == Settings(data="/in/12/x", max_steps=12)
    path = recipe(tmp_path, "data: x\nmax_steps: ${env:NOT_THERE}\nstop: 7\n")
    assert problems(path) == [
        "r.yaml:2: max_steps: the environment variable 'NOT_THERE' is not set",
        "r.yaml:3: stop: wants true or false, got 7",
    ]


def test_merge_keys_and_aliases(tmp_path: Path) -> None:
    path = recipe(tmp_path, "data: x\ntechnique:\n  - &a {type: lora, rank: 2}\n  - {<<: *a, dropout: 7}\n")
    assert problems(path) == ["r.yaml:4: technique.1.dropout: wants a number less than 1.0, got 7"]


def test_settings_classes_in_python() -> None:
    with pytest.raises(ConfigError, match=r"^LoRA\.rnak: unknown setting \(did you mean 'rank'\?"):
        LoRA(rnak=4)  # type: ignore[call-arg]
    with pytest.raises(ConfigError) as caught:
        Settings(data=3, optim={"lr": 0})  # type: ignore[arg-type]
    assert caught.value.message.splitlines() == [
        "Settings.data: wants text, got 3; put it in quotes",
        "Settings.optim.lr: wants a number greater than 0.0, got 0",
    ]
    with pytest.raises(TypeError):
        LoRA(8)  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        LoRA().rank = 3  # type: ignore[misc]


def test_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    settings = Settings(
        data="a: b",
        technique=[PromptTuning(num_virtual_tokens=3, text="one\ntwo\n"), Full(only=("x", "no"))],
        optim=Optim(lr=3e-5),
    )
    write_resolved(settings, tmp_path / "run" / "resolved.yaml")
    text = (tmp_path / "run" / "resolved.yaml").read_text("utf-8")
    assert "text: |\n" in text
    assert load_recipe(tmp_path / "run" / "resolved.yaml", Settings).recipe == settings


PRINTABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PRINTABLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PRINTABLE, inner, max_size=3),
    max_leaves=8,
)


class Anything(Strict):
    value: Any


@given(VALUES)
def test_dump_is_inverse_of_load(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = recipe(Path(folder), dump_yaml({"value": value}))
        assert load_recipe(path, Anything).recipe.value == value


class Foreign(Strict):
    """Reads `theirs: {deep: 3}` as `ours: 3`."""

    ours: int = 0

    @classmethod
    def translate(cls, data: dict[str, Any]) -> Translated:
        if "theirs" not in data:
            return Translated(data)
        other = {key: value for key, value in data.items() if key != "theirs"}
        unknown = [key for key in data["theirs"] if key != "deep"]
        return Translated(
            {**other, "ours": data["theirs"].get("deep")},
            {("ours",): ("theirs", "deep")},
            tuple((("theirs", key), "not read") for key in unknown),
        )


def test_another_projects_words_are_ours_and_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("theirs:\n  deep: 3\n")
    assert load_recipe(path, Foreign).recipe == Foreign(ours=3)
    assert load_recipe(path, Foreign, ["theirs.deep=4"]).recipe == Foreign(ours=4)
    path.write_text("theirs:\n\n  deep: x\n  flat: 1\nour: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, Foreign)
    assert str(caught.value).splitlines() == [
        f"{path}:3: theirs.deep: wants a whole number, got 'x'",
        f"{path}:4: theirs.flat: not read",
        f"{path}:5: our: unknown setting (did you mean 'ours'? choices: ours)",
    ]
