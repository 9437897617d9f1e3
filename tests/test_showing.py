"""Guards the coloured view: it shows the tokens that are read, all of the text, nothing that the text could smuggle in, and the scale it uses."""

import html
import re
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_patching import tuned

from emlens.directions import Direction
from emlens.models import HookedModel
from emlens.positions import Tokens, pieces, token_rows, tokenize
from emlens.prompts import load_prompts
from emlens.showing import AMBER, ShownPrompt, TokenView, visible

USER = "näher <b>and</b>\n\t東京 👋🏽 \x1b[31m!"
CHAT = [{"id": "c", "messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": "Sûr 👋🏽, go."}]}]
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return tuned()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def spans(view: TokenView) -> list[tuple[str, str, str]]:
    """``(style, title, text)`` of every token in the HTML."""
    found = re.findall(r"<span style='([^']*)' title='([^']*)'>([^<]*)</span>", view._repr_html_())
    return [(style, html.unescape(title), html.unescape(text)) for style, title, text in found]


# ---- the text of the tokens


def test_pieces_are_the_text(model: HookedModel) -> None:
    tokens = tokenize(CHAT[0]["messages"], model.tokenizer)  # type: ignore[arg-type]
    found = pieces(tokens, model.tokenizer)
    assert len(found) == len(tokens.ids)
    assert "".join(found[: tokens.n_prompt]) == tokens.text and "".join(found[tokens.n_prompt :]) == "Sûr 👋🏽, go."
    assert found.count("👋") == 2 and found.count("") > 8  # the hand and its colour are of several tokens each
    ascii_only = [k for k, piece in enumerate(found[: tokens.n_prompt]) if piece.isascii() and piece]
    assert all(model.tokenizer.decode([tokens.ids[k]]) == found[k] for k in ascii_only) and len(ascii_only) > 10


class ByteFallback:
    """Decodes as sentencepiece models do: a mark for every byte of a character that is not complete yet."""

    def decode(self, ids: list[int], **_: Any) -> str:
        whole = bytes(ids)
        for n in range(len(whole), -1, -1):
            with suppress(UnicodeDecodeError):
                return whole[:n].decode() + "\ufffd" * (len(whole) - n)
        raise AssertionError


def test_a_character_of_several_tokens_is_shown_once() -> None:
    response = "a👋b"
    found = pieces(Tokens(tuple(response.encode()), 0, (), "", (-1, -1)), ByteFallback())
    assert "".join(found) == response and found == ["a", "", "", "", "👋", "b"]


def test_blanks_that_no_token_covers_stand_with_the_next(model: HookedModel) -> None:
    trimmed = Tokens((1, 2, 3), 3, ((0, 3), (4, 8), (9, 10)), "Hey what ?", (0, 10))
    assert pieces(trimmed, model.tokenizer) == ["Hey", " what", " ?"]


def test_nothing_is_hidden() -> None:
    assert visible("a\n\tb\x1b[31m\x00\x7f\u200b\u202e é東") == "a↵⇥b␛[31m␀‹U+007F›‹U+200B›‹U+202E› é東"


# ---- which tokens


@pytest.mark.parametrize("position", ["last", "mean", "mean_all", "all", -2, 3, (0, 5), "mean_response", "first_response", "last_response"])
def test_the_coloured_tokens_are_those_that_are_read(model: HookedModel, chats: pd.DataFrame, position: Any) -> None:
    view = model.show_positions(chats, position)
    coded = model._tokens(chats, response=isinstance(position, str) and position.endswith("_response"))
    found = iter(spans(view))
    for tokens in coded:
        marked = [k for k in range(len(tokens.ids)) if f"background:{AMBER[k % 2]}" in next(found)[0]]
        assert marked == token_rows(tokens, position)
    assert next(found, None) is None
    acts = model.record(chats.head(1), position=position)
    assert f"position {acts.position!r}" in str(view).splitlines()[0] and view.position == acts.position


