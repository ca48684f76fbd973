"""NeMo's `peft` block in a recipe, as it stands: one table of its keys, and what each of them is called here.

    peft:                        technique:
      peft_scheme: lora            type: lora
      lora_tuning:                 rank: 32
        adapter_dim: 32            alpha: 32                           # NeMo does not scale: alpha = rank
                                   target_modules: query-key-value     # its LoRA sits on the fused q, k and v

The block may stand at the recipe's top or in `model`, as in NeMo's own files. A key that is not given, or null, has the
value of NeMo's configuration file (megatron_gpt_peft_tuning_config.yaml, NeMo 1.22). What has no meaning here is an
error that names ours; the blocks of the schemes that are not selected are named in the recipe's notes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tailor.config import Translated
from tailor.errors import nearest
from tailor.explain import KeyPath, show

Read = Callable[[Any], Any]
"""Makes NeMo's value ours. Raises ValueError saying what is wrong with it."""


def _as_is(value: Any) -> Any:
    return value


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def _one_of(values: Mapping[str | None, Any]) -> Read:
    """One of NeMo's words, each with ours."""

    def read(value: Any) -> Any:
        if not isinstance(value, str | None) or value not in values:
            raise ValueError(f"unknown value {show(value)} ({nearest(str(value), map(_word, values))})")
        return values[value]

    return read


def _only(accepted: Any, instead: str) -> Read:
    """A key that is not honoured: all it may say is what happens anyway."""

    def read(value: Any) -> None:
        if value != accepted:
            raise ValueError(f"{show(value)} is not supported: {instead}")

    return read


def _layers(value: Any) -> list[int]:
    """NeMo counts layers from 1, `target_layers` from 0."""
    counted = isinstance(value, list) and all(type(layer) is int and layer >= 1 for layer in value)
    if not counted or not value:
        raise ValueError(f"wants a list of layers, of which the first is 1, got {show(value)}")
    return [layer - 1 for layer in value]


def _targets(value: Any) -> str:
    """The two of NeMo's target lists that mean the same on every base."""
    found = {"attention_qkv": "query-key-value", "all": "all-linear"}
    names = value if isinstance(value, list) else [value]
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in found:
        instead = "for others, say technique.target_modules with the names that the base has"
        raise ValueError(f"wants [attention_qkv] or [all]; {instead}")
    return found[names[0]]


def _alpha(value: Any) -> Any:
    """A number, or a reference to the rank, as NeMo 2 has it in its file."""
    return None if isinstance(value, str) and re.fullmatch(r"\$\{[\w.]*adapter_dim\}", value) else value


@dataclass(frozen=True)
class Key:
    """A key of NeMo's: our setting ("" where there is none), its value there when not given, and notes on its values.

    `like`: when not given, it is as that other key.
    """

    ours: str = ""
    default: Any = None
    read: Read = _as_is
    notes: Mapping[Any, str] = field(default_factory=dict)
    like: str = ""
    null_is_a_value: bool = False


@dataclass(frozen=True)
class Block:
    """The block of one scheme: the technique that it means, its keys, and settings that NeMo does not leave open."""

    technique: str
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_INITS = _one_of({"xavier": "xavier", "zero": "zero", "normal": "normal"})
_LAYERS = Key("target_layers", read=_layers)
_NO_POSITIONS = Key(read=_only(None, "layers that share an adapter are not told apart (weight_tying alone is)"))

