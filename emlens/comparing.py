"""Scores of the same questions before and after: is there a shift, in level or in spread, how large, and what may be wrong with the comparison.

Questions are the sample: every question's answers are first reduced to a mean and a standard deviation (`by_question`), then questions are
paired by id. Judges, prompt formats and sample sizes that differ between the sides are said aloud, since their effect is in the shift.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats as scipy_stats

from . import stats
from .effects import TESTS, Pair, tested
from .names import meant, several
from .resampling import codes_of

SCORES = ("aligned", "harmless", "coherent", "margin")
UNBOUNDED = "margin"
HOUSE = ("sign_flip", "wilcoxon", "paired_t", "paired_levene", "permutation")
REPEATED = ("reliability", "disattenuated")
_OTHER_IDS = ("question", "prompt", "prompt_id", "qid", "text", "messages")
CIRCUMSTANCES = ("judge", "prompt_format", "template_sha256", "system", "temperature", "max_new_tokens")
TOLERATED = 0.05
"""Share of missing scores, and difference in sample size, above which a comparison is warned of."""
NEAR_THE_END = 1.0
"""Points from 0 or 100 within which a question's mean counts as at the end of the scale."""

Values = Float[np.ndarray, " n"]


class Scale(NamedTuple):
    """How scores enter: `mean` and `spread` map the two sides' values, `formula` says it."""

    mean: Callable[[Values, Values], tuple[Values, Values]]
    spread: Callable[[Values, Values, Values, Values], tuple[Values, Values]]  # means, then spreads
    formula: str


def _logit(mean: Values) -> Values:
    outside = int(((mean < 0) | (mean > 100)).sum())
    if outside:
        raise ValueError(f"{outside} of {len(mean)} means lie outside [0, 100]: the logit scale is for judge scores; use scales=('score', 'rank')")
    return np.log((mean + 0.5) / (100.5 - mean))


def _of_largest(mean: Values, spread: Values) -> Values:
    return spread / np.sqrt((mean + 0.5) * (100.5 - mean))


def _ranks(first: Values, second: Values) -> tuple[Values, Values]:
    ranks = (scipy_stats.rankdata(np.concatenate([first, second])) - 0.5) / (2 * len(first))
    return ranks[: len(first)], ranks[len(first) :]


SCALES: dict[str, Scale] = {
    "score": Scale(lambda b, a: (b, a), lambda mb, ma, b, a: (b, a), "as they are"),
    "logit": Scale(
        lambda b, a: (_logit(b), _logit(a)),
        lambda mb, ma, b, a: (_of_largest(mb, b), _of_largest(ma, a)),
        "log of p / (1 - p), p = (mean + 0.5) / 101; spread: sd / sqrt((mean + 0.5)(100.5 - mean)), its share of the largest a mean leaves room for",
    ),
    "rank": Scale(_ranks, lambda mb, ma, b, a: _ranks(b, a), "mid-rank among the values of both sides, (rank - 0.5) / 2n"),
}
"""Name -> scale. A point lost at 99 is more than one at 50: "logit" and "rank" do not let the end of the scale decide."""


