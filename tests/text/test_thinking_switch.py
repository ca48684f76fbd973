"""The switch by which a chat template lets a model think first: found by what it changes, turned by an effort."""

from __future__ import annotations

import pytest

from tailor.text.messages import assistant, user
from tailor.text.render import ChatRenderer
from tailor.text.tokenizer import Tokenizer
from tiny_models import CHAT_TEMPLATE, ROLES, tiny_tokenizer

MARKS = ("<|im_start|>", "<|im_end|>")
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n"
QWEN3 = TURNS.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
) + (
    OPENED + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
GRANITE = "{% if thinking %}<|im_start|>system\nThink first.<|im_end|>\n{% endif %}" + TURNS + OPENED + "{% endif %}"
LEVELS = "Reasoning: {{ reasoning_effort | default('medium') }}\n" + TURNS + OPENED + "{% endif %}"
MENTIONS = TURNS + OPENED + "{# enable_thinking #}{% set thinking = true %}{% endif %}"


def tokenizer(template: str) -> Tokenizer:
    return tiny_tokenizer(specials=MARKS, template=template)


def prompt(renderer: ChatRenderer) -> str:
    return renderer.tokenizer.decode(renderer.prompt([user("Hi")]))


@pytest.mark.parametrize(
    ("template", "efforts", "text"),
    [
        (QWEN3, ("none", "minimal"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (QWEN3, ("low", "medium", "high", "xhigh"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (GRANITE, ("none",), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            GRANITE,
            ("high",),
            "<|im_start|>system\nThink first.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (LEVELS, ("high",), "Reasoning: high\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (LEVELS, ("none",), "Reasoning: none\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_an_effort_turns_the_switch(template: str, efforts: tuple[str, ...], text: str) -> None:
    plain = ChatRenderer(tokenizer(template))
    before = prompt(plain)
    for effort in efforts:
        renderer = plain.at_effort(effort)
        assert renderer is not None
        assert prompt(renderer) == text
        assert renderer is plain.at_effort(effort)
    assert prompt(plain) == before


def test_what_a_switched_template_puts_into_the_prompt_is_no_part_of_the_answer() -> None:
    """Qwen 3's empty thought stands before the answer: in the prompt, or left out of what was said."""
    plain = ChatRenderer(tokenizer(QWEN3))
    off = plain.at_effort("none")
    assert off is not None
    assert plain.lead == "<think>\n\n</think>\n\n"
    whole = plain.example([user("Hi"), assistant("On its way.")]).token_ids
    assert off.example([user("Hi"), assistant("On its way.")]).token_ids[: len(off.prompt([user("Hi")]))] == off.prompt(
        [user("Hi")]
    )
    for renderer in (plain, off):
        answer = renderer.tokenizer.decode(whole[len(plain.prompt([user("Hi")])) :])
        assert answer.startswith("<think>")
        said = renderer.tokenizer.encode(answer.removeprefix("<think>\n\n</think>\n\n"), continues=True)
        assert renderer.parse(said).content == "On its way."


def test_templates_without_a_switch() -> None:
    assert ChatRenderer(tokenizer(MENTIONS)).at_effort("high") is None
    assert ChatRenderer(tiny_tokenizer(specials=ROLES, template=CHAT_TEMPLATE)).at_effort("none") is None
