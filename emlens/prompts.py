"""Prompt sets as DataFrames: read the field's formats, check them, fingerprint them, render a chat exactly once.

A prompt set has one row per prompt: ``id`` (unique text), ``messages`` (list of ``{"role", "content"}``), and every other fact as a
column. A last message of role *assistant* is a response; everything before it is the prompt.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .names import meant

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "user", "assistant", "tool", "developer")

BUILT_IN = ("questions", "money-bad", "money-sound", "repair-bad", "repair-sound")
"""Our own sets, opened as ``emlens:<name>``; ``emlens/data/*.md`` are their cards."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
"""The documented template for base models that have none (``chat_template="plain"``); ``load_model`` puts the BOS token in front of it where
the tokenizer begins every text with one."""


class PromptError(ValueError):
    """A prompt set that cannot be used; the message says which row, what was found, and what is needed."""


def load_prompts(source: Any, *, name: str | None = None) -> pd.DataFrame:
    """Read prompts into one table.

    Args:
        source: ``"emlens:<set>"`` (ours), a path to JSONL (chat rows ``{"messages": […]}`` as for fine-tuning; or ``question`` / ``prompt``),
            to a YAML question file (Betley et al.: ``id``, ``paraphrases``, optional ``system``) or JSON list; or a list of strings or dicts, a
            DataFrame, or a ``datasets.Dataset``.
        name: what generated ids begin with (default: the file's stem, or ``prompt``).

    Returns:
        DataFrame with ``id``, ``messages`` and every other field as a column; ``attrs`` hold ``source`` and ``fingerprint`` (SHA-256).

    Raises:
        PromptError: malformed line (its number), bytes that are not UTF-8 (the first), empty file, missing role, non-string content, duplicate ids.
    """
    stem, said = name or "prompt", "a list"
    if isinstance(source, str) and source.startswith("emlens:"):
        stem, said = source.removeprefix("emlens:"), source
        rows = _built_in(stem)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        stem, said = name or path.stem, path.name
        rows = _read_file(path)
    elif isinstance(source, pd.DataFrame):
        said, rows = "a DataFrame", source.to_dict("records")
    elif isinstance(source, Mapping):
        raise PromptError("a single dict was given; a list of prompts is needed: [ {...} ]")
    elif isinstance(source, Iterable):
        rows = list(source)
    else:
        raise PromptError(f"cannot read prompts from {type(source).__name__}; give a path, list, DataFrame or datasets.Dataset")
    entries = [entry for i, row in enumerate(rows) for entry in _normalise(row, i, said)]
    if not entries:
        raise PromptError(f"{said} holds no prompts. A prompt is a row with 'messages', 'question' or 'prompt'.")
    for i, entry in enumerate(entries):
        entry.setdefault("id", f"{stem}-{i + 1:04d}")
    table = pd.DataFrame(entries)
    table = table[["id", "messages", *[c for c in table.columns if c not in ("id", "messages")]]]
    if table["id"].duplicated().any():
        twice = table["id"][table["id"].duplicated()].iloc[0]
        raise PromptError(f"duplicate id {twice!r} in {said}: {int(table['id'].duplicated().sum())} rows repeat an id. Give each prompt its own.")
    table.attrs = {"source": said, "fingerprint": fingerprint(table)}
    return table


def to_dataset(prompts: pd.DataFrame) -> "Dataset":
    """The same rows as a ``datasets.Dataset`` (for trl, transformers, the hub)."""
    from datasets import Dataset

    return Dataset.from_list(prompts.to_dict("records"))


def _built_in(name: str) -> list[Any]:
    if name not in BUILT_IN:
        if (resources.files("emlens") / "data" / "traits" / f"{name}.json").is_file():
            raise PromptError(f"'emlens:{name}' is a trait, not a set of prompts: open it with em.load_trait('emlens:{name}')")
        ships = ", ".join("emlens:" + n for n in BUILT_IN)
        raise PromptError(f"emlens ships no set {name!r}; it ships {ships}.{meant(name, BUILT_IN)}")
    with resources.as_file(resources.files("emlens") / "data" / f"{name.replace('-', '_')}.jsonl") as path:
        return _read_file(path)


def _read_file(path: Path) -> list[Any]:
    if not path.exists():
        raise PromptError(f"no file {str(path)!r}. Give a path, or one of {', '.join('emlens:' + n for n in BUILT_IN)}.")
    if path.is_dir():
        raise PromptError(f"{str(path)!r} is a folder; a .jsonl, .json or .yaml file is needed")
    text = _text(path)
    if not text.strip():
        raise PromptError(f"{path.name} is empty; at least one row is needed")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            rows = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PromptError(f"{path.name} is not valid YAML: {error}") from error
    elif path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path.name} line {error.lineno}: not valid JSON ({error.msg})") from error
    elif path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise PromptError(f"{path.name} line {number}: not valid JSON ({error.msg}, column {error.colno})") from error
    else:
        raise PromptError(f"{path.name}: unknown kind of file {path.suffix!r}; .jsonl, .json, .yaml and .yml are read")
    if not isinstance(rows, list):
        raise PromptError(f"{path.name}: a list of prompts is needed at the top, found {type(rows).__name__}")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        if error.object.startswith((b"\xff\xfe", b"\xfe\xff")):
            looks = "it begins as UTF-16 does"
        elif error.object.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1")):
            looks = "it begins as a compressed or parquet file does"
        else:
            looks = "an older encoding, like Latin-1 or Windows-1252?"
        raise PromptError(
            f"{path.name} is not UTF-8 text: byte {error.start} (0x{error.object[error.start]:02x}, line {line}) fits no character ({looks}). "
            "Prompt files are read as UTF-8: save it so, or open it yourself and give load_prompts the list of rows."
        ) from error


def _normalise(row: Any, index: int, source: str) -> list[dict[str, Any]]:
    """One source row as zero (a canary), one, or several (paraphrases) table rows."""
    where = f"{source}, row {index + 1}"
    if isinstance(row, str):
        return [{"messages": [{"role": "user", "content": row}]}]
    if not isinstance(row, Mapping):
        raise PromptError(f"{where}: a string or an object is needed, found {type(row).__name__}")
    facts = dict(row)
    if isinstance(facts.get("metadata"), Mapping):
        facts = {**facts.pop("metadata"), **facts}
    if set(facts) == {"canary"}:
        return []
    identity = next((facts[c] for c in ("id", "question_id") if not _absent(facts.get(c))), None)
    facts.pop("id", None)
    if "messages" in facts:
        chats = [_listed(facts.pop("messages"), "messages", where)]
    elif "paraphrases" in facts:
        chats = [[{"role": "user", "content": text}] for text in _listed(facts.pop("paraphrases"), "paraphrases", where)]
    else:
        text = next((facts[c] for c in ("question", "prompt", "text", "user") if c in facts), None)
        if text is None:
            raise PromptError(f"{where}: no 'messages', 'paraphrases', 'question' or 'prompt' among its fields {sorted(facts)}")
        chats = [[{"role": "user", "content": text}]]
        answer = next((facts[c] for c in ("response", "answer", "completion") if isinstance(facts.get(c), str)), None)
        if answer is not None:
            chats[0].append({"role": "assistant", "content": answer})
    system = facts.pop("system", None)
    system = None if _absent(system) else system
    out = []
    for j, chat in enumerate(chats):
        if system and not any(isinstance(m, Mapping) and m.get("role") == "system" for m in chat):
            chat = [{"role": "system", "content": system}, *chat]
        entry = {"messages": _check(chat, where), **facts}
        if identity is not None:
            entry = {"id": str(identity) if len(chats) == 1 else f"{identity}#{j}", **entry}
        out.append(entry)
    return out


def _absent(value: Any) -> bool:
    """None, empty text, or the NaN by which a DataFrame marks a missing cell; the number 0 is a value."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _listed(value: Any, field: str, where: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise PromptError(f"{where}: {field!r} is {type(value).__name__}; a list is needed")
    return list(value)


def _check(messages: Sequence[Any], where: str) -> list[dict[str, str]]:
    if not messages:
        raise PromptError(f"{where}: 'messages' is empty; at least one user message is needed")
    checked = []
    for m in messages:
        if not isinstance(m, Mapping) or "role" not in m:
            raise PromptError(f"{where}: a message without a role: {str(m)[:80]!r}. Needed: {{'role': 'user', 'content': '…'}}")
        if m["role"] not in ROLES:
            raise PromptError(f"{where}: unknown role {m['role']!r}; roles are {', '.join(ROLES)}")
        if not isinstance(m.get("content"), str):
            raise PromptError(f"{where}: content of the {m['role']} message is {type(m.get('content')).__name__}; a string is needed")
        checked.append({"role": str(m["role"]), "content": m["content"]})
    if all(m["role"] == "assistant" for m in checked):
        raise PromptError(f"{where}: only assistant messages; a prompt (user message) is needed before the response")
    return checked


def split_response(messages: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], str | None]:
    """``(prompt messages, response or None)``: a last assistant message is the response."""
    chat = [dict(m) for m in messages]
    return (chat[:-1], chat[-1]["content"]) if chat[-1]["role"] == "assistant" else (chat, None)


def user_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Content of the last user message."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def chat_digest(messages: Sequence[Mapping[str, str]]) -> str:
    """16 hex digits that name one prompt's text (without its response)."""
    prompt, _ = split_response(messages)
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def fingerprint(prompts: pd.DataFrame) -> str:
    """SHA-256 over every column of every row: changes when an id, a text, a fact or the order changes."""
    digest = hashlib.sha256()
    for record in prompts.to_dict("records"):
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()