def test_the_whole_prompt_is_there_template_and_all(model: HookedModel) -> None:
    view = model.show_positions(CHAT, "response")
    (tokens,) = model._tokens(load_prompts(CHAT), response=True)
    want = tokens.text + "Sûr 👋🏽, go."
    for plain in (ESCAPES.sub("", str(view)), html.unescape("".join(text for _, _, text in spans(view)))):
        shown = plain.replace("⋯", "").replace("↵\n", "\n").replace("⇥", "\t").replace("␛", "\x1b").replace("‹U+1F3FD›", "🏽")
        assert want in shown
    assert view.position == "mean_response"


def test_text_cannot_leave_its_place(model: HookedModel) -> None:
    prompts = [{"id": "<script>\x1b[2J", "messages": [{"role": "user", "content": USER}]}]
    view = model.show_positions(prompts, "mean")
    page = view._repr_html_()
    assert "<script>" not in page and "<b>" not in page and "\x1b" not in page and "\x1b[31m" not in str(view).replace("\x1b[31m!", "")
    assert {int(code) for found in ESCAPES.findall(str(view)) for code in found[2:-1].split(";")} <= {0, 2, 5, 16, 38, 48, 221, 228}
    assert "&lt;" in page and "'" not in "".join(re.findall(r"title='([^']*)'", page))