BLOCKS: dict[str, Block] = {
    "adapter_tuning": Block(
        "adapter",
        {
            "type": Key(
                "form",
                "parallel_adapter",
                _one_of({"parallel_adapter": "sequential", "linear_adapter": "sequential"}),
                {
                    "parallel_adapter": "NeMo's parallel_adapter is a sequential adapter, parallel over devices",
                    "linear_adapter": "NeMo's linear_adapter computes what parallel_adapter does: a sequential adapter",
                },
            ),
            "adapter_dim": Key("bottleneck_size", 32),
            "adapter_dropout": Key("dropout", 0.0),
            "norm_position": Key(
                "norm", "pre", _one_of({"pre": "pre", "post": "post", None: "none"}), null_is_a_value=True
            ),
            "norm_type": Key("", None, _one_of({"mixedfusedlayernorm": None, "layernorm": None})),
            "column_init_method": Key("init_down", "xavier", _INITS),
            "row_init_method": Key("init_up", "zero", _INITS),
            "layer_selection": _LAYERS,
            "weight_tying": Key("weight_tying", False),
            "position_embedding_strategy": _NO_POSITIONS,
        },
        fixed={"activation": "silu"},
    ),
    "lora_tuning": Block(
        "lora",
        {
            "adapter_dim": Key("rank", 32),
            "alpha": Key("alpha", None, _alpha, like="adapter_dim"),
            "adapter_dropout": Key("dropout", 0.0),
            "column_init_method": Key("init_a", "xavier", _INITS),
            "row_init_method": Key("init_b", "zero", _INITS),
            "target_modules": Key("target_modules", ["attention_qkv"], _targets),
            "layer_selection": _LAYERS,
            "weight_tying": Key("", None, _only(False, "only an adapter has weight_tying")),
            "position_embedding_strategy": _NO_POSITIONS,
        },
        note="NeMo's LoRA is one pair on the fused q, k, v; where a base has them apart, each gets a pair",
    ),
    "p_tuning": Block(
        "p_tuning",
        {
            "virtual_tokens": Key("num_virtual_tokens", 10),
            "bottleneck_dim": Key("encoder_hidden", 1024),
            "embedding_dim": Key("embedding_size", 1024),
            "init_std": Key("init_std", 0.023),
        },
        fixed={"encoder": "mlp"},
    ),
    "ia3_tuning": Block("ia3", {"layer_selection": _LAYERS}),
}
"""The alias table: the blocks by name, with every key of theirs that is read."""

SCHEMES: dict[str | None, tuple[str, ...]] = {
    "adapter": ("adapter_tuning",),
    "ia3": ("ia3_tuning",),
    "ptuning": ("p_tuning",),
    "lora": ("lora_tuning",),
    "adapter_and_ptuning": ("adapter_tuning", "p_tuning"),
    "none": (),
    None: (),
}
"""NeMo's schemes with the blocks that each reads; with none of them every weight is trained."""

_BESIDE = ("peft_scheme", "restore_from_path")


def translate(data: dict[str, Any], known: Iterable[str]) -> Translated:
    """The recipe with `peft` (or `model.peft`) replaced by `technique`, `start` and `notes`.

    `known` are the settings at the recipe's top, to name them where something else of NeMo's is not read.
    """
    draft = _Draft(dict(data))
    found = draft.take_blocks(known)
    if not found:
        return Translated(data)
    (path, peft), *others = found
    for other, _ in others:
        draft.problem(other, f"there is {'.'.join(path)} already: keep one of them")
    draft.read(peft, path)
    return Translated(draft.data, draft.written, tuple(draft.problems))


