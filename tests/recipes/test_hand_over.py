"""Handing over to vLLM: what goes which way, what is written, and that its check passes and fails when it should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_over_stub import checked, program, vllm
from safetensors.torch import load_file, save_file

from tailor.artifacts import artifact as artifacts
from tailor.cli.main import run
from tailor.errors import ConfigError, ConflictError
from tailor.models.base import Base, load_base
from tailor.recipes.hand_over import HandOver, hand_over
from tailor.recipes.hand_over_routes import max_lora_rank
from tailor.techniques import Technique
from tailor.techniques.adapter import Adapter
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.techniques.new_tokens import NewTokens
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting, Shot
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_home")

SHOTS = (Shot(prompt="fox", completion="dog"), Shot(prompt="you", completion="are"))
PATTERNS = LoRA(rank=2, alpha=3.0, rank_pattern={"down_proj": 4}, alpha_pattern={"q_proj": 9.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder, "cpu")


@pytest.fixture
def save(base: Base) -> Callable[..., str]:
    """Saves techniques, moved away from their start, as an artifact."""

    def make(name: str, *techniques: Technique, facts: Mapping[str, Any] | None = None, add: bool = False) -> str:
        slot = base.host.attach(techniques, seed=1)
        with torch.no_grad():
            for parameter in slot.parameters.values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        slot.bake()
        artifacts.save(name, base, slot, techniques, facts or {}, add=add)
        base.host.detach(slot)
        return name

    return make


def commands(done: HandOver, tmp_path: Path, name: Sequence[str]) -> list[str]:
    """The words that serve.sh gives to vllm."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    fake = tmp_path / "bin" / "vllm"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    fake.chmod(0o755)
    found = subprocess.run(
        [str(done.folder / "serve.sh"), *name],
        env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.splitlines()


def test_everything_that_vllm_can_run_answers_there_as_here(
    save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("plain", LoRA(rank=3, alpha=4.0))
    save("patterns", PATTERNS)
    save("stable", LoRA(rank=4, alpha=4.0, rslora=True, target_modules="query-value"))
    save("singular", LoRA(rank=2, alpha=4.0, init="pissa"))
    save("dora", LoRA(rank=2, alpha=4.0, dora=True))
    save("scales", IA3())
    save("soft", PromptTuning(num_virtual_tokens=3))
    save("encoded", PTuning(num_virtual_tokens=4, encoder_hidden=12))
    save("both", LoRA(rank=2, alpha=4.0), PromptTuning(num_virtual_tokens=2))
    save("prompt", Prompting(system="Be quick.", template="Q: {prompt}", shots=1, selection="fixed", examples=SHOTS))
    names = ["plain", "patterns", "stable", "singular", "dora", "scales", "soft", "encoded", "both", "prompt"]
    done = hand_over(names, tmp_path / "out")
    shared, *alone = done.servers
    assert shared.name == "tiny-llama"
    assert [route.name for route in shared.routes] == [*names[:4], "soft", "encoded", "prompt"]
    assert [(server.name, server.port) for server in alone] == [("dora", 8001), ("scales", 8002), ("both", 8003)]
    for server in done.servers:
        with vllm(done.folder, server) as stub:
            assert checked(done, server, stub.url) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    assert told.count("ok  ") == len(names)
    assert "FAIL" not in told
    assert "--enable-prompt-embeds" in alone[2].options()
    assert "--enable-prompt-embeds" not in alone[0].options()


def test_the_command_line_is_the_one_that_is_meant(save: Callable[..., str], tmp_path: Path, folder: Path) -> None:
    save("a", LoRA(rank=8, alpha=4.0))
    save("b", LoRA(rank=9, alpha=4.0))
    done = hand_over(["a", "b"], tmp_path / "o ut")
    words = commands(done, tmp_path, ["tiny-llama", "--gpu-memory-utilization", "0.5"])
    assert words[:3] == ["serve", str(folder), "--served-model-name"]
    assert words[-2:] == ["--gpu-memory-utilization", "0.5"]
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--lora-modules") + 1 :][:2] == ["a=lora/a", "b=lora/b"]
    assert words[words.index("--dtype") + 1] == "bfloat16"  # the LoRA kernels take no float32
    assert commands(done, tmp_path, []) == words[:-2]  # one server: its name may be left out
    assert "served in bfloat16" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_smallest_rank_that_vllm_allows_is_asked_for(rank: int, allowed: int) -> None:
    assert max_lora_rank([1, rank]) == allowed


def test_larger_ranks_than_vllm_takes_are_merged(save: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank 513 is above"):
        max_lora_rank([513])
    save("wide", LoRA(rank=513, alpha=4.0, target_modules=("q_proj",), target_layers=(0,)))
    (server,) = hand_over(["wide"], tmp_path / "out").servers
    assert server.routes[0].weights == "merged"
    assert "rank 513" in (tmp_path / "out" / "README.md").read_text()


def test_the_check_holds_against_our_own_server_too(save: Callable[..., str], tmp_path: Path, folder: Path) -> None:
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module)
    from tailor.inference.library import Library
    from tailor.inference.service import Service
    from tailor.server.app import create_app
    from tailor.server.running import Server as OwnServer
    from tailor.server.settings import ServerSettings

    save("mine", LoRA(rank=2, alpha=4.0))
    done = hand_over(["mine"], tmp_path / "out")
    path = done.folder / "expected.json"
    expected = json.loads(path.read_text())
    expected["servers"][0]["base"] = str(folder)  # how our server calls this base
    path.write_text(json.dumps(expected))
    settings = ServerSettings(port=0, grace=0.2)
    service = Service(Library([load_base(folder, "cpu")], names=["mine"]))
    server = OwnServer(create_app(service, settings), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    url = f"http://127.0.0.1:{server.bound_port}/v1"
    try:
        # a process of its own: the server's thread and pytest's capture do not go together
        command = [sys.executable, str(done.folder / "check.py"), "--server", done.servers[0].name, "--url", url]
        good = subprocess.run([*command, "--tolerance", "0.001"], capture_output=True, text=True, check=False)
        assert good.returncode == 0, good.stdout + good.stderr
        expected["servers"][0]["models"][0]["model"] = str(folder)
        path.write_text(json.dumps(expected))
        bad = subprocess.run(command, capture_output=True, text=True, check=False)
        assert bad.returncode == 1
        assert "answers as the base does" in bad.stdout
    finally:
        server.should_exit = True
        thread.join(20)


def test_an_adapter_that_fits_no_module_is_noticed(
    save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("mine", LoRA(rank=2, alpha=4.0))
    done = hand_over(["mine"], tmp_path / "out")
    path = done.folder / "lora" / "mine" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("model.layers", "layers"): tensor for name, tensor in tensors.items()}, path)
    with vllm(done.folder, done.servers[0]) as stub:
        assert checked(done, done.servers[0], stub.url) == 1
    assert "answers as the base does" in capsys.readouterr().out


def test_another_adapter_and_another_template_are_noticed(
    save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("mine", LoRA(rank=2, alpha=4.0))
    done = hand_over(["mine"], tmp_path / "out")
    path = done.folder / "lora" / "mine" / "adapter_model.safetensors"
    kept = load_file(path)
    (server,) = done.servers
    save_file({name: -tensor if "lora_A" in name else tensor for name, tensor in kept.items()}, path)
    with vllm(done.folder, server) as stub:
        assert checked(done, server, stub.url) == 1
    told = capsys.readouterr().out
    assert "tolerance 0.1" in told
    assert "as the base" not in told
    save_file(kept, path)
    with vllm(done.folder, server) as stub:
        stub.tokenizer.chat_template = stub.tokenizer.chat_template.replace("<|user|>", "<|system|>") + "!"
        assert checked(done, server, stub.url) == 1
        assert "chat template makes other tokens" in capsys.readouterr().out
        stub.models.pop("mine")
        assert checked(done, server, stub.url) == 1
        assert "does not list it" in capsys.readouterr().out
    assert checked(done, server, stub.url) == 2  # it is gone


def test_a_server_of_openais_fields_alone_can_be_checked(save: Callable[..., str], tmp_path: Path) -> None:
    save("mine", LoRA(rank=2, alpha=4.0))
    done = hand_over(["mine"], tmp_path / "out")
    with vllm(done.folder, done.servers[0]) as stub:
        stub.openai_only = True
        assert checked(done, done.servers[0], stub.url) == 0


TEMPLATE = "<|VIRTUAL_PROMPT_0|> say {prompt}"


@pytest.mark.parametrize(
    ("technique", "reason"),
    [
        (PrefixTuning(num_virtual_tokens=2), "no place for"),
        (Adapter(bottleneck_size=3), "no place for"),
        (NewTokens(tokens=("fox",)), "no place for"),
        (PromptTuning(num_virtual_tokens=2, template=TEMPLATE), "markers of a template"),
        (Prompting(shots=1, selection="nearest", examples=SHOTS), "for every prompt anew"),
        (Prompting(system="Be quick.", shots=0, votes=3), "3 answers are voted on"),
    ],
)
def test_the_rest_is_refused_by_name(
    technique: Technique, reason: str, save: Callable[..., str], tmp_path: Path
) -> None:
    save("odd-one", technique)
    with pytest.raises(ConfigError, match=f"odd-one: .*{reason}") as caught:
        hand_over(["odd-one"], tmp_path / "out")
    assert technique.type in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_names_what_can_go_goes_and_the_rest_is_told(save: Callable[..., str], tmp_path: Path) -> None:
    save("odd-one", PrefixTuning(num_virtual_tokens=2))
    save("mine", LoRA(rank=2, alpha=4.0))
    done = hand_over([], tmp_path / "out")
    assert [route.name for route in done.servers[0].routes] == ["mine"]
    assert [one.name for one in done.refused] == ["odd-one"]
    assert "- odd-one: prefix_tuning" in (done.folder / "README.md").read_text()


def test_every_task_of_a_prompt_table_has_a_name_of_its_own(save: Callable[..., str], tmp_path: Path) -> None:
    save("table", PromptTuning(num_virtual_tokens=2, task="one"))
    save("table", PromptTuning(num_virtual_tokens=3, task="two more"), add=True)
    done = hand_over(["table"], tmp_path / "out")
    assert [route.name for route in done.servers[0].routes] == ["table.one", "table.two-more"]
    with vllm(done.folder, done.servers[0]) as stub:
        assert checked(done, done.servers[0], stub.url) == 0


def test_a_model_of_its_own_goes_as_it_is(base: Base, save: Callable[..., str], tmp_path: Path, folder: Path) -> None:
    own = artifacts.home() / "artifacts" / "own"
    shutil.copytree(folder, own)
    artifacts.write_manifest(own, {"name": "own", "techniques": [{"type": "full"}], "base": {"name": str(folder)}})
    save("own-lora", LoRA(rank=2, alpha=4.0))
    done = hand_over(["own", "own-lora"], tmp_path / "out")
    assert {server.name: server.model for server in done.servers} == {"own": "models/own", "tiny-llama": str(folder)}
    assert not (done.folder / "models" / "own" / "tailor.json").exists()
    server = next(server for server in done.servers if not server.shared)
    with vllm(done.folder, server) as stub:
        assert checked(done, server, stub.url) == 0


@pytest.mark.parametrize(
    "prompting",
    [
        Prompting(system="Be quick.", template="Q: {prompt}", shots=1, selection="fixed", examples=SHOTS),
        Prompting(shots=1, reasoning=True, examples=(Shot(prompt="fox", completion="dog", reasoning="A fox."), *SHOTS)),
        Prompting(system="Only this.", shots=0),
    ],
)
@pytest.mark.parametrize(("question", "own"), [("fox", None), ("hello", "And kindly.")])
def test_ask_makes_the_messages_that_tailor_makes(
    prompting: Prompting, question: str, own: str | None, save: Callable[..., str], tmp_path: Path
) -> None:
    from tailor.text.messages import system, user

    save("prompt", prompting)
    done = hand_over(["prompt"], tmp_path / "out")
    settings = json.loads((done.folder / "models.json").read_text())["prompt"]
    found = program(done, "ask").composed(settings["prompting"], question, own)
    asked = (*([system(own)] if own else []), user(question))
    assert found == [turn.to_dict() for turn in prompting.compose(asked)]


def test_ask_gets_the_answers_that_tailor_gives(
    save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tailor.inference.load import load

    save("soft", PromptTuning(num_virtual_tokens=3))
    save("lora", LoRA(rank=2, alpha=4.0))
    save("prompt", Prompting(system="Be quick.", shots=1, selection="fixed", examples=SHOTS))
    done = hand_over(["soft", "lora", "prompt"], tmp_path / "out")
    with vllm(done.folder, done.servers[0]) as stub:
        for name in ("soft", "lora", "prompt"):
            assert program(done, "ask").main([name, "how are you", "--url", stub.url, "--max-tokens", "8"]) == 0
            said = capsys.readouterr().out.removesuffix("\n")
            answer = load(name).complete(["how are you"], max_new_tokens=8)[0]
            assert said == stub.tokenizer.decode(list(answer.token_ids))
    soft = stub.bodies[1]
    assert soft["model"] == "tiny-llama"
    assert "prompt" not in soft


def test_two_things_of_one_name_are_refused(save: Callable[..., str], tmp_path: Path) -> None:
    save("tiny-llama", LoRA(rank=2, alpha=4.0))
    with pytest.raises(ConflictError, match="two models would be called 'tiny-llama'"):
        hand_over(["tiny-llama"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_folder_and_replaces_only_its_own(
    save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("mine", LoRA(rank=2, alpha=4.0))
    out = tmp_path / "out"
    command = ["serve", "mine", "--engine", "vllm", "--output", str(out)]
    assert run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["servers"][0]["models"] == [{"name": "mine", "served": "a LoRA"}]
    assert told["servers"][0]["command"][:2] == ["vllm", "serve"]
    assert run(command) == 8
    assert run([*command, "--force"]) == 0
    assert "check.py" in capsys.readouterr().out
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    assert run([*command[:-1], str(tmp_path / "thesis"), "--force"]) == 8
    assert "is no hand-over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine", "vllm"], "name it with --output"),
        (["--output", "out"], "--output is for --engine vllm"),
        (["--engine", "vllm", "--output", "out", "--max-sequences", "3"], "--max-sequences is for tailor's own engine"),
        (["--engine", "vllm", "--output", "out", "-b", "x", "-b", "y"], "takes one --base"),
    ],
)
def test_options_of_the_other_engine_are_usage_errors(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "logprobs", "away"),
    [
        ((5, 6, 7), (-0.1, -0.4, -0.3), 0.2 / 3),
        ((5, 8, 9), (-0.1, -0.8, -0.9), (0.0 + 0.1) / 2),  # a near-tie the other way: the next one's logprob is -0.7
        ((5, 8, 9), (-0.1, -1.7, -0.9), (0.0 + 1.0) / 2),  # another token than the next one
        ((8, 6, 7), (-0.1, -0.2, -0.3), float("inf")),
    ],
)
def test_the_distance_counts_near_ties_too(
    tokens: Sequence[int], logprobs: Sequence[float], away: float, save: Callable[..., str], tmp_path: Path
) -> None:
    save("mine", LoRA(rank=2, alpha=4.0))
    check = program(hand_over(["mine"], tmp_path / "out"), "check")
    expected = {"token_ids": [5, 6, 7], "logprobs": [-0.1, -0.6, -0.3], "gaps": [4.0, 0.1, 4.0]}
    found = {"tokens": [f"token_id:{token}" for token in tokens], "logprobs": list(logprobs)}
    assert check.difference(found, expected, tie=0.3) == pytest.approx(away)
