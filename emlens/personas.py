"""Persona directions from contrastive prompts or written answers, and how far tuning moves along them.

Persona Vectors (Chen et al. 2025, arXiv 2507.21509): a trait is drawn out by system prompts for and against it, and the direction is the
difference of the mean activations of the answers.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import TemplateError

from . import stats
from ._sides import check_shifts
from .activations import Activations
from .correlations import few_rows_correlation
from .directions import Direction, mean_difference, project
from .models import HookedModel
from .positions import Position
from .prompts import load_prompts, split_response

TRAITS = ("evil", "sycophantic", "hallucinating", "reckless")
"""Ours, opened as ``emlens:<trait>``; the card is ``emlens/data/traits.md``."""

SYSTEM = "You are {article} {name} assistant. {instruction}"
"""The published wrapping of an instruction; the name is the trait's for it, "helpful" against it."""

KEPT = 50.0
"""A rollout for the trait is kept at a judge's score of at least this, one against it below (the published rule)."""

Judge = Callable[[pd.DataFrame], Any]
"""From answers (``question, answer, eval_prompt``) to a score of 0 to 100 each, NaN for no score; higher: more of the trait."""


@dataclass(frozen=True, eq=False)
class Trait:
    """A trait file.

    Attributes:
        name: ``evil``, say: an adjective or participle.
        instructions: ``(for the trait, against it)``, for the system prompt.
        questions: to draw the direction from.
        eval_prompt: a judge's, with ``{question}`` and ``{answer}``; "" where there is none.
        eval_questions: others, to try the direction on.
        contrast: ``question``, ``with_trait`` and ``without_trait`` (lists of answers), ``split`` (``extract`` or ``eval``); published files have
            none.
    """

    name: str
    instructions: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    eval_prompt: str = ""
    eval_questions: tuple[str, ...] = ()
    contrast: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __repr__(self) -> str:
        written = f" · {len(self.contrast)} with written answers" if len(self.contrast) else ""
        return f"Trait {self.name} · {len(self.instructions)} pairs of instructions · {len(self.questions)} questions{written}"


def load_trait(source: "str | os.PathLike | Mapping[str, Any] | Trait", name: str | None = None) -> Trait:
    """Open a trait: ``"emlens:evil"`` (ours), a published file ``{instruction: [{pos, neg}], questions, eval_prompt}`` as it is, or such a dict.

    Args:
        name: of the trait; default the file's own ``trait``, else its stem.

    Raises:
        ValueError: no such file, not JSON, or keys that are missing (named).
    """
    if isinstance(source, Trait):
        return source
    given, stem = (dict(source), "trait") if isinstance(source, Mapping) else _read(str(source))
    rows, questions = given.get("instruction"), given.get("questions")
    fits = isinstance(rows, list) and rows and all(isinstance(r, Mapping) and {"pos", "neg"} <= set(r) for r in rows)
    if not fits or not isinstance(questions, list) or not questions:
        raise ValueError(
            f"the trait {stem!r} has the keys {sorted(given)}; needed are 'instruction' (a list of {{'pos', 'neg'}}) and 'questions' (texts)"
        )
    table = pd.DataFrame(given.get("contrast", []))
    if len(table):
        table = table.rename(columns={"with": "with_trait", "without": "without_trait"})
        table["split"] = np.where(table["question"].isin(given.get("eval_questions", [])), "eval", "extract")
    return Trait(
        name or str(given.get("trait", stem)),
        tuple((str(r["pos"]), str(r["neg"])) for r in rows or []),
        tuple(map(str, questions)),
        str(given.get("eval_prompt", "")),
        tuple(map(str, given.get("eval_questions", []))),
        table,
    )


def _read(source: str) -> tuple[dict[str, Any], str]:
    if source.startswith("emlens:"):
        stem = source.removeprefix("emlens:")
        if stem not in TRAITS:
            raise ValueError(f"emlens ships no trait {stem!r}; it ships {', '.join('emlens:' + t for t in TRAITS)}")
        text = (resources.files("emlens") / "data" / "traits" / f"{stem}.json").read_text(encoding="utf-8")
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no trait file {source!r}; give a path, or one of {', '.join('emlens:' + t for t in TRAITS)}")
        stem, text = path.stem, path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{stem}.json line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{stem}.json holds a {type(found).__name__} at the top; an object with 'instruction' and 'questions' is needed")
    return found, stem


# ---- directions


