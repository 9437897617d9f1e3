"""The declared grid: what a study file may say, checked before anything is run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..names import meant
from ..prompts import load_prompts, split_response
from .keys import QUICK, RECIPE, faults, faults_of_run

SHIPPED = Path(__file__).parent

COLUMNS = ("category", "question", "aligned_answers", "misaligned_answers")
"""What a study reads of every question."""

OTHER_TUNINGS, RANDOM_TWIN = "other tunings", "random twin"
BASELINES = ("mean", "category", "length", "tfidf", "tfidf_chars", "embedding", "margin before", OTHER_TUNINGS, RANDOM_TWIN)
"""Rivals of the prediction that a study knows by name; numeric columns of the questions are others. The last two: the same score in the other
runs of the grid, and the same place in a randomly initialised model of the same shape (a second model in memory while it is recorded)."""


class StudyError(ValueError):
    """A study file that cannot be run; the message names the key and what is needed."""


@dataclass(frozen=True)
class Cell:
    """One tuning of the grid."""

    data: str
    domain: str
    content: str
    recipe: Mapping[str, Any]

    @property
    def schedule(self) -> str:
        return str(self.recipe.get("schedule", "linear"))

    @property
    def seed(self) -> int:
        return int(self.recipe.get("seed", 0))

    @property
    def label(self) -> str:
        """``money-bad linear seed 0``: the name of the run in every table, and of its adapter."""
        return f"{self.domain}-{self.content} {self.variation}"

    @property
    def variation(self) -> str:
        """``linear seed 0``: what tells runs on the same rows apart."""
        return f"{self.schedule} seed {self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        return {"run": self.label, "domain": self.domain, "content": self.content, "schedule": self.schedule, "seed": self.seed}


def read_config(source: str | os.PathLike, quick: bool = False) -> dict[str, Any]:
    """A study file (or the name of a shipped one: ``demo``), checked; with ``quick`` its own smaller settings replace the others."""
    path = SHIPPED / f"{source}.yaml" if str(source) in shipped() else Path(source)
    if not path.is_file():
        raise StudyError(f"no study file {str(source)!r}; give a .yaml file, or one of the shipped studies: {', '.join(shipped())}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise StudyError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise StudyError(f"{path.name}: needed are keys like model, questions, tune; found {type(config).__name__}")
    smaller = config.pop(QUICK, None) or {}
    if not isinstance(smaller, dict):
        raise StudyError(f"{path.name}: quick is {smaller!r}: keys to replace are needed under it")
    if quick:
        for key, value in smaller.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) and isinstance(config.get(key), dict) else value
    config = {key: value for key, value in config.items() if value is not None}
    wrong = [*faults(config), *([] if quick else [f"{QUICK}: {fault}" for fault in faults(smaller, whole=False)])]
    if wrong:
        raise StudyError(f"{path.name}: {'; '.join(wrong)} (`emlens study new FILE.yaml` writes a file with every key and a word on each)")
    grid = cells(config)
    if not twins(grid):
        raise StudyError(
            f"{path.name}: none of the runs {[c.label for c in grid]} is a pair; every comparison is of bad advice with its sound twin: name at "
            "least one run with content: bad and one with content: sound, of the same domain, schedule, seed and recipe"
        )
    wrong = faults_of_data(config, grid)
    if wrong:
        raise StudyError(f"{path.name}: {'; '.join(wrong)}")
    return config


def shipped() -> list[str]:
    return sorted(p.stem for p in SHIPPED.glob("*.yaml"))


def cells(config: Mapping[str, Any]) -> list[Cell]:
    """The tunings of the grid, labels unique."""
    runs = config["tune"]["runs"]
    wrong = [fault for i, run in enumerate(runs) for fault in faults_of_run(f"tune.runs[{i}]", run)]
    if wrong:
        raise StudyError("; ".join(wrong))
    shared = {k: v for k, v in config["tune"].items() if k != "runs"}
    out = [Cell(run["data"], run["domain"], run["content"], {**shared, **{k: v for k, v in run.items() if k in RECIPE}}) for run in runs]
    twice = [c.label for c in out if c.recipe.get("steps") is not None and c.recipe.get("epochs") is not None]
    if twice:
        raise StudyError(f"tune: {', '.join(twice)} would have both steps and epochs: one of them is needed (the other may be null in a run)")
    labels = [c.label for c in out]
    if not labels or len(set(labels)) < len(labels):
        raise StudyError(f"tune.runs: {'no run' if not labels else 'two runs have the same domain, content, schedule and seed'}: {labels}")
    return out


def twins(grid: list[Cell]) -> list[tuple[Cell, Cell]]:
    """(bad, sound) pairs that differ in nothing but the content."""
    return [
        (bad, sound)
        for bad in grid
        for sound in grid
        if (bad.content, sound.content) == ("bad", "sound") and bad.domain == sound.domain and bad.recipe == sound.recipe
    ]


PAIR_KINDS = {"seed": "another seed", "schedule": "another schedule", "content": "bad against sound", "domain": "another domain"}
"""What two runs that differ in one thing only are called, in the order of the page: the noise floor first."""


def pair_kind(a: Cell, b: Cell) -> str:
    """The one thing in which two tunings of the grid differ; empty where it is more than one."""
    other = (a.recipe.keys() | b.recipe.keys()) - {"schedule", "seed"}
    differ = {fact for fact in PAIR_KINDS if getattr(a, fact) != getattr(b, fact)} | {k for k in other if a.recipe.get(k) != b.recipe.get(k)}
    if a.data != b.data and not {"content", "domain"} & differ:
        differ.add("data")
    only = differ.pop() if len(differ) == 1 else ""
    return PAIR_KINDS.get(only, f"another {only.replace('_', ' ')}" if only else "")


def same_content(grid: list[Cell]) -> list[tuple[Cell, Cell, str]]:
    """Pairs of runs on the same rows that differ in their seed or schedule alone."""
    found = [(a, b, pair_kind(a, b)) for i, a in enumerate(grid) for b in grid[i + 1 :]]
    return [(a, b, kind) for a, b, kind in found if kind in (PAIR_KINDS["seed"], PAIR_KINDS["schedule"])]


def faults_of_data(config: Mapping[str, Any], grid: list[Cell]) -> list[str]:
    """What is wrong with the files that a study names, and with settings that ask more of them than they hold."""
    sets: dict[str, pd.DataFrame] = {}
    found = []
    for where, source in {"questions": config["questions"], **{f"data of {cell.label}": cell.data for cell in grid}}.items():
        try:
            sets[where] = load_prompts(source)
        except ValueError as error:
            found.append(f"{where}: {error}")
    if found:
        return found
    questions = sets.pop("questions")
    lacking = [column for column in COLUMNS if column not in questions.columns]
    if lacking:
        return [f"questions {config['questions']!r} lack the columns {', '.join(lacking)}, which a study reads of every question"]
    if questions["category"].nunique() < 2:
        found.append("questions are of one category: a study holds whole categories out, so two at least are needed")
    rivals = [*BASELINES, *questions.select_dtypes("number").columns]
    for name in config["predict"]["baselines"]:
        if name not in rivals:
            found.append(f"predict.baselines: unknown {name!r}; known are {', '.join(rivals)}.{meant(name, rivals)}")
    for where, table in sets.items():
        silent = table["id"][[split_response(messages)[1] is None for messages in table["messages"]]]
        if len(silent):
            found.append(f"{where}: row {silent.iloc[0]!r} has no response to be trained on (a last message of role 'assistant')")
    recorded, k = config["record"]["training_prompts"], config["geometry"]["k"]
    fewest = min(recorded, config.get("take", {}).get("questions", len(questions)), len(questions))
    if k >= fewest:
        found.append(f"geometry.k is {k}: fewer dimensions than the {fewest} prompts recorded are needed")
    return found


def questions_of(config: Mapping[str, Any]) -> pd.DataFrame:
    """The question set, or the stated number taken evenly from its categories (``take``)."""
    table = load_prompts(config["questions"])
    taken = config.get("take", {}).get("questions")
    return evenly(table, taken) if taken else table


def training_of(config: Mapping[str, Any], cell: Cell) -> pd.DataFrame:
    """The training file of a run, or its first rows of each split (``take.training_rows`` in all)."""
    table = load_prompts(cell.data)
    taken = config.get("take", {}).get("training_rows")
    if not taken or len(table) <= taken:
        return table
    share = taken / len(table)
    groups = table.groupby("split", sort=False) if "split" in table.columns else [("all", table)]
    out = pd.concat([part.head(max(2, round(len(part) * share))) for _, part in groups])
    out.attrs = {**table.attrs, "source": f"{table.attrs['source']} (first {len(out)} rows)"}
    return out


def evenly(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """``n`` rows, as evenly as can be from every category, the first of each: a stated subset, not a draw."""
    order = table.groupby("category").cumcount().sort_values(kind="stable").index
    return table.loc[order[:n]].sort_index()


def halves(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two halves of the questions with every category in both: even and odd places within the category."""
    place = table.groupby("category").cumcount() % 2
    return table[place == 0], table[place == 1]
