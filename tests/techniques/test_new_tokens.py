"""New tokens against transformers alone: an embedding that was resized, with the same rows put into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import technique_cases as cases
from tailor.data.examples import Example
from tailor.data.packing import Placed, pack
from tailor.data.records import PromptCompletion
from tailor.errors import ConfigError
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.load import load
from tailor.inference.local import LocalBackend
from tailor.models.base import Base
from tailor.models.loss_head import Head, token_logprobs
from tailor.models.slots import Slot
from tailor.techniques.lora import LoRA
from tailor.techniques.new_tokens import EMBEDDING, HEAD, NewTokens
from tailor.text.messages import Message, user
from tiny_models import ARCHITECTURES, tiny_base, tiny_model

# ids 307 on; the tiny models' embeddings have 320 rows, so some stand in place of padding rows and some come after
MANY = tuple(f"<w{k}>" for k in range(18))
TEXT = "the <w1> fox <w17> jumps<w12>"


def attached(base: Base, tokens: tuple[str, ...] = MANY, **settings: Any) -> Slot:
    slot = base.host.attach([NewTokens(tokens=tokens, **settings)], seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return slot


def resized(model_type: str, slot: Slot) -> Any:
    """The stock model with its embedding resized by transformers and the slot's rows written into it."""
    assert slot.new_rows is not None
    model = tiny_model(model_type)
    model.resize_token_embeddings(max(slot.new_rows.end, model.config.vocab_size), mean_resizing=False)
    rows = slice(slot.new_rows.first, slot.new_rows.end)
    with torch.no_grad():
        model.get_input_embeddings().weight[rows] = slot.new_rows.embedding
        head = model.get_output_embeddings()
        head.weight[rows] = slot.new_rows.head
        if getattr(head, "bias", None) is not None:
            head.bias[rows] = 0
    return model


def ids_of(base: Base, slot: Slot, text: str = TEXT) -> list[int]:
    return base.rendering(slot).prompt([user(text)])


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [MANY, MANY[:4]])
def test_logits_are_those_of_a_resized_model(model_type: str, tokens: tuple[str, ...]) -> None:
    base = tiny_base(model_type)
    slot = attached(base, tokens)
    ids = ids_of(base, slot, TEXT if tokens is MANY else "the <w1> fox<w3>")
    assert slot.new_rows is not None
    assert sum(i >= slot.new_rows.first for i in ids) == (3 if tokens is MANY else 2)
    with torch.no_grad():
        expected = resized(model_type, slot)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(base.logits(ids, slot.number), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "granite", "opt"])
def test_gradients_are_those_of_a_resized_model(model_type: str) -> None:
    """Tied (Gemma, Granite, OPT) and untied, with soft-capping, scaled embeddings and scaled logits."""
    base = tiny_base(model_type)
    slot = attached(base)
    model = resized(model_type, slot)
    ids = torch.tensor(ids_of(base, slot))
    logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(dim=1)
    loss = -logprobs.gather(1, ids[1:, None]).sum()
    loss.backward()
    example = Example(ids.tolist(), [0] + [1] * (len(ids) - 1))
    batch = pack([Placed(example, slot.number)], 1000)[0]
    plan = cases.Plan.of_batch(batch)
    with base.host.run(plan):
        own = -base.batch_logprobs(batch, plan).sum()
        own.backward()
    torch.testing.assert_close(own, loss, atol=1e-4, rtol=0)
    assert slot.new_rows is not None
    rows = slice(slot.new_rows.first, slot.new_rows.end)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert set(slot.parameters) == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    for name, parameter in slot.parameters.items():
        module = model.get_input_embeddings() if name == EMBEDDING else model.get_output_embeddings()
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, module.weight.grad[rows], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("first", "chunk"), [(10, 3), (7, 4), (10, 100)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_head_in_chunks(first: int, chunk: int, softcap: float | None) -> None:
    """Columns after the base's and in place of some, against the plain formula; the base's weights may train too."""
    hidden, weight, new = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((9, 6), (10, 6), (4, 6)))
    bias = torch.randn(10, dtype=torch.float64)
    targets = torch.tensor([0, first, first + 3, 1, 5, first + 1, 2, 3, first])
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = torch.cat([z[:, :first], hidden @ new.t(), z[:, first + 4 :]], dim=1) * 0.5
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    factors = torch.randn(9, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * factors).sum(), (hidden, weight, new), retain_graph=True)
    head = Head(weight, bias, 0.5, softcap, new, first)
    found = token_logprobs(hidden, head, targets, chunk)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * factors).sum(), (hidden, weight, new)), wanted)


def test_the_base_is_never_resized() -> None:
    base = tiny_base("llama")
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    ids = base.renderer.prompt([user(TEXT)])
    logits = base.logits(ids)
    slot = attached(base)
    other = base.host.attach([LoRA(rank=2)])
    assert base.renderer.prompt([user(TEXT)]) == ids == base.rendering(other).prompt([user(TEXT)])
    assert torch.equal(base.logits(ids), logits)
    assert base.logits(ids, other.number).shape[1] == 320
    assert base.logits(ids, slot.number).shape[1] == 325
    assert base.tokenizer.vocab_size == 307
    base.host.detach(slot)
    assert all(torch.equal(p, before[name.replace(".base.", ".")]) for name, p in base.model.named_parameters())


# ------------------------------------------------------------------------------------------------ the words


