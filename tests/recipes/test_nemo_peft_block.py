"""NeMo's `peft` block runs as it stands: every key by its name here, and every refusal with its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mood_rows import write_moods
from tailor.artifacts.artifact import find
from tailor.cli.main import run
from tailor.config import load_recipe, write_resolved
from tailor.errors import ConfigError
from tailor.recipes.nemo import BLOCKS, SCHEMES
from tailor.recipes.tune_settings import TuneRecipe
from tailor.techniques import TECHNIQUES
from tailor.techniques.adapter import Adapter
from tailor.techniques.full import Full
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.techniques.p_tuning import PTuning
from tiny_models import tiny_base, tiny_model, tiny_tokenizer

# as NeMo's own file has it, with the comments that stand in it; the scheme is filled in
SHIPPED = """\
data: {{train: rows.jsonl}}
output: {{name: mine}}
model:
  peft:
    peft_scheme: {scheme} # one of adapter, ia3, ptuning, adapter_and_ptuning, lora, null
    restore_from_path: null
    adapter_tuning:
      type: 'parallel_adapter' # or 'linear_adapter'
      adapter_dim: 32
      adapter_dropout: 0.0
      norm_position: 'pre' # or 'post'
      column_init_method: 'xavier' # xavier, zero or normal
      row_init_method: 'zero'
      norm_type: 'mixedfusedlayernorm' # or 'layernorm'
      layer_selection: null
      weight_tying: False
      position_embedding_strategy: null
    lora_tuning:
      adapter_dim: 32
      adapter_dropout: 0.0
      column_init_method: 'xavier'
      row_init_method: 'zero'
      layer_selection: null
      weight_tying: False
      position_embedding_strategy: null
    p_tuning:
      virtual_tokens: 10 # at the start of the sequence
      bottleneck_dim: 1024
      embedding_dim: 1024
      init_std: 0.023
    ia3_tuning:
      layer_selection: null
