"""Loading: what is fetched from the hub and when, what does not fit, and experts in float64."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from tailor.data.packing import Segment
from tailor.errors import ConfigError, NotFoundError, ResourceError
from tailor.models.base import count_parameters, load_base, wrap_model
from tailor.models.files import resolve
from tailor.models.plan import Plan
from tailor.recipes.base_facts import base_facts
from tiny_models import tiny_model, tiny_tokenizer


class Hub:
    """A hub with one model; `fetched` are the names of the files that went over the wire, call by call."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.fetched: list[set[str]] = []

    def snapshot_download(self, repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = {path.name for path in self.model.iterdir() if any(fnmatch(path.name, p) for p in allow_patterns)}
        new = {name for name in names if not (self.cache / name).exists()}
        for name in new:
            shutil.copy(self.model / name, self.cache / name)
        self.fetched.append(new)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().hf.save_pretrained(tmp_path / "model")
    (tmp_path / "cache").mkdir()
    made = Hub(tmp_path / "model", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def test_the_facts_of_a_hub_base_need_no_weights(hub: Hub) -> None:
    facts = base_facts("someone/tiny")
    assert (facts.max_seq_len, facts.end_of_turn) == (256, "<|end|>")
    assert facts.num_parameters == sum(p.numel() for p in tiny_model().parameters())
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= hub.fetched[0]
    assert not any(name.endswith(".safetensors") for fetched in hub.fetched for name in fetched)


def test_weights_are_fetched_after_the_configuration(hub: Hub) -> None:
    base = load_base("someone/tiny", "cpu")
    assert base.folder == hub.cache
    assert hub.fetched[1] == {"model.safetensors"}


@pytest.mark.parametrize("model_type", ["bloom", "nothing-known"])
def test_a_refused_architecture_costs_no_download_of_weights(hub: Hub, model_type: str) -> None:
    config = json.loads((hub.model / "config.json").read_text())
    (hub.model / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ConfigError, match=model_type):
        load_base("someone/tiny", "cpu")
    assert len(hub.fetched) == 1


def test_a_wrong_device_or_dtype_costs_no_download(hub: Hub) -> None:
    for wrong in ({"device": "tpu"}, {"dtype": "int3"}):
        with pytest.raises(ConfigError):
            load_base("someone/tiny", **wrong)
    assert hub.fetched == []


def test_weights_that_are_not_here_when_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors"):
        resolve("someone/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve("someone/tiny")


def test_what_cannot_be_a_hub_id_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path))
    with pytest.raises(NotFoundError, match="'my models/x y' is neither a folder nor can it be a hub id"):
        resolve("my models/x y")


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_base_that_does_not_fit(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(
        ResourceError, match=r"tailor-nano does not fit on cpu: its weights take 0\.\d+ GiB in"
    ) as caught:
        load_base("tailor-nano", "cpu", "float32")
    assert caught.value.hint == "set dtype: bfloat16, or choose a smaller base"
    with pytest.raises(ResourceError, match="bfloat16") as caught:
        load_base("tailor-nano", "cpu", "bfloat16")
    assert caught.value.hint == "choose a smaller base"


def test_other_errors_of_loading_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_base("tailor-nano", "cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_without_weights(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_run_in_float64(model_type: str) -> None:
    model = tiny_model(model_type).to(torch.float64)
    base = wrap_model(model, tiny_tokenizer(), torch.device("cpu"))
    ids = list(range(5, 15))
    with torch.no_grad(), base.host.run(plan := Plan.of([Segment(0, len(ids))])):
        hidden = base.hidden(plan, torch.tensor(ids), torch.arange(len(ids)))
    assert hidden.dtype == torch.float64