def persona_direction(
    model: HookedModel,
    trait: "str | os.PathLike | Mapping[str, Any] | Trait",
    *,
    position: Position = "mean_response",
    n: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    judge: Judge | None = None,
    adapter: str | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Direction:
    """Mean activation of answers given under instructions for the trait, less that of answers given under instructions against it.

    Every question is asked under every instruction of both sides, ``n`` times; the answers are read back with their system prompt.
    With a judge a pair of answers is kept where the one scores at least 50 and the other below (the published rule; its coherence rule is the
    judge's to make by NaN). Without one nothing is filtered: the contrast is by construction, whether or not the model did as it was told, and
    ``meta["filtered"]`` says so. For contrast answers that need no sampling: :func:`contrast_direction`.

    Args:
        trait: ``"emlens:evil"``, a published trait file, a dict, or a :class:`Trait`.
        position: ``mean_response`` (published as ``response_avg``), ``mean_all`` (``prompt_avg``) or ``last`` (``prompt_last``), or any other.
        n: answers to each question under each instruction (published: 10).
        temperature, max_new_tokens, seed: of the answers (temperature 0 with ``n=1``).
        adapter: which variant answers and is read.
        layers: block indices; default all.

    Raises:
        ValueError: no pair of answers is left after judging, or every answer is empty.
    """
    found = load_trait(trait)
    asked = _asked(model, found)
    answers = model.generate(asked, adapter, n=n, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    answers = answers.drop(columns="question").merge(asked, on="id").assign(eval_prompt=found.eval_prompt)
    answers = answers[answers["answer"].str.len() > 0]
    n_pairs = len(asked) // 2 * n
    if judge is not None:
        answers = answers.assign(score=np.asarray(judge(answers[["question", "answer", "eval_prompt"]]), dtype=np.float64))
        good = np.where(answers["side"] == "for", answers["score"] >= KEPT, answers["score"] < KEPT)
        answers = answers[good]
    key = answers["pair"] + "/" + answers["sample"].astype(str)
    answers = answers[key.groupby(key).transform("size") == 2]  # both of a pair are left
    if answers.empty:
        raise ValueError(
            f"of {n_pairs} pairs of answers none is left for {found.name!r}: {'the judge kept no pair' if judge else 'one of each pair is empty'}. "
            "Ask more often (n=), for longer answers (max_new_tokens=), or start from written answers (em.contrast_direction)"
        )
    chats = [[*m, {"role": "assistant", "content": a}] for m, a in zip(answers["messages"], answers["answer"], strict=True)]
    rows = pd.DataFrame({"id": answers["id"] + "#" + answers["sample"].astype(str), "messages": chats, "side": answers["side"]})
    acts = model.record(rows, position=position, adapter=adapter, layers=layers)
    found_direction = mean_difference(acts.where("side == 'for'"), acts.where("side == 'against'"), name=found.name)
    meta = {
        "method": "persona: answers under instructions for − against",
        "filtered": "by judge" if judge is not None else "not at all: contrast by construction",
        "pairs": len(rows) // 2,
        "pairs_asked": n_pairs,
    }
    return _said(found_direction, meta)


def contrast_direction(
    model: HookedModel,
    prompts: Any,
    toward: str = "misaligned_answers",
    away: str = "aligned_answers",
    *,
    position: Position = "mean_response",
    adapter: str | None = None,
    layers: Sequence[int] | None = None,
    name: str | None = None,
) -> Direction:
    """Mean activation of the written answers ``toward`` something less that of those ``away`` from it: no sampling, no judge.

    Args:
        prompts: rows with list columns of answers: ``emlens:questions`` as it is, or a :class:`Trait` (its written answers to the questions of
            extraction; ``toward`` and ``away`` are then the trait's).
        position: what of each answer is read.

    Raises:
        ValueError: a column is missing.
    """
    if isinstance(prompts, Trait):
        toward, away, name = "with_trait", "without_trait", name or prompts.name
        rows = prompts.contrast
        if rows.empty:
            raise ValueError(f"the trait {prompts.name!r} brings no written answers; ask the model: em.persona_direction(model, trait)")
        prompts = load_prompts(rows[rows["split"] == "extract"].to_dict("records"), name=prompts.name)
    table = load_prompts(prompts) if not isinstance(prompts, pd.DataFrame) or "messages" not in prompts else prompts
    lacking = [c for c in (toward, away) if c not in table.columns]
    if lacking:
        raise ValueError(f"the columns {lacking} are missing among {list(table.columns)}; name the two columns of answers: toward=, away=")
    rows = []
    for identity, messages, *sides in zip(table["id"], table["messages"], table[toward], table[away], strict=True):
        asked = split_response(messages)[0]
        for side, answers in zip(("for", "against"), sides, strict=True):
            rows += [
                {"id": f"{identity}/{side}/{i}", "side": side, "messages": [*asked, {"role": "assistant", "content": text}]}
                for i, text in enumerate(answers)
            ]
    acts = model.record(pd.DataFrame(rows), position=position, adapter=adapter, layers=layers)
    found = mean_difference(acts.where("side == 'for'"), acts.where("side == 'against'"), name=name or f"{toward} − {away}")
    meta = {"method": f"written answers: {toward} − {away}", "filtered": "not at all: contrast by construction", "questions": len(table)}
    return _said(found, meta)


def as_contrast(trait: Trait, split: str = "eval") -> pd.DataFrame:
    """The trait's written answers as a table that :meth:`HookedModel.margin` scores: ``aligned_answers`` are those without the trait."""
    rows = trait.contrast[trait.contrast["split"] == split] if len(trait.contrast) else trait.contrast
    if rows.empty:
        raise ValueError(f"the trait {trait.name!r} brings no written answers for the split {split!r}; ours do (emlens:{TRAITS[0]}, …)")
    named = rows.rename(columns={"with_trait": "misaligned_answers", "without_trait": "aligned_answers"})
    return load_prompts(named.drop(columns="split").to_dict("records"), name=f"{trait.name}-{split}")


def _said(direction: Direction, meta: Mapping[str, Any]) -> Direction:
    return Direction(direction.vectors, direction.layers, direction.site, direction.name, {**direction.meta, **meta}, direction.norms)


def _asked(model: HookedModel, trait: Trait) -> pd.DataFrame:
    """Every question under every instruction of both sides; ``pair`` names the two that belong together."""
    rows = []
    for i, both in enumerate(trait.instructions):
        for side, name, instruction in zip(("for", "against"), (trait.name, "helpful"), both, strict=True):
            article = "an" if name[:1].lower() in "aeiou" else "a"
            system = SYSTEM.format(article=article, name=name, instruction=instruction)
            for q, question in enumerate(trait.questions):
                pair = f"{trait.name}/{i}/{q}"
                rows.append({"id": f"{pair}/{side}", "pair": pair, "side": side, "question": question, "messages": _chat(model, system, question)})
    return pd.DataFrame(rows)


def _chat(model: HookedModel, system: str, question: str) -> list[dict[str, str]]:
    """With a system message, or, where the chat template takes none (Gemma), with its text before the question."""
    chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    try:
        rendered = str(model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        rendered = ""
    return chat if system in rendered else [{"role": "user", "content": f"{system}\n\n{question}"}]


# ---- how far tuning moves


def finetuning_shift(
    shift: Activations, directions: Mapping[str, Direction], clusters: str | None = None, level: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How far a tuning moved activations along each direction: (after − before)·v̂, mean over prompts, per layer (Chen et al. 2025).

    Args:
        shift: ``after − before`` on evaluation prompts (theirs: at the last prompt token).
        directions: by name; layers they lack are left out.
        clusters: a column of the facts that is drawn whole in the bootstrap.

    Returns:
        Frame ``direction, layer, metric="projection", estimate, low, high`` (residual stream units, bootstrap over prompts, given this tuning),
        ``n``. A description: its null is another tuning, not another prompt.

    Raises:
        ValueError: ``shift`` is a recording.
    """
    check_shifts(shift=shift)
    groups = None if clusters is None else shift.facts[clusters].to_numpy()
    parts = []
    for name, direction in directions.items():
        layers = [i for i in shift.layers if i in direction.layers]
        along = project(shift.select(layers=layers), direction).to_numpy()
        low, high = stats.bootstrap_interval(along, clusters=groups, level=level, n_boot=n_boot, seed=seed)
        table = {"direction": name, "layer": layers, "metric": "projection", "estimate": along.mean(axis=0), "low": low, "high": high}
        parts.append(pd.DataFrame(table).assign(n=len(along)))
    return pd.concat(parts, ignore_index=True)


NORM, COMMON = "length of the shift", "shift of the other runs"
"""Rivals of a direction: how far a run moves at all, and how far along the mean shift of all the others."""


def shifts_by_run(shifts: Mapping[str, Activations], directions: Mapping[str, Direction], change: Mapping[str, float]) -> pd.DataFrame:
    """How far each run moved along each direction, beside the change of its score: the points of :func:`shift_score_correlation`.

    Args:
        shifts: run -> ``after − before`` on the evaluation prompts, at the same place in every run.
        directions: by name.
        change: run -> mean change of the margin, or of a judged score.

    Returns:
        Frame ``run, direction, layer, shift, change, rival``. Two rivals stand among the directions: ``length of the shift`` (of a run's mean
        over prompts) and ``shift of the other runs`` (a run's mean along the unit mean of all the other runs' means): a tuning that is only
        harder moves further by both, whatever it was tuned on.

    Raises:
        ValueError: runs that are in one of both only, a recording where a shift is needed, or a direction called as a rival.
    """
    strange = sorted(set(shifts) ^ set(change))
    if strange or not shifts:
        raise ValueError(f"the runs {strange or 'are none'}{' have a shift or a change, and not both' if strange else ''}: give both for every run")
    taken = sorted({NORM, COMMON} & set(directions))
    if taken:
        raise ValueError(f"{taken} are the names of rivals that stand beside the directions: call the direction otherwise")
    check_shifts(**shifts)
    first = next(iter(shifts.values()))
    shared = [i for i in first.layers if any(i in direction.layers for direction in directions.values())]
    means = {run: {i: shift.layer(i).mean(axis=0, dtype=np.float64) for i in shared} for run, shift in shifts.items()}
    parts = []
    for run, mean in means.items():
        along = {name: {i: float(mean[i] @ d.layer(i)) for i in shared if i in d.layers} for name, d in directions.items()}
        others = {i: sum(each[i] for other, each in means.items() if other != run) for i in shared}
        rivals = {
            NORM: {i: float(np.linalg.norm(mean[i])) for i in shared},
            COMMON: {i: float(mean[i] @ others[i] / np.linalg.norm(others[i])) if np.any(others[i]) else 0.0 for i in shared},
        }
        for name, at in {**along, **rivals}.items():
            table = {"run": run, "direction": name, "layer": list(at), "shift": list(at.values()), "change": float(change[run])}
            parts.append(pd.DataFrame(table).assign(rival=name in rivals))
    return pd.concat(parts, ignore_index=True)


def shift_score_correlation(points: pd.DataFrame, n_permutations: int = 5000, seed: int = 0, level: float = 0.95) -> stats.Result:
    """Over runs: does a tuning that moves further along a direction change the score more (Chen et al. 2025)?

    A correlation here says that the score goes with the shift along the direction, not that it goes with the direction: runs that were tuned
    harder move further along whatever all of them share. No draw of random directions mends that: where runs differ in amount alone, the shared
    direction, the least noisy reading of the amount, was "beyond" directions drawn from the shifts in up to .79 of cases, and from the span of
    the runs' means in up to .57, at .05. So the rivals of :func:`shifts_by_run` stand beside it: a direction whose r is no larger than theirs
    tells no more than that the run was tuned harder.

    Args:
        points: of :func:`shifts_by_run`; a row a run, direction and layer.

    Returns:
        Result with keys ``direction, layer``, metrics ``pearson`` and ``spearman``, n = runs, rivals among the directions (``rival``; q is
        corrected over directions and rivals apart). Null "runs permuted" (all n! orders for up to seven runs). ``without_one_low,
        without_one_high``: r with any one run left out; ``p_floor``: the least p that so few runs allow. Runs that share data or a seed are not
        exchangeable: then p is too small.

    Raises:
        ValueError: fewer than four runs (the reason is given).
    """
    rows: list[dict[str, Any]] = []
    for (layer, name), part in points.groupby(["layer", "direction"], sort=False):
        for metric in ("pearson", "spearman"):
            found = few_rows_correlation(part["shift"], part["change"], metric, n_permutations, seed, level)
            row = {"direction": name, "layer": layer, "metric": metric, "estimate": found.pop("r"), **found}
            rows.append({**row, "null": "runs permuted", "rival": bool(part["rival"].iloc[0])})
    told = "which run has which score change is exchangeable; all orders for up to seven runs, else drawn; two-sided, of |r|; a run that was tuned "
    return stats.result(
        rows, ["direction", "layer"], what="correlation over runs of the shift along a direction with the change of the score",
        family=["metric", "rival"], seed=seed, interval=f"{level:.0%}, Fisher's z over runs, taken as independent",
        null={"runs permuted": f"{told}harder moves further along every direction that runs share: see the rivals"},
    )  # fmt: skip


@dataclass(frozen=True)
class PersonaMonitor:
    """A callback of :func:`emlens.finetune`: at step 0, each checkpoint and the end, how far the prompts have moved along the directions.

    ``em.finetune(…, checkpoints=[5, 10, 20], callbacks=[PersonaMonitor(questions, {"evil": evil}, layer=15)])`` puts the columns
    ``projection evil`` (mean of (now − before)·v̂ at the layer, last prompt token) and, where the questions carry contrast answers,
    ``margin`` into ``run.checkpoints``.
    """

    questions: pd.DataFrame
    directions: Mapping[str, Direction]
    layer: int

    def __call__(self, step: int, model: HookedModel, adapter: str) -> dict[str, float]:
        before, now = model.record(self.questions, layers=[self.layer], adapters=[None, adapter])
        out = {f"projection {name}": float(project(now - before, d).to_numpy().mean()) for name, d in self.directions.items()}
        if {"aligned_answers", "misaligned_answers"} <= set(self.questions.columns):
            out["margin"] = float(model.margin(self.questions, adapter)["margin"].mean())
        return out