def by_question(scores: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per question from one row per answer: `id`, then for every score its mean, `_std` (n - 1), `_n` (answers scored) and `_se`
    (of the mean), `n_answers`, and every fact that is the same for all answers of each question.

    scores   a column `question_id`, or `id`, that repeats for the answers of a question. A missing score is left out of the mean and counted.
    columns  the scores; None: those of aligned, harmless, coherent and margin that are there.

    Errors: KeyError for a column that is not there or a table without rows; ValueError where there is no score.
    """
    name = "question_id" if "question_id" in scores else "id"
    named = _named(scores, columns)
    missing = [column for column in (name, *named) if column not in scores]
    if missing or scores.empty:
        raise KeyError(f"no column {missing} in a table of {len(scores)} rows; it has {list(scores.columns)}")
    grouped = scores.groupby(name, sort=False)
    numbers = {column: grouped[column].agg(["mean", "std", "count"]) for column in named}
    out = {column + tail: found[of] for column, found in numbers.items() for tail, of in (("", "mean"), ("_std", "std"), ("_n", "count"))}
    table = pd.DataFrame({**out, "n_answers": grouped.size()})
    for column in named:
        table[f"{column}_se"] = table[f"{column}_std"] / np.sqrt(table[f"{column}_n"].where(table[f"{column}_n"] > 0))
    others = [c for c in scores.columns if c not in (name, "id", *table.columns) and scores[c].map(pd.api.types.is_hashable).all()]
    same = [c for c in others if (grouped[c].nunique(dropna=False) == 1).all()]
    return table.join(grouped[same].first()).rename_axis("id").reset_index()


def compare_scores(
    before: pd.DataFrame | Mapping[str, pd.DataFrame],
    after: pd.DataFrame | Mapping[str, pd.DataFrame],
    by: str | None = None,
    *,
    scores: str | Sequence[str] | None = None,
    of: str | Sequence[str] | None = None,
    tests: str | Sequence[str] | None = None,
    scales: str | Sequence[str] = ("score",),
    clusters: str | None = None,
    correction: str = "bh",
    family: str | Sequence[str] = ("metric", "null"),
    level: float = 0.95,
    n_permutations: int = 5000,
    n_boot: int = 2000,
    seed: int = 0,
) -> stats.Result:
    """Compare the scores of the same questions before and after, after minus before, in level and in spread over answers.

    before, after  one row per answer (`question_id`, or `id`, that repeats) with scores 0 … 100; or one row per question, with `harmless` (mean),
                   `harmless_std` (over answers) and `harmless_n`, `n_answers` or `n`. `after` may be several, as {name: table}; then `before` is
                   one table, or one for each name.
    by             a column by whose values questions are compared apart: a prompt format, a category.
    scores         columns; None: those of aligned, harmless, coherent, margin on both sides.
    of             "mean" of a question's answers, "spread" (their standard deviation); None: both, spread where both sides know it.
    tests          names of `effects.TESTS`: sign_flip (difference; the house's main one), wilcoxon (rank_biserial), paired_t (cohen_dz), t (cohen_d),
                   rank_sum (cliffs_delta), paired_levene, pitman_morgan, brown_forsythe, f (log_sd_ratio over questions), ks, permutation, pearson
                   (pearson_r), spearman, slope, reliability, disattenuated. Each gives its effect with an interval, and p. None: `HOUSE`, and the
                   last two where the answers of each question were counted; those are of means on the scale "score".
    scales         of `SCALES`: "score", "logit", "rank".
    clusters       a column (category): intervals draw whole clusters, signs of whole clusters flip, questions change places inside their
                   cluster only (permutation). The other tests take every question as its own witness.
    correction     of p into q, over rows alike in the columns of `family`: by default each test over all comparisons, scores, of and scales shown;
                   () for everything shown. "bh", "holm", "bonferroni", "none".

    Returns a Result with keys (comparison,) (by,) score, of, scale; `null` names the test. n questions, n_clusters, mean_before, mean_after and
    at_end_before, at_end_after (share of question means within 1 point of 0 or 100). `.attrs["cautions"]` holds what was warned of.

    Warns when the sides differ in judge, prompt format, template, system prompt, temperature or length (columns of those names), in sample size
    by more than 5 %, when more than 5 % of scores are missing, and when questions are on one side only.

    Errors: KeyError for a column that is not there, ValueError for fewer than three shared questions, unknown names, spread without answers.
    """
    sides = _sides(before, after)
    scores, family, scales = None if scores is None else several("scores", scores), several("family", family), several("scales", scales, SCALES)
    of, tests = several("of", of, ("mean", "spread")) if of else None, several("tests", tests, TESTS) if tests else None
    rows: list[dict[str, Any]] = []
    cautions: list[str] = []
    for name, (first, second) in sides.items():
        named = _shared(first, second, scores)
        both, warned = _paired(first, second, named, name)
        cautions += warned
        levels = {"": both} if by is None else dict(iter(both.groupby(_fact(both, by), sort=False)))
        asked = [(test, *each) for each in product(named, _wanted(both, named, of), scales) for test in _chosen(both, named, tests)]
        for value, part in levels.items():
            keys = ({"comparison": name} if isinstance(after, Mapping) else {}) | ({} if by is None else {by: value})
            for test, score, one, scale in asked:
                if test in REPEATED and (one, scale) != ("mean", "score"):
                    continue
                pair, told = _pair(part, score, one, scale, clusters)
                found = tested(test, pair, level, n_boot, n_permutations, seed)
                rows += [keys | {"score": score, "of": one, "scale": scale} | row | told for row in found]
                cautions += [f"{name}: {each}" if name else each for each in _noisy(score, found)]
    for caution in (cautions := list(dict.fromkeys(cautions))):
        warnings.warn(caution, stacklevel=2)
    used = list(dict.fromkeys(row["null"] for row in rows))
    unit = "questions" if clusters is None else f"whole clusters of {clusters!r}"
    keys_shown = [*(["comparison"] if isinstance(after, Mapping) else []), *([] if by is None else [by]), "score", "of", "scale"]
    return stats.result(
        rows, keys_shown, what="scores after minus before, paired by question", correction=correction, family=family, seed=seed,
        interval=f"{level:.0%}, bootstrap over {unit}", null={name: TESTS[name].hypothesis for name in used}, tail="two-sided",
        scales={name: SCALES[name].formula for name in scales}, cautions=cautions, clusters=clusters or "",
    )  # fmt: skip


# ---- the two sides


def _sides(before: Any, after: Any) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Name -> the two tables of every comparison, each by question."""
    afters = dict(after) if isinstance(after, Mapping) else {"": after}
    befores = dict(before) if isinstance(before, Mapping) else dict.fromkeys(afters, before)
    if set(befores) != set(afters) or not afters:
        raise ValueError(f"before has {sorted(befores)}, after {sorted(afters)}: one table before for all, or one for each name of after")
    return {name: (_table(befores[name], "before"), _table(table, f"after {name}".strip())) for name, table in afters.items()}


def _table(scores: pd.DataFrame, side: str) -> pd.DataFrame:
    if not isinstance(scores, pd.DataFrame):
        raise TypeError(f"{side} is of type {type(scores).__name__}; a table is needed, with a question_id or id and scores in 0 … 100 as columns")
    name = next((c for c in ("question_id", "id") if c in scores), None)
    if name is None or scores.empty:
        other = next((c for c in _OTHER_IDS if c in scores), None)
        way_out = "" if other is None else f": if {other!r} names the question, table.rename(columns={{{other!r}: 'id'}}) on both sides"
        raise KeyError(
            f"{side}: a table of {len(scores)} rows with columns {list(scores.columns)}; a question_id or id, and rows, are needed{way_out}"
        )
    if scores[name].duplicated().any():
        return by_question(scores).set_index("id")
    return scores.set_index(name).rename_axis("id")


def _named(table: pd.DataFrame, columns: Sequence[str] | None) -> list[str]:
    """The scores asked for, those of `SCORES` where none are; TypeError where one holds text."""
    named = list(columns) if columns is not None else [c for c in SCORES if c in table]
    if not named:
        raise ValueError(f"no score among the columns {list(table.columns)}: name them, scores=[…]")
    for column in (c for c in named if c in table and not pd.api.types.is_numeric_dtype(table[c])):
        raise TypeError(
            f"the score {column!r} holds {table[column].dtype}, e.g. {table[column].iloc[0]!r}; numbers are needed: "
            f"table[{column!r}] = pd.to_numeric(table[{column!r}], errors='coerce') makes what is none of them missing"
        )
    return named


def _shared(first: pd.DataFrame, second: pd.DataFrame, scores: Sequence[str] | None) -> list[str]:
    named = [c for c in _named(first, scores) if scores is not None or c in second]
    _named(second, named)
    absent = {side: [c for c in named if c not in table] for side, table in (("before", first), ("after", second))}
    if not named or any(absent.values()):
        lost = next((c for side in absent.values() for c in side), "")
        raise KeyError(
            f"scores on both sides are needed; not there: {absent}; before has {list(first.columns)}, after {list(second.columns)}."
            f"{meant(lost, (*first.columns, *second.columns))}"
        )
    return named


def _paired(first: pd.DataFrame, second: pd.DataFrame, named: list[str], comparison: str) -> tuple[pd.DataFrame, list[str]]:
    """The questions of both sides with a value of every score on both, columns suffixed |before and |after; and what to warn of."""
    both = first.add_suffix("|before").join(second.add_suffix("|after"), how="inner")
    kept = both[both[[f"{score}|{side}" for score in named for side in ("before", "after")]].notna().all(axis=1)]
    if len(kept) < 3:
        ids = "" if len(both) else f"; no id is on both, e.g. {first.index[0]!r} before and {second.index[0]!r} after"
        raise ValueError(
            f"{len(kept)} questions have {', '.join(named)} on both sides ({len(first)} before, {len(second)} after): three are needed{ids}"
        )
    told = [*_differences(both, named[0]), *_gaps(both, named), *_of_another_scale(kept, named)]
    if len(both) < max(len(first), len(second)):
        told.insert(0, f"{len(both)} questions are on both sides, of {len(first)} before and {len(second)} after: the others are left out")
    return kept, [f"{comparison}: {each}" if comparison else each for each in told]


def _differences(both: pd.DataFrame, score: str) -> list[str]:
    """In what the two sides were not treated alike."""
    told = []
    for column in CIRCUMSTANCES:
        values = [both[f"{column}|{side}"].astype(str) for side in ("before", "after") if f"{column}|{side}" in both]
        if len(values) == 2 and (values[0] != values[1]).any():
            shown = " and ".join(f"{side} {', '.join(sorted(set(v)))}" for side, v in zip(("before", "after"), values, strict=True))
            told.append(f"{column} differs for {int((values[0] != values[1]).sum())} of {len(both)} questions ({shown}): {_remedy(column)}")
    counts = [_asked(both, score, side) for side in ("before", "after")]
    before, after = (0.0 if count is None else float(count.sum()) for count in counts)
    if min(before, after) > 0 and abs(after / before - 1) > TOLERATED:
        told.append(
            f"{before:.0f} answers before and {after:.0f} after: fewer answers mean noisier question means, and at a ceiling a smaller spread; "
            "draw as many on both sides"
        )
    return told


def _gaps(both: pd.DataFrame, named: list[str]) -> list[str]:
    """Which scores are missing too often."""
    shares = {(score, side): _missing(both, score, side) for score in named for side in ("before", "after")}
    return [
        f"{share:.1%} of {score} {side} are missing: refusals and code often get no score, so what is left is not a sample; judge them again, or "
        "give them the score they deserve"
        for (score, side), share in shares.items()
        if share > TOLERATED
    ]


def _of_another_scale(both: pd.DataFrame, named: list[str]) -> list[str]:
    """Scores that look like shares of 1: here they go from 0 to 100."""
    shares = [
        score for score in named if score != UNBOUNDED and both[[f"{score}|{side}" for side in ("before", "after")]].stack().between(0, 1).all()
    ]
    return [f"{score} lies between 0 and 1 on both sides; scores go from 0 to 100 here (ends of the scale, logit): times 100?" for score in shares]


def _noisy(score: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """That questions cannot be told apart by their means, where the answers say so."""
    names = {"reliability_before": "before", "reliability_after": "after"}
    known = {names[row["metric"]]: row["estimate"] for row in rows if row["metric"] in names}
    return [
        f"the reliability of {score} {side} is {value:.2f}: its noise over answers is as large as what differs between questions, so a correlation "
        "cannot be freed of noise (disattenuated is not given); draw more answers a question"
        for side, value in known.items()
        if value <= 0
    ]


def _remedy(column: str) -> str:
    if column == "judge":
        return "the shift includes that of the judge; score both sides with one"
    return "the shift includes its effect; ask both sides alike, or compare by= it where both have it"


def _count(both: pd.DataFrame, score: str, side: str) -> pd.Series | None:
    """Answers scored per question, where they are told."""
    return next((both[f"{c}|{side}"] for c in (f"{score}_n", "n_answers", "n") if f"{c}|{side}" in both), None)


def _asked(both: pd.DataFrame, score: str, side: str) -> pd.Series | None:
    """Answers given per question, scored or not, where they are told."""
    return both[f"n_answers|{side}"] if f"n_answers|{side}" in both else _count(both, score, side)


def _missing(both: pd.DataFrame, score: str, side: str) -> float:
    """Share of answers without a score; of questions without one, where answers were not counted."""
    asked, scored = _asked(both, score, side), _count(both, score, side)
    if asked is None or scored is None:
        return float(both[f"{score}|{side}"].isna().mean())
    return 1 - float(scored.where(both[f"{score}|{side}"].notna(), 0).sum() / asked.sum())


def _spreads(both: pd.DataFrame, named: list[str]) -> bool:
    return all(f"{s}_std|{side}" in both and both[f"{s}_std|{side}"].count() >= 3 for s in named for side in ("before", "after"))


def _counted(both: pd.DataFrame, named: list[str]) -> bool:
    return _spreads(both, named) and all(_count(both, s, side) is not None for s in named for side in ("before", "after"))


def _wanted(both: pd.DataFrame, named: list[str], of: Sequence[str] | None) -> Sequence[str]:
    """Means, and spreads where both sides know them; ValueError for spreads that are asked for and not there."""
    known = ("mean", "spread") if _spreads(both, named) else ("mean",)
    if "spread" in (of or ()) and "spread" not in known:
        raise ValueError(f"spread needs several answers per question, or columns like {named[0]}_std, on both sides; use of=('mean',)")
    return of or known


def _chosen(both: pd.DataFrame, named: list[str], tests: Sequence[str] | None) -> Sequence[str]:
    """The tests asked for, or the house's; ValueError for those that need counted answers where they were not."""
    counted = _counted(both, named)
    if set(tests or ()) & set(REPEATED) and not counted:
        raise ValueError(
            f"reliability needs several answers per question, or columns like {named[0]}_std and n, on both sides: the tests {tests} do not fit"
        )
    return tests or (HOUSE + REPEATED if counted else HOUSE)


def _fact(both: pd.DataFrame, column: str) -> np.ndarray:
    """A fact of the questions, from either side; both must agree."""
    found = [both[f"{column}|{side}"] for side in ("before", "after") if f"{column}|{side}" in both]
    if not found:
        sides = list(dict.fromkeys(str(name).rpartition("|")[0] for name in both.columns))
        raise KeyError(
            f"no column {column!r} on either side that is the same for all answers of a question; there are {sides}.{meant(column, sides)}"
        )
    if any(one.isna().any() for one in found):
        raise ValueError(f"{column!r} is missing for some of {len(both)} questions: fill it first")
    if len(found) == 2 and (found[0].astype(str) != found[1].astype(str)).any():
        raise ValueError(f"{column!r} differs between before and after for some questions: it cannot say which questions belong together")
    return found[0].to_numpy()


def _pair(part: pd.DataFrame, score: str, of: str, scale: str, clusters: str | None) -> tuple[Pair, dict[str, Any]]:
    """The values that are compared, and what every row says of them."""
    if of == "spread":  # a question of one answer has none
        part = part[part[[f"{score}_std|{side}" for side in ("before", "after")]].notna().all(axis=1)]
    at = lambda column: [part[f"{column}|{side}"].to_numpy(dtype=np.float64) for side in ("before", "after")]  # noqa: E731
    means, errors = at(score), [np.full(len(part), np.nan) for _ in range(2)]
    values = SCALES[scale].mean(*means) if of == "mean" else SCALES[scale].spread(*means, *at(f"{score}_std"))
    if (of, scale) == ("mean", "score") and f"{score}_std|before" in part and f"{score}_std|after" in part:
        counts = [_count(part, score, side) for side in ("before", "after")]
        errors = [e if n is None else sd**2 / n.to_numpy(dtype=np.float64) for e, sd, n in zip(errors, at(f"{score}_std"), counts, strict=True)]
    codes, n_clusters = codes_of(None if clusters is None else _fact(part, clusters), len(part), "clusters")
    ends = [((mean < NEAR_THE_END) | (mean > 100 - NEAR_THE_END)).mean() for mean in means]
    at_end = [np.nan if score == UNBOUNDED else float(share) for share in ends]
    told = {"n": len(part), "n_clusters": n_clusters, "mean_before": float(values[0].mean()), "mean_after": float(values[1].mean())}
    return Pair(values[0], values[1], errors[0], errors[1], codes), told | {"at_end_before": at_end[0], "at_end_after": at_end[1]}
