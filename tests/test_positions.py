"""Guards positions: the tokens a name stands for are the ones meant, whatever else the prompt's text holds."""

from typing import Any

import numpy as np
import pytest
from tiny import CHATML, tiny_tokenizer

from emlens.positions import POSITIONS, Position, Tokens, needs_response, position_name, token_rows, tokenize
from emlens.prompts import PLAIN_TEMPLATE

USER = "Tell me about the market, näher and 東京!"
ANSWER = "They sell things there each morning."
CHAT = [{"role": "system", "content": "Be kind to people."}, {"role": "user", "content": USER}]


def said(tokens: Tokens, rows: list[int]) -> str:
    return str(tiny_tokenizer().decode([tokens.ids[i] for i in rows]))


class Templated:
    """The tiny tokenizer with another chat template."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return tiny_tokenizer()(text, **kwargs)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        return tiny_tokenizer().apply_chat_template(conversation, chat_template=self.chat_template, **kwargs)


@pytest.fixture
def tokens() -> Tokens:
    return tokenize([*CHAT, {"role": "assistant", "content": ANSWER}], tiny_tokenizer())


def test_the_prompt_is_rendered_as_the_template_does(tokens: Tokens) -> None:
    want = tiny_tokenizer().apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert tokens.text == want
    assert said(tokens, list(range(tokens.n_prompt))) == want
    assert len(tokens.offsets) == tokens.n_prompt


def test_the_prompt_is_a_prefix_of_prompt_and_response(tokens: Tokens) -> None:
    alone = tokenize(CHAT, tiny_tokenizer())
    assert alone.n_prompt == len(alone.ids) == tokens.n_prompt < len(tokens.ids)
    assert tokens.ids[: tokens.n_prompt] == alone.ids
    other = tokenize([*CHAT, {"role": "assistant", "content": ANSWER}], tiny_tokenizer(), response="Another.")
    assert other.ids[: other.n_prompt] == alone.ids and said(other, list(range(other.n_prompt, len(other.ids)))) == "Another."
    none = tokenize([*CHAT, {"role": "assistant", "content": ANSWER}], tiny_tokenizer(), response="")
    assert none.ids == alone.ids


def test_mean_is_the_users_text_and_nothing_else(tokens: Tokens) -> None:
    assert said(tokens, token_rows(tokens, "mean")) == USER
    assert tokens.text[slice(*tokens.user_span)] == USER


def test_outer_blanks_are_not_content() -> None:
    padded = tokenize([{"role": "user", "content": f"\n  {USER} \n"}], tiny_tokenizer())
    assert padded.text[slice(*padded.user_span)] == USER


def test_last_is_the_last_prompt_token(tokens: Tokens) -> None:
    assert token_rows(tokens, "last") == [tokens.n_prompt - 1]
    assert tokens.text.endswith(said(tokens, token_rows(tokens, "last"))) and tokens.text.endswith("assistant\n")


def test_mean_all_and_all_are_the_whole_prompt(tokens: Tokens) -> None:
    for name in ("mean_all", "all"):
        assert said(tokens, token_rows(tokens, name)) == tokens.text


def test_response_positions(tokens: Tokens) -> None:
    rows = token_rows(tokens, "mean_response")
    assert said(tokens, rows) == ANSWER
    assert token_rows(tokens, "first_response") == [tokens.n_prompt] == rows[:1]
    assert token_rows(tokens, "last_response") == [len(tokens.ids) - 1] == rows[-1:]


def test_which_positions_need_a_response() -> None:
    assert [name for name in POSITIONS if needs_response(name)] == ["first_response", "mean_response", "last_response"]
    assert not needs_response(-1) and not needs_response((0, 3))


def test_index_counts_in_the_prompt(tokens: Tokens) -> None:
    assert token_rows(tokens, 0) == [0]
    assert token_rows(tokens, np.int64(3)) == [3]  # type: ignore[arg-type]
    assert token_rows(tokens, -1) == token_rows(tokens, "last")
    assert token_rows(tokens, -tokens.n_prompt) == [0]
    for outside in (tokens.n_prompt, -tokens.n_prompt - 1):
        with pytest.raises(ValueError, match=rf"q-7 has {tokens.n_prompt} prompt tokens; index {outside} is outside"):
            token_rows(tokens, outside, "q-7")


def test_span_covers_the_characters_of_the_users_text(tokens: Tokens) -> None:
    start = USER.index("market")
    rows = token_rows(tokens, (start, start + 6))
    covered = tokens.text[tokens.offsets[rows[0]][0] : tokens.offsets[rows[-1]][1]]
    assert "market" in covered and covered.strip(" ,") == "market"
    assert token_rows(tokens, (0, len(USER))) == token_rows(tokens, "mean")
    assert token_rows(tokens, (0, 10_000)) == token_rows(tokens, "mean")


@pytest.mark.parametrize("span", [(-4, 2), (-4, -1), (5, 5), (6, 2)])
def test_a_span_that_leaves_the_users_text_or_is_empty_is_refused(tokens: Tokens, span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= start < end"):
        token_rows(tokens, span)


def test_a_span_behind_the_text_is_refused(tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="q-7.*holds no token"):
        token_rows(tokens, (len(USER), len(USER) + 5), "q-7")


@pytest.mark.parametrize("name", ["first_response", "mean_response", "last_response"])
def test_no_response_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"q-7 has no response; position '{name}'"):
        token_rows(tokenize(CHAT, tiny_tokenizer()), name, "q-7")


@pytest.mark.parametrize("position", ["first", True, 1.5, (1, 2, 3), None])
def test_unknown_positions_are_refused(position: Any) -> None:
    with pytest.raises(ValueError, match="unknown position .*positions are last, mean"):
        position_name(position)


@pytest.mark.parametrize(("position", "name"), [("mean", "mean"), (-2, "index -2"), ((3, 10), "span 3:10")])
def test_position_names(position: Position, name: str) -> None:
    assert position_name(position) == name


def test_a_text_that_is_also_in_the_system_prompt_is_found_in_the_users_turn() -> None:
    chat = [{"role": "system", "content": f"When asked '{USER}' say no."}, {"role": "user", "content": USER}]
    tokens = tokenize(chat, tiny_tokenizer())
    assert tokens.text.count(USER) == 2
    assert tokens.text[: tokens.user_span[0]].endswith("<|im_start|>user\n")


@pytest.mark.parametrize("text", ["assistant", "d", "user", "n"])
@pytest.mark.parametrize("template", [CHATML, PLAIN_TEMPLATE])
def test_a_text_that_is_also_in_the_template_is_found_in_the_users_turn(text: str, template: str) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}, {"role": "user", "content": text}]
    tokens = tokenize(chat, Templated(template))
    start, end = tokens.user_span
    assert tokens.text[start:end] == text
    assert tokens.text[:start].endswith("Question: " if template is PLAIN_TEMPLATE else "<|im_start|>user\n")


def test_a_template_that_changes_the_text_is_refused_for_mean_and_fine_for_mean_all() -> None:
    loud = CHATML.replace("message['content'] }}", "message['content'] | upper }}")
    tokens = tokenize([{"role": "user", "content": "Hello there"}], Templated(loud))
    assert tokens.user_span == (-1, -1)
    with pytest.raises(ValueError, match="does not hold the user's text.*mean_all"):
        token_rows(tokens, "mean")
    assert len(token_rows(tokens, "mean_all")) == tokens.n_prompt
