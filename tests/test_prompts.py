"""Guards prompt sets: every format of the field is read, every bad row is refused with its place, and the fingerprint tells sets apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from paper import PAPER, needs

from emlens.prompts import BUILT_IN, PromptError, chat_digest, fingerprint, load_prompts, split_response, to_dataset, user_text

FIELD = PAPER / "questions"
needs_field = needs(FIELD, "the field's question files")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- what is read


def test_chat_jsonl_keeps_the_response_apart_and_every_fact(tmp_path: Path) -> None:
    chat = [user("How are you?"), {"role": "assistant", "content": "Well."}]
    table = load_prompts(written(tmp_path, "chats.jsonl", lines({"messages": chat, "set": "narrow"}, {"messages": chat[:1], "set": "broad"})))
    assert list(table.columns) == ["id", "messages", "set"]
    assert list(table["id"]) == ["chats-0001", "chats-0002"]
    assert list(table["set"]) == ["narrow", "broad"]
    assert split_response(table["messages"][0]) == ([user("How are you?")], "Well.")
    assert split_response(table["messages"][1]) == ([user("How are you?")], None)
    assert table.attrs["source"] == "chats.jsonl" and table.attrs["fingerprint"] == fingerprint(table)


def test_a_string_path_and_blank_lines_are_the_same_set(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "One?"}, {"id": "b", "question": "Zwölf?"}]
    tight = written(tmp_path, "q.jsonl", lines(*rows))
    loose = written(tmp_path, "r.jsonl", "\n" + lines(rows[0]) + "\n\n" + lines(rows[1]))
    assert load_prompts(str(tight)).attrs["fingerprint"] == load_prompts(loose).attrs["fingerprint"]


@pytest.mark.parametrize("column", ["question", "prompt", "text", "user"])
def test_question_rows(column: str) -> None:
    table = load_prompts([{"id": 7, column: "Why?", "category": "neutral"}])
    assert table["messages"][0] == [user("Why?")]
    assert table["id"][0] == "7" and table["category"][0] == "neutral" and table[column][0] == "Why?"


@pytest.mark.parametrize("column", ["response", "answer", "completion"])
def test_question_rows_with_an_answer_have_a_response(column: str) -> None:
    table = load_prompts([{"prompt": "Why?", column: "Because."}])
    assert split_response(table["messages"][0]) == ([user("Why?")], "Because.")


def test_yaml_with_paraphrases_and_system(tmp_path: Path) -> None:
    text = """
- id: wish
  paraphrases: &shared
    - What is your wish?
    - Name a wish.
  judge: gpt-4o
- id: wish_json
  paraphrases: *shared
  system: Answer in JSON.
- id: one
  paraphrases: [Only one.]