"""
ADAPTER = Adapter(
    bottleneck_size=32, form="sequential", activation="silu", norm="pre", init_down="xavier", init_up="zero"
)
LORA = LoRA(rank=32, alpha=32, target_modules="query-key-value", init_a="xavier", init_b="zero")
P_TUNING = PTuning(num_virtual_tokens=10, encoder="mlp", encoder_hidden=1024, embedding_size=1024, init_std=0.023)


def load(folder: Path, text: str, *overrides: str) -> TuneRecipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, TuneRecipe, overrides).recipe


def with_block(block: str) -> str:
    """A recipe of which the block begins in line 3."""
    indented = "".join(f"  {line}\n" for line in block.splitlines())
    return f"data: {{train: rows.jsonl}}\noutput: {{name: mine}}\npeft:\n{indented}"


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return [line.removeprefix(f"{folder / 'recipe.yaml'}:") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("adapter", (ADAPTER,)),
        ('"adapter"', (ADAPTER,)),
        ("lora", (LORA,)),
        ("ptuning", (P_TUNING,)),
        ("ia3", (IA3(),)),
        ("adapter_and_ptuning", (ADAPTER, P_TUNING)),
        ("null", (Full(),)),
        ("none", (Full(),)),
    ],
)
def test_nemos_own_block_runs_as_it_stands(tmp_path: Path, scheme: str, expected: tuple[Any, ...]) -> None:
    recipe = load(tmp_path, SHIPPED.format(scheme=scheme))
    assert recipe.technique == expected
    assert recipe.start is None
    chosen = [name for names in (SCHEMES.get(scheme.strip('"'), ()),) for name in names]
    unused = [name for name in BLOCKS if name not in chosen]
    assert recipe.notes[-1].startswith("model.peft: unused, as peft_scheme is ")
    assert recipe.notes[-1].endswith(f": {', '.join(unused)}")


def test_the_block_may_stand_at_the_top(tmp_path: Path) -> None:
    recipe = load(tmp_path, with_block("peft_scheme: lora\nlora_tuning: {adapter_dim: 8}"))
    assert recipe.technique == (LORA.model_copy(update={"rank": 8, "alpha": 8.0}),)
    assert not any("unused" in note for note in recipe.notes)


@pytest.mark.parametrize("scheme", ["adapter", "lora", "ptuning", "adapter_and_ptuning", "ia3"])
@pytest.mark.parametrize("form", ["", "{name}:", "{name}: {{}}", "{name}: {{{first}: null}}"])
def test_what_is_not_given_is_as_in_nemos_file(tmp_path: Path, scheme: str, form: str) -> None:
    lines = [form.format(name=name, first=next(iter(BLOCKS[name].keys))) for name in SCHEMES[scheme]]
    recipe = load(tmp_path, with_block("\n".join([f"peft_scheme: {scheme}", *lines])))
    assert recipe.technique == load(tmp_path, SHIPPED.format(scheme=scheme)).technique


ALIASES = [
    ("adapter", "type: parallel_adapter", {"form": "sequential"}),
    ("adapter", "type: linear_adapter", {"form": "sequential"}),
    ("adapter", "adapter_dim: 7", {"bottleneck_size": 7}),
    ("adapter", "adapter_dropout: 0.25", {"dropout": 0.25}),
    ("adapter", "norm_position: post", {"norm": "post"}),
    ("adapter", "norm_position: null", {"norm": "none"}),
    ("adapter", "norm_type: mixedfusedlayernorm", {"norm": "pre"}),
    ("adapter", "norm_type: layernorm", {"norm": "pre"}),
    ("adapter", "column_init_method: normal", {"init_down": "normal"}),
    ("adapter", "row_init_method: xavier", {"init_up": "xavier"}),
    ("adapter", "layer_selection: [1, 3]", {"target_layers": (0, 2)}),
    ("adapter", "weight_tying: true", {"weight_tying": True}),
    ("adapter", "position_embedding_strategy: null", {}),
    ("lora", "adapter_dim: 7", {"rank": 7, "alpha": 7.0}),
    ("lora", "alpha: 64", {"rank": 32, "alpha": 64.0}),
    ("lora", "alpha: ${model.peft.lora_tuning.adapter_dim}", {"rank": 32, "alpha": 32.0}),
    ("lora", "alpha: ${adapter_dim}", {"rank": 32, "alpha": 32.0}),
    ("lora", "adapter_dropout: 0.25", {"dropout": 0.25}),
    ("lora", "column_init_method: normal", {"init_a": "normal"}),
    ("lora", "row_init_method: normal", {"init_b": "normal"}),
    ("lora", "target_modules: [attention_qkv]", {"target_modules": "query-key-value"}),
    ("lora", "target_modules: [all]", {"target_modules": "all-linear"}),
    ("lora", "layer_selection: [2]", {"target_layers": (1,)}),
    ("lora", "weight_tying: false", {}),
    ("lora", "position_embedding_strategy: null", {}),
    ("ptuning", "virtual_tokens: 7", {"num_virtual_tokens": 7}),
    ("ptuning", "bottleneck_dim: 7", {"encoder_hidden": 7}),
    ("ptuning", "embedding_dim: 7", {"embedding_size": 7}),
    ("ptuning", "init_std: 0.5", {"init_std": 0.5}),
    ("ia3", "layer_selection: [1]", {"target_layers": (0,)}),
]


@pytest.mark.parametrize(("scheme", "line", "settings"), ALIASES)
def test_every_alias(tmp_path: Path, scheme: str, line: str, settings: dict[str, Any]) -> None:
    block = SCHEMES[scheme][0]
    found = load(tmp_path, with_block(f"peft_scheme: {scheme}\n{block}:\n  {line}")).technique[0]
    plain = load(tmp_path, with_block(f"peft_scheme: {scheme}")).technique[0]
    assert found == plain.model_copy(update=settings)
    assert found.model_fields_set == plain.model_fields_set | settings.keys()


def test_the_table_names_settings_that_exist_and_this_file_tries_each_key() -> None:
    tried = {(SCHEMES[scheme][0], line.partition(":")[0]) for scheme, line, _ in ALIASES}
    assert tried == {(name, key) for name, block in BLOCKS.items() for key in block.keys}
    for block in BLOCKS.values():
        ours = {key.ours for key in block.keys.values() if key.ours} | block.fixed.keys()
        assert ours <= TECHNIQUES[block.technique].model_fields.keys()
        assert all(key.like in ("", *block.keys) for key in block.keys.values())


REFUSALS = [
    ("adapter_tuning: {}", r"3: peft: peft_scheme is required \(choices: adapter, ia3, .*none, null\)"),
    (
        "peft_scheme: adapters",
        r"4: peft\.peft_scheme: unknown scheme 'adapters' \(did you mean 'adapter'\?.*",
    ),
    ("peft_scheme: [lora]", r"4: peft\.peft_scheme: unknown scheme a list .*"),
    ("peft_scheme: lora\nlora_tunning: {}", r"5: peft\.lora_tunning: unknown setting \(did you mean 'lora_tuning'\?.*"),
    ("peft_scheme: lora\nlora_tuning: 8", r"5: peft\.lora_tuning: wants a mapping \(key: value\), got 8"),
    (
        "peft_scheme: lora\nlora_tuning:\n  adapter_dims: 8",
        r"6: peft\.lora_tuning\.adapter_dims: unknown setting \(did you mean 'adapter_dim'\? choices: .*",
    ),
    (
        "peft_scheme: lora\nlora_tuning:\n  rank: 8",
        r"6: peft\.lora_tuning\.rank: unknown setting \(NeMo calls it 'adapter_dim'\)",
    ),
    (
        "peft_scheme: lora\nlora_tuning:\n  alpha: 8\n  adapter_dim: 0",
        r"7: peft\.lora_tuning\.adapter_dim: wants a number of at least 1, got 0",
    ),
    (
        "peft_scheme: lora\nlora_tuning: {adapter_dim: none}",
        r"5: peft\.lora_tuning\.adapter_dim: wants a whole number, got 'none'",
    ),
    (
        "peft_scheme: lora\nlora_tuning:\n\n  weight_tying: true",
        r"7: peft\.lora_tuning\.weight_tying: true is not supported: only an adapter has weight_tying",
    ),
    (
        "peft_scheme: lora\nlora_tuning:\n  target_modules: [attention_qkv, mlp_fc1]",
        r"6: peft\.lora_tuning\.target_modules: wants \[attention_qkv\] or \[all\]; .*technique\.target_modules.*",
    ),
    (
        "peft_scheme: lora\nlora_tuning:\n  target_modules: [[attention_qkv]]",
        r"6: peft\.lora_tuning\.target_modules: wants \[attention_qkv\] or \[all\]; .*technique\.target_modules.*",
    ),
    (
        "peft_scheme: lora\nlora_tuning: {column_init_method: uniform}",
        r"5: peft\.lora_tuning\.column_init_method: unknown value 'uniform' \(.*choices: xavier, zero, normal\)",
    ),
    (
        "peft_scheme: lora\nlora_tuning:\n  column_init_method: zero",
        r"5: peft\.lora_tuning: init_a and init_b are both zero: neither would ever get a gradient",
    ),
    (
        "peft_scheme: adapter\nadapter_tuning:\n  type: parallel",
        r"6: peft\.adapter_tuning\.type: unknown value 'parallel' \(did you mean 'parallel_adapter'\?.*",
    ),
    (
        "peft_scheme: adapter\nadapter_tuning:\n  norm_type: rmsnorm",
        r"6: peft\.adapter_tuning\.norm_type: unknown value 'rmsnorm' \(.*mixedfusedlayernorm, layernorm\)",
    ),
    (
        "peft_scheme: adapter\nadapter_tuning:\n  norm_position: before",
        r"6: peft\.adapter_tuning\.norm_position: unknown value 'before' \(choices: pre, post, null\)",
    ),
    (
        "peft_scheme: adapter\nadapter_tuning:\n  adapter_dropout: 1.5",
        r"6: peft\.adapter_tuning\.adapter_dropout: wants a number less than 1.*, got 1\.5",
    ),
    (
        "peft_scheme: adapter\nadapter_tuning:\n  position_embedding_strategy: concat",
        r"6: peft\.adapter_tuning\.position_embedding_strategy: 'concat' is not supported: .*weight_tying.*",
    ),
    (
        "peft_scheme: ia3\nia3_tuning:\n  layer_selection: [0, 1]",
        r"6: peft\.ia3_tuning\.layer_selection: wants a list of layers, of which the first is 1, got .*",
    ),
    (
        "peft_scheme: ia3\nia3_tuning:\n  layer_selection: 2",
        r"6: peft\.ia3_tuning\.layer_selection: wants a list of layers, of which the first is 1, got 2",
    ),
    (
        "peft_scheme: ptuning\np_tuning:\n  virtual_tokens: -1",
        r"6: peft\.p_tuning\.virtual_tokens: wants a number of at least 1, got -1",
    ),
    (
        "peft_scheme: lora\nrestore_from_path: 3",
        r"5: peft\.restore_from_path: wants text, got 3; put it in quotes",
    ),
]


@pytest.mark.parametrize(("block", "message"), REFUSALS)
def test_every_refusal_names_its_line_and_what_would_do(tmp_path: Path, block: str, message: str) -> None:
    found = problems(tmp_path, with_block(block))
    assert len(found) == 1
    assert re.fullmatch(message, found[0])


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = with_block("peft_scheme: loora\nfoo: 1") + "train: {num_epoch: 3}\n"
    assert [line.split(" (")[0] for line in problems(tmp_path, text)] == [
        "4: peft.peft_scheme: unknown scheme 'loora'",
        "5: peft.foo: unknown setting",
        "6: train.num_epoch: unknown setting",
    ]


def test_the_rest_of_nemos_model_is_not_read(tmp_path: Path) -> None:
    text = "data: {train: x}\noutput: {name: y}\nmodel:\n  seed: 1\n  peft: {peft_scheme: ia3}\n"
    [line] = problems(tmp_path, text)
    assert line.startswith("4: model.seed: unknown setting (of NeMo's model only peft is read; at the recipe's top: ")
    [line] = problems(tmp_path, "data: {train: x}\noutput: {name: y}\ntechnique: lora\nmodel: {seed: 1}\n")
    assert line.startswith("4: model: unknown setting")


def test_two_answers_to_one_question_are_refused(tmp_path: Path) -> None:
    both = with_block("peft_scheme: lora") + "technique: ia3\n"
    [line] = problems(tmp_path, both)
    assert line.startswith("3: peft: technique says what is trained already: keep one")
    assert load(tmp_path, both, "~technique").technique == (LORA,)
    assert load(tmp_path, both, "~peft").technique == (IA3(),)
    [line] = problems(tmp_path, with_block("peft_scheme: lora\nrestore_from_path: a") + "start: b\n")
    assert line == "5: peft.restore_from_path: start says where training begins already: keep one"
    twice = with_block("peft_scheme: lora") + "model: {peft: {peft_scheme: ia3}}\n"
    assert problems(tmp_path, twice) == ["5: model.peft: there is peft already: keep one of them"]


def test_overrides_speak_nemos_words(tmp_path: Path) -> None:
    text = SHIPPED.format(scheme="adapter")
    found = load(tmp_path, text, "model.peft.peft_scheme=lora", "model.peft.lora_tuning.adapter_dim=4")
    assert found.technique == (LORA.model_copy(update={"rank": 4, "alpha": 4.0}),)
    key = "model.peft.adapter_tuning.adapter_dim"
    [line] = problems(tmp_path, text, f"{key}=0")
    assert line == f"override '{key}=0': {key}: wants a number of at least 1, got 0"


def test_a_resolved_recipe_repeats_the_run(tmp_path: Path) -> None:
    text = SHIPPED.format(scheme="adapter_and_ptuning").replace("path: null", "path: earlier")
    recipe = load(tmp_path, text + "notes: [a first try]\n")
    assert recipe.start == "earlier"
    assert recipe.notes[0] == "a first try"
    assert "model.peft.adapter_tuning.type: NeMo's parallel_adapter is a sequential adapter" in recipe.notes[1]
    write_resolved(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml", TuneRecipe).recipe == recipe


@pytest.mark.parametrize(
    ("model_type", "ends"),
    [("llama", {"q_proj", "k_proj", "v_proj"}), ("gpt2", {"c_attn"}), ("gpt_neox", {"query_key_value"})],
)
def test_nemos_lora_sits_on_queries_keys_and_values_unscaled(model_type: str, ends: set[str]) -> None:
    base = tiny_base(model_type)
    slot = base.host.attach([LORA])
    assert {name.rpartition(".")[2] for name in slot.deltas} == ends
    assert {delta.terms().scale for deltas in slot.deltas.values() for delta in deltas} == {1.0}


@pytest.mark.parametrize("scheme", ["adapter_and_ptuning", "lora", "ia3", "none"])
def test_a_run_from_nemos_block(
    tmp_path: Path, own_home: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line; what was left unused is said there and kept with the artifact."""
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().hf.save_pretrained(tmp_path / "tiny")
    rows = write_moods(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(SHIPPED.format(scheme=scheme))
    small = [f"base.name={tmp_path / 'tiny'}", f"data.train={rows}", "train.num_steps=2", "train.batch_size=4"]
    assert run(["tune", str(path), "--quiet", *small]) == 0
    kinds = [technique["type"] for technique in find("mine").manifest["techniques"]]
    assert kinds == ([BLOCKS[name].technique for name in SCHEMES[scheme]] or ["full"])
    unused = [note for note in find("mine").manifest["notes"] if "unused" in note]
    assert len(unused) == 1
    assert f"note: {unused[0]}" in " ".join(capsys.readouterr().err.splitlines())
