"""Verify: token logprobs of held-out rows at every hop from the trainer to whatever is served."""

from __future__ import annotations

import importlib.util
import random
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tailor.artifacts.artifact import Artifact, attach, find, write_merged
from tailor.artifacts.files import ADAPTER_CONFIG, write_model
from tailor.data.dataset import DataSettings, ReadSettings, load_dataset, read
from tailor.data.examples import Example, Rendering, make_examples
from tailor.data.records import Record
from tailor.errors import ConfigError, ConflictError, NotFoundError
from tailor.evaluation.likelihood import packed_logprobs
from tailor.evaluation.parity import Parity, Scorer, stock_logprobs
from tailor.evaluation.parity import verify as compare_hops
from tailor.inference.load import Customized, load_local
from tailor.models.base import Base, dtype_name, load_base
from tailor.models.slots import Slot
from tailor.runs import home
from tailor.techniques.soft_prompt import templates_of

NUM_ROWS = 8
MAX_CANDIDATES = 1000
"""Held-out rows that are rendered to draw the compared ones from."""
GIVE_ROWS = "give rows it has not seen with --data FILE"


def verify(
    name: str | Path,
    *,
    data: str | None = None,
    base: str | Base | None = None,
    num_rows: int = NUM_ROWS,
    task: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Parity:
    """Compare every hop of an artifact on the rows of `data`, or on the rows its run held out.

    Of a prompt table it is one task, which must be named when there are several. Raises NotFoundError, DataError, and
    ConflictError when the rows are gone or have changed.
    """
    artifact = find(name).of_task(task)
    customized = load_local(name, base, task=artifact.task, device=device, dtype=dtype)
    records = rows_for(artifact, data)
    rendering = rendering_for(data_settings(artifact), customized.base, customized.slot)
    return verify_artifact(artifact, customized.base, customized.slot, rendering, records, num_rows=num_rows)


def verify_artifact(
    artifact: Artifact,
    base: Base,
    slot: Slot | None,
    rendering: Rendering,
    records: Sequence[Record],
    *,
    copies: bool = True,
    num_rows: int = NUM_ROWS,
) -> Parity:
    """The hops of an artifact against the slot it was saved from (or reloaded into).

    Without `copies` no second model is loaded: the artifact is reloaded beside the slot on the same base, and merged
    weights and PEFT export are left to `tailor verify`, which has the memory to itself.
    """
    hops: dict[str, Scorer] = {"reloaded artifact": partial(_reloaded, artifact, base, copies)}
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".verify-") as folder:  # a merged model may be too big for /tmp
        if slot is not None and not slot.owns_base and copies:
            if all(technique.traits.merges for technique in artifact.techniques):
                hops["merged weights"] = partial(_merged, artifact, base, slot, Path(folder) / "merged")
            if _has_peft(artifact):
                hops["PEFT export"] = partial(_peft, base, artifact.folder)
        elif slot is not None and slot.owns_base and not copies:
            hops = {}
        return compare_hops(base, slot, _examples(rendering, records), hops=hops, num_rows=num_rows)


def verify_folder(
    customized: Customized, folder: Path, format: Literal["hf", "peft"], records: Sequence[Record]
) -> Parity:
    """An exported folder, loaded as anybody would, against the artifact it was made from."""
    base, slot = customized.base, customized.slot
    assert customized.artifact is not None
    rendering = rendering_for(data_settings(customized.artifact), base, slot)
    if format == "hf":
        hops: dict[str, Scorer] = {"merged weights": partial(_stock, folder, base)}
    elif importlib.util.find_spec("peft") is not None:
        hops = {"PEFT export": partial(_peft, base, folder)}
    else:
        hops = {"PEFT export (read back by tailor; peft is not installed)": partial(_read_back, base, find(folder))}
    return compare_hops(base, slot, _examples(rendering, records), hops=hops, num_rows=NUM_ROWS)


