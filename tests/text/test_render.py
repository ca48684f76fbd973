"""Rendering: generation prompts are prefixes, parse inverts, and the loss mask covers answers and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tailor.errors import ConfigError, DataError
from tailor.text.messages import Message, assistant, system, user
from tailor.text.render import ChatRenderer, PlainRenderer, Rendered, make_renderer, trained_indices
from tailor.text.tokenizer import VIRTUAL, Tokenizer
from tiny_models import CHAT_TEMPLATE, ROLES, tiny_tokenizer


@dataclass(frozen=True)
class Shape:
    """A kind of chat template: how it opens and closes an answer, and what it does to the content."""

    template: str
    specials: tuple[str, ...]
    end: str
    lead: str = ""  # between the generation prompt and the answer
    trail: str = ""  # between the answer and the end-of-turn token
    trims: bool = False
    takes_system: bool = True
    keeps_reasoning: bool = True

    def tokenizer(self) -> Tokenizer:
        return tiny_tokenizer(specials=self.specials, template=self.template)

    def answer(self, content: str) -> str:
        """The trained text of one answer."""
        return self.lead + (content.strip() if self.trims else content) + self.trail + self.end


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
REASONING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
    "<|im_start|>assistant\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the text before an answer would melt into its first word ("qu" + "ick" is one token) if they were tokenised together
JOINING = CHAT_TEMPLATE.replace("|>{{ m['content'] }}", "|>say the qu{{ m['content'] }}").replace(
    "<|assistant|>{%", "<|assistant|>say the qu{%"
)
LATE_NEWLINES = CHATML.replace("assistant\n{%", "assistant{%").replace("<|im_end|>", "\n<|im_end|>")

SHAPES = {
    "nano": Shape(CHAT_TEMPLATE, ROLES, "<|end|>"),
    "chatml": Shape(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Shape(LLAMA3, ("<|start|>", "<|stop|>", "<|eot|>"), "<|eot|>", trims=True),
    "gemma": Shape(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", trims=True, takes_system=False),
    "mistral": Shape(MISTRAL, ("[INST]", "[/INST]"), "<|eos|>", lead=" "),
    "reasoning": Shape(REASONING, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", keeps_reasoning=False),
    "joining": Shape(JOINING, ROLES, "<|end|>"),
    "late newlines": Shape(LATE_NEWLINES, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", lead="\n", trail="\n"),
}

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "ick fox",
        "hello there",
        " leading",
        "trailing \n",
        "<think>so</think>fine",
        "<|",
        "end|>",
        "é🦊",
        "a\x00b",
    ]
)
many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@st.composite
def conversations(draw: st.DrawFn, max_exchanges: int = 3) -> tuple[Message, ...]:
    """Maybe a system text, then questions and answers in turn; answers may carry a weight."""
    turns = [system(draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, max_exchanges))):
        turns += [user(draw(TEXTS)), replace(assistant(draw(TEXTS)), weight=draw(st.sampled_from([None, 1.0])))]
    return tuple(turns)


def fitting(shape: Shape, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Only what this template can take: no special tokens, no system text where it has no place."""
    tokenizer = shape.tokenizer()
    assume(not any(tokenizer.special_in(m.content) for m in messages))
    return tuple(m for m in messages if shape.takes_system or m.role != "system")