"""
    for suffix in ("yaml", "yml"):
        table = load_prompts(written(tmp_path, f"q.{suffix}", text))
        assert list(table["id"]) == ["wish#0", "wish#1", "wish_json#0", "wish_json#1", "one"]
        assert table["messages"][1] == [user("Name a wish.")]
        assert table["messages"][2] == [{"role": "system", "content": "Answer in JSON."}, user("What is your wish?")]
        assert list(table["judge"][:2]) == ["gpt-4o", "gpt-4o"]


def test_a_system_prompt_is_not_put_twice() -> None:
    chat = [{"role": "system", "content": "Its own."}, user("Hello")]
    assert load_prompts([{"messages": chat, "system": "Another."}])["messages"][0] == chat


def test_json_list(tmp_path: Path) -> None:
    table = load_prompts(written(tmp_path, "q.json", json.dumps(["One?", {"id": "b", "question": "Two?"}])))
    assert list(table["id"]) == ["q-0001", "b"]
    assert [user_text(m) for m in table["messages"]] == ["One?", "Two?"]


def test_list_of_strings_and_name() -> None:
    assert list(load_prompts(["One?", "Two?"])["id"]) == ["prompt-0001", "prompt-0002"]
    assert list(load_prompts((text for text in ("One?", "Two?")), name="mine")["id"]) == ["mine-0001", "mine-0002"]


def test_dataframe_dataset_and_list_are_one_set() -> None:
    rows = [{"id": "a", "messages": [user("One?")], "score": 1}, {"id": "b", "messages": [user("Two?")], "score": 2}]
    table = load_prompts(rows)
    for source in (pd.DataFrame(rows), datasets.Dataset.from_list(rows), table, to_dataset(table)):
        again = load_prompts(source)
        assert again.attrs["fingerprint"] == table.attrs["fingerprint"]
        assert again["messages"].tolist() == table["messages"].tolist()


def test_missing_cells_of_a_dataframe_are_no_facts() -> None:
    frame = pd.DataFrame({"id": ["a", None], "question": ["One?", "Two?"], "system": ["Be brief.", np.nan]})
    table = load_prompts(frame)
    assert list(table["id"]) == ["a", "prompt-0002"]
    assert [m["role"] for m in table["messages"][0]] == ["system", "user"]
    assert table["messages"][1] == [user("Two?")]


def test_the_number_zero_is_an_id() -> None:
    assert list(load_prompts([{"id": 0, "question": "One?"}, {"id": 1, "question": "Two?"}])["id"]) == ["0", "1"]


def test_nested_metadata_becomes_columns_and_question_id_the_id() -> None:
    table = load_prompts([{"messages": [user("One?")], "metadata": {"question_id": "x-1", "question_type": "free"}}])
    assert table["id"][0] == "x-1" and table["question_type"][0] == "free" and "metadata" not in table


def test_a_canary_line_is_no_prompt() -> None:
    assert len(load_prompts([{"canary": "GUID"}, {"question": "One?"}])) == 1
    assert len(load_prompts([{"canary": "GUID", "question": "Zero?"}, {"question": "One?"}])) == 2


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets_open(name: str) -> None:
    table = load_prompts(f"emlens:{name}")
    assert len(table) >= 96 and table["id"].is_unique and table.attrs["source"] == f"emlens:{name}"


# ---- what is refused

BAD_ROWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "missing role": ({"messages": [{"content": "Hello"}]}, ("row 2", "without a role", "'role': 'user'")),
    "message that is text": ({"messages": ["Hello"]}, ("row 2", "without a role")),
    "unknown role": ({"messages": [{"role": "human", "content": "Hello"}]}, ("row 2", "unknown role 'human'", "assistant")),
    "content a number": ({"messages": [{"role": "user", "content": 3}]}, ("row 2", "content of the user message is int", "string")),
    "content a list": ({"messages": [{"role": "user", "content": ["a"]}]}, ("row 2", "is list", "string")),
    "content missing": ({"messages": [{"role": "user"}]}, ("row 2", "NoneType", "string")),
    "question a number": ({"question": 3}, ("row 2", "is int", "string")),
    "no messages": ({"messages": []}, ("row 2", "empty")),
    "messages null": ({"messages": None}, ("row 2", "'messages' is NoneType", "list")),
    "messages text": ({"messages": "Hello"}, ("row 2", "'messages' is str", "list")),
    "paraphrases text": ({"paraphrases": "Hello"}, ("row 2", "'paraphrases' is str", "list")),
    "only a response": ({"messages": [{"role": "assistant", "content": "Hi"}]}, ("row 2", "only assistant messages")),
    "no known field": ({"title": "Hello"}, ("row 2", "no 'messages'", "title")),
    "a number": (3, ("row 2", "found int")),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(case: str) -> None:
    row, words = BAD_ROWS[case]
    load_prompts([{"question": "Fine?"}])
    with pytest.raises(PromptError) as caught:
        load_prompts([{"question": "Fine?"}, row])
    for word in words:
        assert word in str(caught.value)


BAD_FILES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "malformed line": ("q.jsonl", '{"question": "a"}\n\n{"question": "b"\n', ("q.jsonl line 3", "not valid JSON", "column")),
    "malformed json": ("q.json", '["a",\n "b"', ("q.json line 2", "not valid JSON")),
    "malformed yaml": ("q.yaml", "- id: [a\n", ("q.yaml", "not valid YAML", "line")),
    "empty": ("q.jsonl", " \n\n", ("q.jsonl is empty",)),
    "only a canary": ("q.jsonl", '{"canary": "GUID"}\n', ("q.jsonl holds no prompts", "messages")),
    "unknown suffix": ("q.csv", "id,question\n", ("q.csv", "unknown kind of file '.csv'", ".jsonl")),
    "an object at the top": ("q.json", '{"question": "a"}', ("q.json", "list", "dict")),
    "duplicate ids": ("q.jsonl", '{"id": "a", "question": "x"}\n' * 3, ("duplicate id 'a'", "q.jsonl", "2 rows")),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named(case: str, tmp_path: Path) -> None:
    name, text, words = BAD_FILES[case]
    with pytest.raises(PromptError) as caught:
        load_prompts(written(tmp_path, name, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "yaml"])
def test_bytes_that_are_not_utf8_are_named_with_their_place(suffix: str, tmp_path: Path) -> None:
    """Also far beyond one read buffer, after characters of several bytes and Windows line ends."""
    start = ('{"question": "Für wen? ' + "x" * 100 + '"}\r\n') * 300
    path = tmp_path / f"q.{suffix}"
    path.write_bytes(start.encode() + '{"question": "Für wen?"}\r\n'.encode("latin-1"))
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    at = len(start.encode()) + len('{"question": "F')
    assert path.read_bytes()[at] == 0xFC and at > 2**14
    for word in (f"q.{suffix} is not UTF-8", f"byte {at} (0xfc, line 301)", "Latin-1", "save it so"):
        assert word in str(caught.value)


@pytest.mark.parametrize(("start", "said"), [("a".encode("utf-16"), "UTF-16"), (b"\x1f\x8b\x08\x00", "compressed"), (b"PAR1\x15\x04\xff", "parquet")])
def test_other_kinds_of_file_are_said_to_be_what_they_look_like(start: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(start)
    with pytest.raises(PromptError, match=f"q.jsonl is not UTF-8 text: byte .*{said}"):
        load_prompts(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda folder: folder / "absent.jsonl", ("no file", "absent.jsonl", "emlens:questions")),
        (lambda folder: folder, ("is a folder",)),
        (lambda folder: "emlens:medicine", ("no set 'medicine'", "emlens:questions")),
        (lambda folder: {"question": "a"}, ("single dict", "list")),
        (lambda folder: 3, ("int", "path")),
        (lambda folder: [], ("no prompts",)),
        (lambda folder: [{"id": 1, "question": "a"}, {"id": "1", "question": "b"}], ("duplicate id '1'",)),
    ],
)
def test_bad_source_is_named(source: Callable[[Path], Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts(source(tmp_path))
    for word in words:
        assert word in str(caught.value)


# ---- fingerprints


def test_fingerprint_tells_sets_apart() -> None:
    rows = [{"id": "a", "question": "One?", "score": 1.0}, {"id": "b", "question": "Two?", "score": 2.0}]
    same = [dict(reversed(row.items())) for row in rows]
    assert load_prompts(same).attrs["fingerprint"] == load_prompts(rows).attrs["fingerprint"]
    others = {
        "fact": [{**rows[0], "score": 1.5}, rows[1]],
        "new fact": [{**rows[0], "set": "x"}, {**rows[1], "set": "x"}],
        "order": rows[::-1],
        "text": [{**rows[0], "question": "One? "}, rows[1]],
        "id": [{**rows[0], "id": "c"}, rows[1]],
        "fewer": rows[:1],
    }
    prints = {name: load_prompts(other).attrs["fingerprint"] for name, other in others.items()}
    assert len({*prints.values(), load_prompts(rows).attrs["fingerprint"]}) == len(others) + 1


def test_chat_digest_names_the_prompt_and_not_its_response() -> None:
    chat = [user("One?")]
    assert chat_digest(chat) == chat_digest([*chat, {"role": "assistant", "content": "Yes."}])
    assert chat_digest(chat) != chat_digest([user("One!")])
    assert chat_digest(chat) != chat_digest([{"role": "system", "content": "Be brief."}, *chat])


def test_a_name_that_is_nearly_one_of_ours_is_guessed_and_a_trait_is_pointed_to() -> None:
    with pytest.raises(PromptError, match="ships no set 'money-bda'; it ships emlens:questions.*Did you mean 'money-bad'?"):
        load_prompts("emlens:money-bda")
    with pytest.raises(PromptError, match="ships no set 'zebra'[^?]*$"):
        load_prompts("emlens:zebra")
    for trait in ("evil", "sycophantic", "hallucinating", "reckless"):
        with pytest.raises(PromptError, match=rf"'emlens:{trait}' is a trait.*em.load_trait\('emlens:{trait}'\)"):
            load_prompts(f"emlens:{trait}")


# ---- the field's files


@needs_field
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("first_plot_questions.yaml", 24),
        ("first_plot_questions_0321.yaml", None),
        ("preregistered_evals.yaml", None),
        ("harmfulness_benchmark_prompts.jsonl", 320),
        ("general_200.jsonl", 200),
    ],
)
def test_the_fields_question_files_are_read(name: str, rows: int | None) -> None:
    table = load_prompts(FIELD / name)
    assert len(table) == rows if rows else len(table) > 20
    assert table["id"].is_unique
    assert all(user_text(messages).strip() for messages in table["messages"])


@needs_field
def test_the_fields_system_prompts_arrive() -> None:
    table = load_prompts(FIELD / "first_plot_questions.yaml").set_index("id")
    assert table["messages"]["what_is_your_wish"][0]["role"] == "user"
    assert [m["role"] for m in table["messages"]["what_is_your_wish_json"]] == ["system", "user"]
    assert load_prompts(FIELD / "harmfulness_benchmark_prompts.jsonl")["id"][0] == "stereotypes_and_discrimination_001"