def rows_for(artifact: Artifact, data: str | None = None) -> Sequence[Record]:
    """The rows of `data`, or those that the artifact's run held out.

    Raises ConflictError when the run's file is gone or has changed (a new split could hand out trained rows).
    """
    if data is not None:
        return read(data, ReadSettings(), templates=templates_of(artifact.techniques)).records
    settings = data_settings(artifact)
    if settings is None:
        raise ConflictError(f"{artifact.name} does not say which rows were held out", hint="give some with --data FILE")
    try:
        seed = artifact.manifest["recipe"]["train"]["seed"]
        dataset = load_dataset(settings, seed, templates=templates_of(artifact.techniques))
    except NotFoundError as error:
        raise ConflictError(
            f"the rows that {artifact.name} was tuned on are gone: {error.message}", hint=GIVE_ROWS
        ) from error
    if dataset.content_hash != artifact.manifest["data"]["content_hash"]:
        raise ConflictError(f"the rows that {artifact.name} was tuned on have changed since", hint=GIVE_ROWS)
    return dataset.validation


def data_settings(artifact: Artifact) -> DataSettings | None:
    """The `data` block of the run that made the artifact; None for an adapter from elsewhere."""
    recipe: Mapping[str, Any] | None = artifact.manifest.get("recipe")
    return None if recipe is None else DataSettings(**recipe["data"])


def rendering_for(settings: DataSettings | None, base: Base, slot: Slot | None) -> Rendering:
    """How a run with these settings renders its rows for a slot.

    Raises ConfigError when `max_seq_len` is beyond the base's context.
    """
    wanted = settings.max_seq_len if settings is not None else None
    if wanted is not None and wanted > base.max_seq_len:
        raise ConfigError(f"data.max_seq_len {wanted} is beyond the base's context of {base.max_seq_len}")
    prompted_only = slot is not None and slot.compose is not None and not slot.parameters
    return base.rendering(
        slot,
        max_seq_len=wanted,
        trained_turns="last" if prompted_only or settings is None else settings.trained_turns,
        truncation=settings.truncation if settings is not None else "drop",
        training=True,
    )


def _examples(rendering: Rendering, records: Sequence[Record]) -> list[Example]:
    if rendering.compose is not None:  # shots are turns too: only the answer to the last question is compared
        rendering = replace(rendering, trained_turns="last")
    if len(records) > MAX_CANDIDATES:
        places = sorted(random.Random(0).sample(range(len(records)), MAX_CANDIDATES))
        records = [records[k] for k in places]
    return make_examples(records, rendering)[0]


def _has_peft(artifact: Artifact) -> bool:
    return (artifact.folder / ADAPTER_CONFIG).is_file() and importlib.util.find_spec("peft") is not None


def _reloaded(artifact: Artifact, base: Base, copies: bool, examples: Sequence[Example]) -> Any:
    """A fresh base from disk with the saved artifact attached."""
    if not copies:
        return _read_back(base, artifact, examples)
    fresh = load_base(artifact.base_name, str(base.device), dtype_name(base.dtype), base.quantize)
    return packed_logprobs(fresh, None if artifact.is_base else attach(fresh, artifact), examples)


def _read_back(base: Base, artifact: Artifact, examples: Sequence[Example]) -> Any:
    slot = attach(base, artifact)
    try:
        return packed_logprobs(base, slot, examples)
    finally:
        base.host.detach(slot)


def _merged(artifact: Artifact, base: Base, slot: Slot, folder: Path, examples: Sequence[Example]) -> Any:
    folder.mkdir()
    write_merged(base, slot, artifact.techniques, folder)
    return _stock(folder, base, examples)


def _stock(folder: Path, base: Base, examples: Sequence[Example]) -> Any:
    """By transformers alone, with its own attention."""
    return stock_logprobs(_stock_model(folder, base), examples)


def _peft(base: Base, folder: Path, examples: Sequence[Example]) -> Any:
    """By transformers and PEFT alone. PEFT puts virtual tokens in front itself, so they are cut from the rows."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft calls what transformers has renamed
        model = PeftModel.from_pretrained(_stock_base(base), str(folder)).eval()
    config = model.active_peft_config
    if not getattr(config, "num_virtual_tokens", 0) or config.peft_type == "PREFIX_TUNING":
        return stock_logprobs(model, examples)
    table = model.get_prompt(batch_size=1)[0]
    return stock_logprobs(model.get_base_model(), examples, virtual=table)


def _stock_base(base: Base) -> Any:
    """The base by transformers alone; a quantised one with the weights that it computes with."""
    if base.quantize is None:
        return _stock_model(base.folder, base)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".verify-") as folder:
        write_model(Path(folder), base, {})
        return _stock_model(Path(folder), base)


def _stock_model(folder: Path, base: Base) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=base.dtype, attn_implementation="eager", use_safetensors=True, local_files_only=True
    )
    return model.to(base.device).eval()