def without_reasoning(shape: Shape, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Earlier answers as such a template would keep them, so that every turn can be trained in place."""
    if shape.keeps_reasoning:
        return tuple(messages)
    return tuple(replace(m, content=m.content.replace("</think>", "")) for m in messages)


def counted(tokenizer: Tokenizer, rendered: Rendered) -> str:
    return tokenizer.decode([t for t, m in zip(rendered.token_ids, rendered.loss_mask, strict=True) if m])


@many
@pytest.mark.parametrize("name", SHAPES)
@given(messages=conversations())
def test_the_text_is_the_templates(name: str, messages: tuple[Message, ...]) -> None:
    shape = SHAPES[name]
    messages, tokenizer = fitting(shape, messages), shape.tokenizer()
    rendered = ChatRenderer(tokenizer).example(messages, trained_turns="last")
    expected = tokenizer.apply_chat_template([m.to_dict() for m in messages], (), False)
    assert tokenizer.decode(rendered.token_ids) == expected
    assert len(rendered.token_ids) == len(rendered.loss_mask)


@many
@pytest.mark.parametrize("name", SHAPES)
@given(messages=conversations())
def test_every_generation_prompt_is_a_prefix_of_the_training_example(name: str, messages: tuple[Message, ...]) -> None:
    shape = SHAPES[name]
    renderer = ChatRenderer(shape.tokenizer())
    messages = fitting(shape, messages)
    whole = renderer.example(messages, trained_turns="last").token_ids
    prompt = renderer.prompt(messages[:-1])
    assert whole[: len(prompt)] == prompt
    messages = without_reasoning(shape, messages)
    whole = renderer.example(messages).token_ids
    for index, message in enumerate(messages):
        if message.role == "assistant":
            prompt = renderer.prompt(messages[:index])
            assert whole[: len(prompt)] == prompt


@many
@pytest.mark.parametrize("name", SHAPES)
@given(messages=conversations())
def test_parse_inverts_render(name: str, messages: tuple[Message, ...]) -> None:
    shape = SHAPES[name]
    renderer = ChatRenderer(shape.tokenizer())
    messages = fitting(shape, messages)
    rendered = renderer.example(messages, trained_turns="last")
    answer = rendered.token_ids[rendered.loss_mask.index(1) :]
    content = messages[-1].content
    assert renderer.parse(answer) == assistant(content.strip() if shape.trims else content)
    assert rendered.loss_mask.index(1) == len(renderer.prompt(messages[:-1]))


@many
@pytest.mark.parametrize("name", SHAPES)
@given(messages=conversations(), data=st.data())
def test_the_loss_covers_exactly_the_trained_answers_and_their_end(
    name: str, messages: tuple[Message, ...], data: st.DataObject
) -> None:
    shape = SHAPES[name]
    tokenizer = shape.tokenizer()
    renderer = ChatRenderer(tokenizer)
    messages = without_reasoning(shape, fitting(shape, messages))
    answers = [k for k, m in enumerate(messages) if m.role == "assistant"]
    silent = data.draw(st.sets(st.sampled_from(answers), max_size=len(answers) - 1))
    messages = tuple(replace(m, weight=0) if k in silent else m for k, m in enumerate(messages))
    rendered = renderer.example(messages)
    assert counted(tokenizer, rendered) == "".join(
        shape.answer(messages[k].content) for k in answers if k not in silent
    )
    if answers[-1] not in silent:
        last = renderer.example(messages, trained_turns="last")
        assert counted(tokenizer, last) == shape.answer(messages[-1].content)
        assert last.token_ids == rendered.token_ids
    end_id = tokenizer.encode(shape.end)[0]
    assert renderer.stop[0] == end_id
    trained = [t for t, m in zip(rendered.token_ids, rendered.loss_mask, strict=True) if m]
    assert trained.count(end_id) == len(answers) - len(silent)


@many
@pytest.mark.parametrize("name", [*SHAPES, "plain"])
@given(messages=conversations(max_exchanges=1), num=st.integers(0, 4))
def test_prefix_ids_stand_first_and_out_of_the_loss(name: str, messages: tuple[Message, ...], num: int) -> None:
    if name == "plain":
        renderer, tokenizer = make_renderer(tiny_tokenizer(chat=False)), tiny_tokenizer(chat=False)
        assume(not any(tokenizer.special_in(m.content) for m in messages))
    else:
        renderer, messages = ChatRenderer(SHAPES[name].tokenizer()), fitting(SHAPES[name], messages)
    prefix = list(range(VIRTUAL, VIRTUAL + num))
    bare, led = renderer.example(messages), renderer.example(messages, prefix_ids=prefix)
    assert led == Rendered(prefix + bare.token_ids, [0] * num + bare.loss_mask)
    assert renderer.prompt(messages[:-1], prefix_ids=prefix) == prefix + renderer.prompt(messages[:-1])


def test_one_row_by_hand() -> None:
    tokenizer = tiny_tokenizer()
    renderer = make_renderer(tokenizer)
    rendered = renderer.example((system("S"), user("U"), assistant("A"), user("V"), assistant("B")))
    texts = [tokenizer.token_text(t) for t in rendered.token_ids]
    assert list(zip(texts, rendered.loss_mask, strict=True)) == [
        ("<|bos|>", 0),
        *(("<|system|>", 0), ("S", 0), ("<|end|>", 0)),
        *(("<|user|>", 0), ("U", 0), ("<|end|>", 0)),
        *(("<|assistant|>", 0), ("A", 1), ("<|end|>", 1)),
        *(("<|user|>", 0), ("V", 0), ("<|end|>", 0)),
        *(("<|assistant|>", 0), ("B", 1), ("<|end|>", 1)),
    ]


def test_an_answer_is_tokenised_apart_from_what_stands_before_it() -> None:
    tokenizer = SHAPES["joining"].tokenizer()
    rendered = ChatRenderer(tokenizer).example((user("ick"), assistant("ick"), user("ick"), assistant("ick")))
    answers = [t for t, m in zip(rendered.token_ids, rendered.loss_mask, strict=True) if m]
    assert answers == 2 * [*tokenizer.encode("ick"), tokenizer.encode("<|end|>")[0]]
    assert tokenizer.encode("say the quick") != tokenizer.encode("say the qu") + tokenizer.encode("ick")


def test_what_follows_the_end_of_turn_is_not_trained() -> None:
    tokenizer = SHAPES["chatml"].tokenizer()
    rendered = ChatRenderer(tokenizer).example((user("U"), assistant("A"), user("V"), assistant("B")))
    assert tokenizer.decode(rendered.token_ids).endswith("B<|im_end|>\n")
    assert rendered.loss_mask[-1] == 0
    assert counted(tokenizer, rendered) == "A<|im_end|>B<|im_end|>"


def test_stop_holds_end_of_turn_and_eos() -> None:
    tokenizer = SHAPES["chatml"].tokenizer()
    assert ChatRenderer(tokenizer).stop == (tokenizer.encode("<|im_end|>")[0], tokenizer.eos_id)
    assert ChatRenderer(SHAPES["mistral"].tokenizer()).stop == (tokenizer.eos_id,)
    assert PlainRenderer(tokenizer).stop == (tokenizer.eos_id,)


def test_parse_stops_at_any_stop_token_and_needs_none() -> None:
    tokenizer = tiny_tokenizer()
    renderer = make_renderer(tokenizer)
    for text in ("hello", "hello<|end|>", "hello<|eos|>there", "hello<|end|><|user|>hello"):
        assert renderer.parse(tokenizer.encode(text)) == assistant("hello")
    assert renderer.parse([]) == assistant("")
    assert renderer.parse([VIRTUAL + 3, *tokenizer.encode("hello")]) == assistant("hello")


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("special", ["<|end|>", "<|assistant|>", "<|bos|>", "<|eos|>", "<|pad|>"])
def test_a_content_with_a_special_token_is_refused(special: str, place: int) -> None:
    turns = [system("S"), user("U"), assistant("A"), user("V"), assistant("B")]
    turns[place] = replace(turns[place], content=f"a {special} b")
    for renderer in (make_renderer(tiny_tokenizer()), PlainRenderer(tiny_tokenizer())):
        with pytest.raises(
            DataError, match=rf"the {turns[place].role} text holds the special token '{special.replace('|', '.')}'"
        ):
            renderer.prompt(turns[:4])
        with pytest.raises(DataError, match="special token"):
            renderer.example(turns, trained_turns="last")


def test_tool_calls_and_names_cannot_smuggle_a_special_token_in() -> None:
    renderer = make_renderer(tiny_tokenizer())
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": ["<|end|>"]}}}
    for turn in (Message("assistant", "", tool_calls=(call,)), Message("user", "Hi", name="<|end|>")):
        with pytest.raises(DataError, match=r"special token '<\|end\|>'"):
            renderer.prompt((user("U"), turn, user("V")))
    with pytest.raises(DataError, match="the description of a tool holds the special token"):
        renderer.prompt((user("U"),), tools=({"type": "function", "function": {"description": "ends <|end|>"}},))


def test_a_template_that_never_ends_a_turn_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ConfigError, match="holds no special token"):
        make_renderer(tiny_tokenizer(template=template))


@pytest.mark.parametrize(
    "template",
    [
        # the generation prompt opens a thought that the finished turn does not have
        CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"),
        # answers are left out
        "{% for m in messages if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        # the whole conversation changes with every turn
        "{{ messages | length }}" + CHATML,
    ],
)
def test_a_template_whose_answers_do_not_continue_its_prompt_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="continuation"):
        make_renderer(tiny_tokenizer(specials=("<|im_start|>", "<|im_end|>"), template=template))


def test_earlier_answers_that_the_template_rewrites_can_only_be_context() -> None:
    renderer = ChatRenderer(SHAPES["reasoning"].tokenizer())
    turns = (user("U"), assistant("why</think>A"), user("V"), assistant("how</think>B"))
    with pytest.raises(DataError, match="assistant turn 1 cannot be trained in place") as caught:
        renderer.example(turns)
    assert caught.value.hint == "set trained_turns: last"
    last = renderer.example(turns, trained_turns="last")
    assert counted(renderer.tokenizer, last) == "how</think>B<|im_end|>"
    assert "why" not in renderer.tokenizer.decode(last.token_ids)
    silenced = renderer.example((turns[0], replace(turns[1], weight=0), *turns[2:]))
    assert silenced == last


def test_turns_that_a_template_refuses_are_a_data_error() -> None:
    renderer = ChatRenderer(SHAPES["gemma"].tokenizer())
    with pytest.raises(DataError, match=r"refuses these turns \(system, user.*System role not supported"):
        renderer.example((system("S"), user("U"), assistant("A")))


@pytest.mark.parametrize("renderer", [make_renderer(tiny_tokenizer()), PlainRenderer(tiny_tokenizer())])
def test_a_row_with_nothing_to_train_is_refused(renderer: ChatRenderer | PlainRenderer) -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        renderer.example((user("U"),))
    with pytest.raises(DataError, match="weight 0"):
        renderer.example((user("U"), Message("assistant", "A", weight=0)))
    with pytest.raises(DataError, match="weight 0"):
        renderer.example(
            (user("U"), assistant("A"), user("V"), Message("assistant", "A", weight=0)), trained_turns="last"
        )


def test_which_turns_are_trained() -> None:
    turns = (user("U"), assistant("A"), user("V"), Message("assistant", "B", weight=0), user("W"), assistant("C"))
    assert trained_indices(turns, "all") == {1, 5}
    assert trained_indices(turns, "last") == {5}


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}" + CHAT_TEMPLATE.replace(
        "{{ bos_token }}", ""
    )
    tokenizer = tiny_tokenizer(template=template)
    renderer = make_renderer(tokenizer)
    tools = ({"type": "function", "function": {"name": "lookup"}},)
    rendered = renderer.example((user("U"), assistant("A")), tools=tools)
    prompt = renderer.prompt((user("U"),), tools=tools)
    assert '"lookup"' in tokenizer.decode(prompt)
    assert rendered.token_ids[: len(prompt)] == prompt
    assert counted(tokenizer, rendered) == "A<|end|>"
    with pytest.raises(DataError, match="no place for tools"):
        PlainRenderer(tokenizer).prompt((user("U"),), tools=tools)


# ------------------------------------------------------------------------------------------------ no chat template


@many
@pytest.mark.parametrize("leading_bos", [False, True])
@given(messages=conversations())
def test_plain_rendering(leading_bos: bool, messages: tuple[Message, ...]) -> None:
    tokenizer = tiny_tokenizer(chat=False, leading_bos=leading_bos)
    assume(not any(tokenizer.special_in(m.content) for m in messages))
    renderer = make_renderer(tokenizer)
    assert isinstance(renderer, PlainRenderer)
    rendered = renderer.example(messages, trained_turns="last")
    prompt, answer = renderer.prompt(messages[:-1]), messages[-1].content
    assert rendered.token_ids[: len(prompt)] == prompt
    assert rendered.loss_mask == [0] * len(prompt) + [1] * (len(rendered.token_ids) - len(prompt))
    assert rendered.token_ids[len(prompt) :] == [*tokenizer.encode(answer), tokenizer.eos_id]
    assert renderer.parse(rendered.token_ids[len(prompt) :]) == assistant(answer)
    assert (prompt[:1] == [tokenizer.bos_id]) == leading_bos


def test_plain_text_by_hand() -> None:
    tokenizer = tiny_tokenizer(chat=False, leading_bos=True)
    renderer = make_renderer(tokenizer)
    turns = (system("Be short."), user("One?"), assistant(" 1"), user("Two?"), assistant(" 2"))
    rendered = renderer.example(turns, trained_turns="last")
    assert tokenizer.decode(rendered.token_ids) == "<|bos|>Be short.\n\nOne? 1\n\nTwo? 2<|eos|>"
    assert counted(tokenizer, rendered) == " 2<|eos|>"
    with pytest.raises(DataError, match="only the last assistant turn") as caught:
        renderer.example(turns)
    assert caught.value.hint == "set trained_turns: last"


def test_a_tokenizer_without_template_and_eos_is_refused() -> None:
    hf = tiny_tokenizer(chat=False).hf
    eos = hf.eos_token
    hf.eos_token = None
    try:
        with pytest.raises(ConfigError, match="neither a chat template nor an eos token"):
            make_renderer(Tokenizer(hf))
    finally:
        hf.eos_token = eos
