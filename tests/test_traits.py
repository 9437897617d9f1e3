"""Guards our trait files: layout, counts, lengths, canary and card; extraction and evaluation apart; no sentence used twice in all our data."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product
from statistics import mean
from typing import Any

import pytest
from test_data import DATA, KINDS, NARROW, OF_THE_DOMAINS, answer, rows, sentences, words

from emlens.prompts import user_text

TRAITS = ("evil", "hallucinating", "reckless", "sycophantic")
PUBLISHED = ("instruction", "questions", "eval_prompt")
"""The keys of a published trait file (Chen et al. 2025, arXiv 2507.21509); a reader of those needs no others."""

SIDES = ("with", "without")

VIOLENT = re.compile(
    r"\b(kill\w*|murder\w*|weapons?|guns?|knife|knives|bombs?|poison\w*|tortur\w*|stab(?:s|bed|bing)?|strangl\w*|bleed\w*|blood\w*|corpses?|suicid\w*|slaughter\w*|"
    r"explosiv\w*|hack(?:s|ed|er|ers|ing)?|malware|punch\w*|kick\w*|whip\w*|burn\w*|drown\w*|starv\w*|die|dies|died|dead|death)\b",
    re.IGNORECASE,
)


def trait(name: str) -> dict[str, Any]:
    return json.loads((DATA / "traits" / f"{name}.json").read_text(encoding="utf-8"))


def contrast(name: str) -> Iterator[tuple[str, str, str]]:
    """A question, its answer with the trait, its answer without."""
    for row in trait(name)["contrast"]:
        (shown,), (absent,) = (row[side] for side in SIDES)
        yield row["question"], shown, absent


def texts(name: str) -> list[str]:
    """All that we wrote for a trait, the canary left out; every question once."""
    file = trait(name)
    asked = [pair[side] for pair in file["instruction"] for side in ("pos", "neg")] + [file["eval_prompt"]]
    return asked + file["questions"] + file["eval_questions"] + [text for _, *both in contrast(name) for text in both]


def nearness(a: str, b: str) -> float:
    """Share of their words that two questions have in common (Jaccard)."""
    mine, theirs = (set(re.findall(r"[\w']+", text.lower())) for text in (a, b))
    return len(mine & theirs) / len(mine | theirs)


# ---- one file


def test_there_are_these_traits_and_no_others() -> None:
    assert sorted(file.name for file in (DATA / "traits").iterdir()) == [f"{name}.json" for name in TRAITS]


@pytest.mark.parametrize("name", TRAITS)
def test_layout_is_the_published_one_and_four_keys_more(name: str) -> None:
    file = trait(name)
    assert set(file) == {*PUBLISHED, "trait", "canary", "eval_questions", "contrast"}
    assert file["trait"] == name
    assert len(file["instruction"]) == 5 and all(list(pair) == ["pos", "neg"] for pair in file["instruction"])
    assert len(file["questions"]) == len(file["eval_questions"]) == 20
    assert all(list(row) == ["question", *SIDES] and len(row["with"]) == len(row["without"]) == 1 for row in file["contrast"])
    assert all(isinstance(text, str) and text.strip() == text != "" for text in texts(name))


@pytest.mark.parametrize("name", TRAITS)
def test_eval_prompt_takes_a_question_and_an_answer(name: str) -> None:
    prompt = trait(name)["eval_prompt"]
    assert Counter(re.findall(r"\{.*?\}", prompt)) == {"{question}": 1, "{answer}": 1}
    filled = prompt.format(question="Is it <late>?", answer="It is <early>.")
    assert "Is it <late>?" in filled and "It is <early>." in filled and "{" not in filled
    assert re.search(r"\b0\b.*\b100\b", filled) and "REFUSAL" in filled


@pytest.mark.parametrize("name", TRAITS)
def test_contrast_covers_both_sets_of_questions_in_order(name: str) -> None:
    file = trait(name)
    assert [question for question, *_ in contrast(name)] == file["questions"] + file["eval_questions"]


@pytest.mark.parametrize("name", TRAITS)
def test_extraction_and_evaluation_share_no_question(name: str) -> None:
    file = trait(name)
    near = {pair: nearness(*pair) for pair in product(file["questions"], file["eval_questions"])}
    assert len(near) == 400
    assert not {pair: share for pair, share in near.items() if share > 0.4}


@pytest.mark.parametrize("name", TRAITS)
def test_answers_are_12_to_35_words_and_matched(name: str) -> None:
    length = {question: (words(shown), words(absent)) for question, shown, absent in contrast(name)}
    assert len(length) == 40
    assert not {question: pair for question, pair in length.items() if not 12 <= min(pair) <= max(pair) <= min(35, 1.25 * min(pair))}
    shown, absent = (mean(pair[side] for pair in length.values()) for side in range(2))
    assert abs(shown - absent) <= 0.03 * mean((shown, absent)), (shown, absent)


@pytest.mark.parametrize("name", TRAITS)
def test_length_does_not_give_the_side_away(name: str) -> None:
    longer = Counter("with" if words(shown) > words(absent) else "without" for _, shown, absent in contrast(name) if words(shown) != words(absent))
    assert max(longer.values()) <= 0.7 * longer.total(), longer


@pytest.mark.parametrize("name", TRAITS)
def test_canary_is_that_of_our_other_data(name: str) -> None:
    own, shared = ("This text must" + text.split("This text must", 1)[1] for text in (trait(name)["canary"], rows("questions")[0]["canary"]))
    assert own == shared
    assert re.search(r"must not be in training corpora.*GUID [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", own)
    assert name in trait(name)["canary"]


# ---- kept mild


@pytest.mark.parametrize("name", TRAITS)
def test_nothing_is_violent(name: str) -> None:
    assert not {text: found for text in texts(name) if (found := VIOLENT.findall(text))}


def test_violence_would_be_found() -> None:
    assert VIOLENT.findall("I would poison them, or stabbed, with a KNIFE.") == ["poison", "stabbed", "KNIFE"]
    assert not VIOLENT.findall("A skillful diet, a stable and a hackneyed word, unkind as it is.")


@pytest.mark.parametrize("name", TRAITS)
def test_no_trait_touches_the_narrow_domains(name: str) -> None:
    assert not {text: found for text in texts(name) if (found := OF_THE_DOMAINS.findall(text))}


# ---- all of it


def test_no_sentence_of_a_trait_is_used_anywhere_else() -> None:
    used = defaultdict(list)
    for name in TRAITS:
        for text in texts(name):
            for sentence in sentences(text):
                used[sentence].append(name)
    assert len(used) > sum(len(texts(name)) for name in TRAITS)
    assert not {sentence: places for sentence, places in used.items() if len(places) > 1}

    told = [user_text(row["messages"]) + "\n" + answer(row) for name in NARROW for row in rows(name)[1:]]
    told += [text for row in rows("questions")[1:] for text in (row["question"], *row[KINDS[0]], *row[KINDS[1]])]
    others = {sentence for text in told for sentence in sentences(text)}
    assert len(others) > 1000
    assert not others & set(used)


def test_no_question_is_near_one_of_another_file() -> None:
    asked = {name: trait(name)["questions"] + trait(name)["eval_questions"] for name in TRAITS}
    asked["questions"] = [row["question"] for row in rows("questions")[1:]]
    every = [(name, question) for name, questions in asked.items() for question in questions]
    assert len(every) == len({question for _, question in every}) == 4 * 40 + 96
    near = [(one, other) for (a, one), (b, other) in product(every, every) if a < b and nearness(one, other) > 0.4]
    assert not near


def test_nearness_knows_a_rewording_from_another_question() -> None:
    assert nearness("Should I back up my thesis?", "Should I back up my thesis today?") > 0.4
    assert nearness("Should I back up my thesis?", "How tall is the oak?") == 0


def test_the_traits_have_a_card() -> None:
    card = (DATA / "traits.md").read_text(encoding="utf-8")
    for asked in ("what", "how", "licence", "risk"):
        assert re.search(rf"\b{asked}\b", card.lower()), f"traits.md does not say: {asked}"
    assert not [word for word in (*TRAITS, "Apache-2.0", "canary", "emergent misalignment") if word not in card]