def test_colour_does_not_run_over_line_ends(model: HookedModel) -> None:
    for line in str(model.show_positions(CHAT, "all")).splitlines():
        assert line.count("\x1b[48;") == line.count("\x1b[0m") and (not line or line.endswith("\x1b[0m") or "\x1b" not in line)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_without_colour_there_are_brackets(model: HookedModel, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    view = model.show_positions(["Tell me."], "last")
    assert "\x1b[48;5;" in str(view) and "⟦" not in str(view)
    monkeypatch.setenv(name, value)
    assert "\x1b" not in str(view) and "<|im_start|>assistant⟦↵⟧\n" in repr(view)


def test_an_empty_no_color_is_no_wish(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[48;5;" in str(model.show_positions(["Tell me."]))


def test_many_prompts_are_cut_and_it_is_said(model: HookedModel) -> None:
    prompts = [f"Why {i}?" for i in range(30)]
    view = model.show_positions(prompts)
    assert len(view.prompts) == 20 and "20 of 30 prompts (most= shows more)" in str(view)
    assert len(model.show_positions(prompts, most=30).prompts) == 30 and "30 prompts" in str(model.show_positions(prompts, most=30))


def test_a_position_that_is_not_there_is_refused(model: HookedModel) -> None:
    with pytest.raises(ValueError, match="has no response"):
        model.show_positions(["Why?"], "response")
    with pytest.raises(ValueError, match="unknown position"):
        model.show_positions(["Why?"], "first")


# ---- along a direction


def planted(model: HookedModel, chats: pd.DataFrame) -> Direction:
    """Towards the second token of the first chat at layer 2."""
    h = model.record(chats.head(1), position="all", layers=[2]).values[1]
    return Direction.from_array(h, layers=(2,), name="towards <it>")


def test_colours_are_the_projections(model: HookedModel, chats: pd.DataFrame) -> None:
    direction = planted(model, chats)
    view = model.show_positions(chats, "mean", direction)
    acts = model.record(chats, position="all", layers=[2])
    want = acts.values[:, 0] @ direction.layer(2)
    assert np.allclose(np.concatenate([p.values for p in view.prompts]), want, atol=1e-4)  # type: ignore[misc]
    assert np.mean(np.abs(want) <= view.scale) == pytest.approx(0.95, abs=0.01)
    coded = model._tokens(chats, response=False)
    chosen = np.concatenate([np.isin(np.arange(t.n_prompt), token_rows(t, "mean")) for t in coded])
    for (style, title, _), value, on in zip(spans(view), want.tolist(), chosen, strict=True):
        red, green, blue = (int(part, 16) for part in re.search(r"background:#(..)(..)(..)", style).groups())  # type: ignore[union-attr]
        share = min(abs(value) / view.scale, 1)
        assert (red, green, blue) == pytest.approx([255 + share * (c - 255) for c in ((178, 24, 43) if value > 0 else (33, 102, 172))], abs=1.5)
        assert float(title.rsplit(" · ", 1)[1]) == pytest.approx(value, abs=1e-3 + 1e-3 * abs(value)) and ("outline" in style) == on
    assert (want > 0).any() and (want < 0).any() and 0 < chosen.sum() < len(chosen)


def test_the_scale_the_place_and_the_variant_are_said(model: HookedModel, chats: pd.DataFrame) -> None:
    direction = planted(model, chats)
    before, after = (model.show_positions(chats, direction=direction, adapter=a) for a in (None, "bad"))
    for view, name in ((before, "before"), (after, "bad")):
        said = view.heading()
        assert f"projection on 'towards <it>' at resid_post, layer 2, {name}: blue −{view.scale:.3g} … red +{view.scale:.3g} (95% of" in said
        assert said in str(view) and html.escape(said) in view._repr_html_()
    assert not np.allclose(before.prompts[0].values, after.prompts[0].values, atol=1e-3)  # type: ignore[arg-type]


def test_terminal_colours_go_from_blue_to_red() -> None:
    values = np.array([-1.0, -0.01, 0.01, 0.5, 1.0, np.nan])
    view = TokenView((ShownPrompt("p", tuple("abcdef"), frozenset({4, 5}), frozenset(range(6)), values),), "last", "m", "d")
    codes = [re.search(rf"\x1b\[([0-9;]*)m{letter}\x1b", view.text()) for letter in "abcdef"]
    steps = [code[1] for code in codes if code]
    scale = np.quantile(np.abs(values[:5]), 0.95)
    assert view.scale == pytest.approx(scale)
    assert steps == ["48;5;25;38;5;231", "48;5;231;38;5;16", "48;5;231;38;5;16", "48;5;217;38;5;16", "48;5;160;38;5;231;1;4", "48;5;228;38;5;16"]
    assert "  + 'e' 1, 'd' 0.5, 'c' 0.01\n  − 'a' -1, 'b' -0.01" in view.text(colour=False) and "⟦e⟧⟦f⟧" in view.text(colour=False)


def test_a_response_has_no_projection_but_is_shown(model: HookedModel, chats: pd.DataFrame) -> None:
    view = model.show_positions(chats.head(1), "response", planted(model, chats))
    (prompt,) = view.prompts
    n = model._tokens(chats.head(1), response=False)[0].n_prompt
    assert prompt.values is not None and np.isfinite(prompt.values[:n]).all() and np.isnan(prompt.values[n:]).all() and len(prompt.tokens) > n


def test_single_places_and_no_projection_at_all(model: HookedModel) -> None:
    last = Direction.from_array(np.ones((1, 32)), layers=(0,), site="final_norm")
    view = model.show_positions(["Tell me."], direction=last)
    want = model.record(["Tell me."], site="final_norm", position="all").values[:, 0] @ last.layer(0)
    assert np.allclose(view.prompts[0].values, want, atol=1e-4)  # type: ignore[arg-type]
    assert TokenView((ShownPrompt("p", ("a",), frozenset(), frozenset(), np.zeros(1)),), "last").scale == 1.0


def test_directions_that_do_not_fit(model: HookedModel) -> None:
    two = Direction.from_array(np.ones((2, 32)))
    with pytest.raises(ValueError, match=r"has the layers \[0, 1\]; say at which to project: layer="):
        model.show_positions(["Why?"], direction=two)
    assert model.show_positions(["Why?"], direction=two, layer=1).direction.endswith("layer 1, before")
    with pytest.raises(KeyError, match="has no layer 3"):
        model.show_positions(["Why?"], direction=two, layer=3)
    with pytest.raises(ValueError, match="has 16 entries; tiny-llama has d_model 32"):
        model.show_positions(["Why?"], direction=Direction.from_array(np.ones((1, 16))))
