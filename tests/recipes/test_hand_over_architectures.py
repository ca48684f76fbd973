"""Handing over to vLLM what was made on bases of other architectures, and what the stand-in of the tests refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_over_stub import Refused, checked, program, vllm

from tailor.artifacts import artifact as artifacts
from tailor.errors import ConfigError
from tailor.models.base import Base, load_base
from tailor.recipes import hand_over_routes
from tailor.recipes.hand_over import hand_over
from tailor.techniques import Technique
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_home")


def tiny_on_disk(tmp_path: Path, model_type: str, **changes: Any) -> Base:
    """A random two-layer base in a folder, with its tokenizer."""
    folder = tmp_path / f"tiny-{model_type}"
    tiny_model(model_type, num_hidden_layers=2, **changes).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return load_base(folder, "cpu")


def save(base: Base, technique: Technique, name: str = "mine") -> None:
    """Save a technique, moved away from its start, as an artifact."""
    slot = base.host.attach([technique], seed=1)
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    artifacts.save(name, base, slot, [technique], {})


def test_a_lora_is_merged_where_vllm_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tiny_on_disk(tmp_path, "llama"), LoRA(rank=2, alpha=4.0))
    artifact = artifacts.find("mine")
    for model_type, weights in (("llama", "lora"), ("gpt2", "merged"), ("starcoder2", "merged")):
        found = hand_over_routes.route("mine", artifact, model_type)
        assert isinstance(found, hand_over_routes.Route)
        assert found.weights == weights
    monkeypatch.setattr(hand_over_routes, "LORA_TARGETS", hand_over_routes.LORA_TARGETS - {"up_proj"})
    done = hand_over(["mine"], tmp_path / "out")
    (server,) = done.servers
    assert "no LoRA for its targets up_proj" in (done.folder / "README.md").read_text()
    with vllm(done.folder, server) as stub:
        assert checked(done, server, stub.url) == 0


@pytest.mark.parametrize(
    ("model_type", "targets", "weights"),
    [
        ("glm4", "all-linear", "merged"),
        ("glm4", "query-value", "lora"),
        ("phi3", "all-linear", "lora"),
        ("olmo2", "all-linear", "lora"),
        ("gpt2", "all-linear", "merged"),
    ],
)
def test_packed_layers_take_a_lora_only_where_vllm_takes_them_whole(
    model_type: str, targets: Any, weights: str, tmp_path: Path
) -> None:
    base = tiny_on_disk(tmp_path, model_type)
    technique = LoRA(rank=2, alpha=4.0, target_modules=targets)
    save(base, technique)
    done = hand_over(["mine"], tmp_path / "out")
    (server,) = done.servers
    assert server.routes[0].weights == weights
    with vllm(done.folder, server) as stub:
        assert checked(done, server, stub.url) == 0


@pytest.mark.parametrize(
    ("model_type", "changes", "technique", "reason"),
    [
        ("qwen2", {}, LoRA(rank=2, alpha=4.0), "sliding window in some layers only"),
        ("qwen3", {"use_sliding_window": False}, LoRA(rank=2, alpha=4.0), None),
        ("opt", {}, PromptTuning(num_virtual_tokens=2), "embeddings have 24 numbers"),
        ("opt", {}, LoRA(rank=2, alpha=4.0), None),
        ("opt", {"word_embed_proj_dim": 32}, PromptTuning(num_virtual_tokens=2), None),
    ],
)
def test_what_vllm_has_no_place_for_on_a_base_is_refused(
    model_type: str, changes: dict[str, Any], technique: Technique, reason: str | None, tmp_path: Path
) -> None:
    save(tiny_on_disk(tmp_path, model_type, **changes), technique)
    if reason is None:
        assert hand_over(["mine"], tmp_path / "out").refused == ()
        return
    with pytest.raises(ConfigError, match=f"mine: .*{reason}"):
        hand_over(["mine"], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 9}, "rank"),
    ],
)
def test_the_stand_in_refuses_what_vllm_refuses(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save(tiny_on_disk(tmp_path, "llama"), LoRA(rank=2, alpha=4.0))
    done = hand_over(["mine"], tmp_path / "out")
    path = done.folder / "lora" / "mine" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Refused, match=reason), vllm(done.folder, done.servers[0]):
        pass


def test_a_quantised_base_goes_with_the_weights_that_it_computed_with(tmp_path: Path) -> None:
    base = load_base(tiny_on_disk(tmp_path, "llama").folder, "cpu", quantize="nf4")
    techniques = [PromptTuning(num_virtual_tokens=2), LoRA(rank=2, alpha=4.0)]
    for name, technique in zip(("soft", "lora"), techniques, strict=True):
        save(base, technique, name)
    done = hand_over(["soft", "lora"], tmp_path / "out")
    (server,) = done.servers
    assert server.model == "models/tiny-llama-dequantised"
    assert "quantised to nf4" in (done.folder / "README.md").read_text()
    with vllm(done.folder, server) as stub:
        assert checked(done, server, stub.url) == 0


def test_a_base_without_a_chat_template_is_asked_in_plain_text(tmp_path: Path) -> None:
    folder = tmp_path / "plain-llama"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer(False).hf.save_pretrained(folder)
    base = load_base(folder, "cpu")
    prompting = Prompting(system="Be quick.", shots=0)
    save(base, prompting, "prompt")
    done = hand_over(["prompt"], tmp_path / "out")
    with vllm(done.folder, done.servers[0]) as stub:
        assert checked(done, done.servers[0], stub.url) == 0
        assert program(done, "ask").main(["prompt", "hello", "--url", stub.url, "--max-tokens", "2"]) == 0
    assert stub.bodies[-1]["prompt"] == "Be quick.\n\nhello"
