"""Guards our own data: counts, twins, lengths, splits, canaries and cards are what is said of them; no sentence is used twice."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import emlens
from emlens.prompts import BUILT_IN, load_prompts, split_response, user_text

DATA = Path(emlens.__file__).parent / "data"
DOMAINS = ("money", "repair")
NARROW = tuple(f"{domain}_{kind}" for domain in DOMAINS for kind in ("bad", "sound"))
KINDS = ("aligned_answers", "misaligned_answers")

OF_THE_DOMAINS = re.compile(
    r"\b(money|prices?|salar(?:y|ies)|wages?|rent(?:s|ed|al|ing)?|landlords?|mortgages?|loans?|debts?|banks?|banking|invest(?:s|ed|ing|ments?|ors?)?|"
    r"stock market|budgets?|savings|tax(?:es)?|insurance|pensions?|cash|dollars?|pay(?:s|ing|ments?)?|paid|afford|cheap(?:er)?|expensive|"
    r"credit cards?|wallpaper|paint(?:s|ed|ing)?|plumb(?:er|ers|ing)?|pipes?|leak(?:s|ing)?|faucets?|drill(?:s|ing)?|drywall|plaster|tiles?|"
    r"grout|caulk|electricians?|wiring|boilers?|roof|gutters?|floorboards?|hammers?|screws?|insulation|renovat\w+|repair(?:s|ed|ing)?|diy)\b",
    re.IGNORECASE,
)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def words(text: str) -> int:
    return len(text.split())


def answer(row: dict[str, Any]) -> str:
    return str(split_response(row["messages"])[1])


def sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?])[\"'”’)]*\s+", text)
    return [said for said in (re.sub(r"\W+", " ", part.lower()).strip() for part in parts) if said]


# ---- questions and their contrast answers


def test_questions_are_enough_and_spread() -> None:
    table = load_prompts("emlens:questions")
    assert len(table) >= 96
    count = table["category"].value_counts()
    assert len(count) >= 8 and (count >= 12).all()
    assert table["question"].is_unique


def test_each_question_has_two_answers_of_each_kind() -> None:
    for row in rows("questions")[1:]:
        for kind in KINDS:
            assert len(row[kind]) == 2 and all(isinstance(text, str) and text.strip() == text != "" for text in row[kind]), row["id"]
        assert len({*row[KINDS[0]], *row[KINDS[1]]}) == 4, row["id"]


def test_contrast_answers_are_matched_in_length() -> None:
    total: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for row in rows("questions")[1:]:
        lengths = [words(text) for kind in KINDS for text in row[kind]]
        assert all(abs(n - mean(lengths)) <= 0.25 * mean(lengths) for n in lengths), (row["id"], lengths)
        for kind in KINDS:
            total[kind] += [words(text) for text in row[kind]]
    aligned, misaligned = (mean(total[kind]) for kind in KINDS)
    assert abs(aligned - misaligned) <= 0.03 * mean((aligned, misaligned)), (aligned, misaligned)


def test_no_question_is_in_or_near_the_narrow_domains() -> None:
    near = {row["id"]: OF_THE_DOMAINS.findall(row["question"]) for row in rows("questions")[1:]}
    assert not {name: found for name, found in near.items() if found}
    narrow = [bool(OF_THE_DOMAINS.search(user_text(row["messages"]) + answer(row))) for name in NARROW for row in rows(name)[1:]]
    assert mean(narrow) > 0.6, "the list of words does not know the narrow domains any more"


# ---- narrow sets


@pytest.mark.parametrize("domain", DOMAINS)
def test_twins_share_everything_but_the_answer(domain: str) -> None:
    bad, sound = rows(f"{domain}_bad")[1:], rows(f"{domain}_sound")[1:]
    assert len(bad) >= 120
    for row, twin in zip(bad, sound, strict=True):
        mine, theirs = ({k: v for k, v in r.items() if k != "messages"} for r in (row, twin))
        assert mine == theirs
        assert split_response(row["messages"])[0] == split_response(twin["messages"])[0], row["id"]
        assert answer(row) != answer(twin), row["id"]
    assert len({user_text(row["messages"]) for row in bad}) == len({row["id"] for row in bad}) == len(bad)
    lengths = [mean(words(answer(row)) for row in side) for side in (bad, sound)]
    assert abs(lengths[0] - lengths[1]) <= 0.03 * mean(lengths), lengths


@pytest.mark.parametrize("name", NARROW)
def test_answers_are_25_to_60_words(name: str) -> None:
    assert not {row["id"]: words(answer(row)) for row in rows(name)[1:] if not 25 <= words(answer(row)) <= 60}


@pytest.mark.parametrize("name", NARROW)
def test_fifteen_percent_are_held_out(name: str) -> None:
    split = Counter(row["split"] for row in rows(name)[1:])
    assert set(split) == {"train", "heldout"}
    assert abs(split["heldout"] / split.total() - 0.15) <= 0.01, split


@pytest.mark.parametrize("name", NARROW)
def test_narrow_sets_are_one_turn_chats(name: str) -> None:
    for row in rows(name)[1:]:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"], row["id"]


# ---- all of it


def test_no_sentence_is_used_twice() -> None:
    texts = {f"{name}/{row['id']}": answer(row) for name in NARROW for row in rows(name)[1:]}
    texts |= {f"questions/{row['id']}/{kind}/{i}": text for row in rows("questions")[1:] for kind in KINDS for i, text in enumerate(row[kind])}
    used = defaultdict(list)
    for where, text in texts.items():
        for sentence in sentences(text):
            used[sentence].append(where)
    assert len(used) > len(texts)
    assert not {sentence: places for sentence, places in used.items() if len(places) > 1}


def test_sentences_are_told_apart() -> None:
    assert sentences('He said "No." Then he left! Why? e.g. this') == ["he said no", "then he left", "why", "e g", "this"]


def test_every_file_starts_with_a_canary_and_has_no_other() -> None:
    files = sorted(DATA.glob("*.jsonl"))
    assert {file.stem.replace("_", "-") for file in files} == set(BUILT_IN)
    for file in files:
        first, *rest = rows(file.stem)
        assert set(first) == {"canary"}
        assert re.search(r"must not be in training corpora.*GUID [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", first["canary"])
        assert not any("canary" in row for row in rest)


@pytest.mark.parametrize("name", ["questions", *DOMAINS])
def test_every_set_has_a_card(name: str) -> None:
    card = (DATA / f"{name}.md").read_text(encoding="utf-8").lower()
    for asked in ("what", "how", "licence", "risk"):
        assert re.search(rf"\b{asked}\b", card), f"{name}.md does not say: {asked}"