def test_a_word_is_one_token_and_comes_back() -> None:
    base = tiny_base()
    slot = attached(base, ("<sku>", "order-id"))
    renderer = base.rendering(slot).renderer
    assert renderer.tokenizer.encode("<sku>") == [307]
    assert renderer.tokenizer.encode("order-id") == [308]
    for text in ("<sku>", "my <sku> fox", "a<sku><sku>order-id.", " <sku> "):
        rendered = renderer.example([user("hello"), Message("assistant", text)])
        completion = [i for i, mask in zip(rendered.token_ids, rendered.loss_mask, strict=True) if mask]
        assert renderer.parse(completion).content == text
        assert {307, 308} & set(completion)
    assert renderer.stop == base.renderer.stop


def test_generation_says_new_words_and_mixes() -> None:
    """Rows pushed towards the states they follow are generated; the plain base beside them never says them."""
    base = tiny_base()
    slot = base.host.attach([NewTokens(tokens=("<sku>",))])
    request = Request((user("the fox"),), "x", SamplingParams(max_new_tokens=3))
    plain = LocalBackend(base).generate([Request((user("the fox"),), None, request.sampling)])[0]
    ids = torch.tensor(ids_of(base, slot, "the fox"))
    plan = cases.Plan.of([cases.pack([Placed(Example(ids.tolist(), [1] * len(ids)), slot.number)], 99)[0].segments[0]])
    with torch.no_grad(), base.host.run(plan):
        state = base.hidden(plan, ids, torch.arange(len(ids)))[-1]
        slot.parameters[HEAD].copy_(10 * state[None])
    backend = LocalBackend(base, {"x": slot})
    for sampling in (request.sampling, SamplingParams(max_new_tokens=3, temperature=0.5, seed=1)):
        asked = [Request(request.messages, name, sampling) for name in (None, "x", None)]
        first, own, last = backend.generate(asked)
        assert own.token_ids[0] == 307
        assert own.text.startswith("<sku>")
        assert all(i < 320 for answer in (first, last) for i in answer.token_ids)
    assert backend.generate([Request(request.messages, None, request.sampling), request])[0].text == plain.text
    (scored,) = backend.logprobs([request], ["<sku>"])
    torch.testing.assert_close(scored[0], torch.tensor(backend.generate([request])[0].logprobs[0]), atol=1e-5, rtol=0)


def test_a_nan_stays_in_its_slot() -> None:
    base = tiny_base()
    healthy, sick = attached(base, ("fox",)), attached(base, ("dog",))
    with torch.no_grad():
        for parameter in sick.parameters.values():
            parameter.fill_(float("nan"))
    record = PromptCompletion(prompt="the fox", completion="dog and fox")
    placed = []
    for slot in (None, healthy, sick):
        example = base.rendering(slot).example(record)
        assert example is not None
        placed.append(Placed(example, slot.number if slot else 0))
    plain, own, broken = base.score_by_segment(pack(placed, 1000)[0])
    assert plain.isfinite().all()
    assert own.isfinite().all()
    assert broken.isnan().all()


# ------------------------------------------------------------------------------------------------ the start


def test_starts() -> None:
    base = tiny_base("llama")
    embedding, head = base.host.word_weights()
    pieces, about = base.tokenizer.encode("<sku>"), base.tokenizer.encode("hello there")
    assert len(pieces) > 1
    slot = base.host.attach([NewTokens(tokens=("<sku>", "<hi>"), descriptions={"<hi>": "hello there"})])
    for name, weight in ((EMBEDDING, embedding), (HEAD, head)):
        expected = torch.stack([weight[pieces].mean(dim=0), weight[about].mean(dim=0)])
        torch.testing.assert_close(slot.parameters[name].detach(), expected)
    mean = base.host.attach([NewTokens(tokens=("<sku>",), init="mean")])
    torch.testing.assert_close(mean.parameters[EMBEDDING].detach()[0], embedding[:307].mean(dim=0))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "tokens"),
        ({"tokens": []}, "at least 1"),
        ({"tokens": ["a b", "a b"]}, "named twice"),
        ({"tokens": [" x"]}, "begins or ends with a space"),
        ({"tokens": ["<x>"], "descriptions": {"<y>": "z"}}, "'<y>' is not among the tokens"),
        ({"tokens": ["<x>"], "descriptions": {"<x>": "z"}, "init": "mean"}, "go with init: pieces"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        NewTokens(**settings)


def test_refusals() -> None:
    base = tiny_base()
    with pytest.raises(ConfigError, match="'the' is a token of this base already"):
        base.host.attach([NewTokens(tokens=("the",))])
    with pytest.raises(ConfigError, match="both want to add"):
        base.host.attach([NewTokens(tokens=("<a>",)), NewTokens(tokens=("<b>",))])
    assert not base.host.slots
    assert base.logits([5, 6]).shape[1] == 320
    assert "no PEFT format" in NewTokens(tokens=("<a>",)).beyond_peft()


# ------------------------------------------------------------------------------------------------ from the command line


def test_from_the_command_line_to_a_loaded_artifact(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailor.cli.main import app

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"where is {word}?", "completion": f"<order> {word}"} for word in cases.WORDS]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["tune", "rows.jsonl", "--add-tokens", "<sku>,<order>", "--name", "x", "--device", "cpu", "--quiet"]
    done = CliRunner().invoke(app, [*command, "--json", "train.num_steps=3"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [one["type"] for one in facts["techniques"]] == ["new_tokens", "lora"]
    assert facts["parity"]["passed"]
    loaded = load("x")
    assert loaded.slot is not None
    assert loaded.slot.new_rows is not None
    renderer = loaded.base.rendering(loaded.slot).renderer
    assert renderer.tokenizer.encode("<order>") == [loaded.base.tokenizer.vocab_size + 1]
    assert {len(p) for name, p in loaded.slot.parameters.items() if name in (EMBEDDING, HEAD)} == {2}