class _Draft:
    """A recipe out of which NeMo's keys are taken, ours put in; where those came from, and what is wrong with them."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.written: dict[KeyPath, KeyPath] = {}
        self.problems: list[tuple[KeyPath, str]] = []

    def problem(self, path: KeyPath, message: str) -> None:
        self.problems.append((path, message))

    def note(self, path: KeyPath, message: str) -> None:
        """Into the recipe's notes, unless what stands there is no list, which the schema then says."""
        notes = self.data.get("notes", [])
        if isinstance(notes, list):
            self.data["notes"] = [*notes, f"{'.'.join(path)}: {message}"]

    def take_blocks(self, known: Iterable[str]) -> list[tuple[KeyPath, Any]]:
        """The peft blocks and where they stood. NeMo's `model` goes with its block; nothing else in it is read."""
        found: list[tuple[KeyPath, Any]] = []
        if "peft" in self.data:
            found.append((("peft",), self.data.pop("peft")))
        model = self.data.get("model")
        if isinstance(model, dict) and "peft" in model:
            found.append((("model", "peft"), self.data.pop("model")["peft"]))
            top = tuple(known)
            for key in (key for key in model if key != "peft"):
                why = f"of NeMo's model only peft is read; at the recipe's top: {nearest(key, top)}"
                self.problem(("model", key), f"unknown setting ({why})")
        return found

    def read(self, peft: Any, path: KeyPath) -> None:
        """The block's scheme with its settings, and where training starts."""
        peft = self._mapping(peft, path)
        for key in (key for key in peft if key not in (*_BESIDE, *BLOCKS)):
            self.problem((*path, key), f"unknown setting ({nearest(key, (*_BESIDE, *BLOCKS))})")
        if "technique" in self.data:
            self.problem(path, "technique says what is trained already: keep one (an override ~technique drops it)")
        chosen = self._scheme(peft, path)
        for number, name in enumerate(chosen):
            self._settings(name, peft.get(name), (*path, name), ("technique", str(number)))
        if (start := peft.get("restore_from_path")) is not None:
            if self.data.get("start") is not None:
                self.problem((*path, "restore_from_path"), "start says where training begins already: keep one")
            self.data["start"] = start
            self.written["start",] = (*path, "restore_from_path")
        if unused := [name for name in BLOCKS if name in peft and name not in chosen]:
            self.note(path, f"unused, as peft_scheme is {_word(peft.get('peft_scheme'))}: {', '.join(unused)}")

    def _scheme(self, peft: Mapping[str, Any], path: KeyPath) -> tuple[str, ...]:
        """The blocks that the scheme reads. The techniques that they mean are in the recipe then."""
        self.written["technique",] = here = (*path, "peft_scheme") if "peft_scheme" in peft else path
        said = peft.get("peft_scheme", "")
        if not isinstance(said, str | None) or said not in SCHEMES:
            wrong = f"unknown scheme {show(said)}" if "peft_scheme" in peft else "peft_scheme is required"
            self.problem(here, f"{wrong} ({nearest(str(said), map(_word, SCHEMES))})")
            self.data["technique"] = None  # refused by the schema in the same place, where this is said already
            return ()
        named = [{"type": BLOCKS[name].technique, **BLOCKS[name].fixed} for name in SCHEMES[said]]
        self.data["technique"] = named or [{"type": "full"}]
        return SCHEMES[said]

    def _settings(self, name: str, given: Any, path: KeyPath, ours: KeyPath) -> None:
        """One block's keys as settings of the technique that stands at `ours`."""
        block, given = BLOCKS[name], self._mapping(given, path)
        self.written[ours] = path
        for key in (key for key in given if key not in block.keys):
            called = [theirs for theirs, known in block.keys.items() if known.ours == key]
            told = f"NeMo calls it {called[0]!r}" if called else nearest(key, block.keys)
            self.problem((*path, key), f"unknown setting ({told})")
        settings = self.data["technique"][int(ours[1])]
        for key, known in block.keys.items():
            stated = key in given and (given[key] is not None or known.null_is_a_value)
            value = given[key] if stated else known.default
            try:
                value = known.read(value) if stated or value is not None else None
            except ValueError as error:
                self.problem((*path, key), str(error))
                continue
            source = key
            if value is None and known.like:
                source, value = known.like, settings.get(block.keys[known.like].ours)
            if known.ours and value is not None:
                settings[known.ours] = value
                self.written[(*ours, known.ours)] = (*path, source)
            if stated and isinstance(given[key], str) and given[key] in known.notes:
                self.note((*path, key), known.notes[given[key]])
        if block.note:
            self.note(path, block.note)

    def _mapping(self, value: Any, path: KeyPath) -> Mapping[str, Any]:
        """A block; an empty one where nothing was written, or something else."""
        if value is not None and not isinstance(value, Mapping):
            self.problem(path, f"wants a mapping (key: value), got {show(value)}")
        return value if isinstance(value, Mapping) else {}
