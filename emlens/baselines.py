"""What can be foretold without activations: rival predictors, as feature blocks for the same folds.

Activations before tuning are a function of the prompt. Whatever they foretell must be set against what the prompt's
text, its category, its length or an earlier score foretell in the same folds; these are the rows `layer == -1` of
`em.predict`.

Each baseline is a function of the facts. "mean", "category", "length" and "tfidf" are named here; the name of a numeric
fact ("margin before") is that column as a single feature; and a function facts -> array [prompt] or [prompt, feature]
is a block of your own.
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer

from .activations import Activations
from .prompts import user_text
from .ridge import Features, fixed

DEFAULT = ("mean", "category", "length", "tfidf")
TEXT_COLUMNS = ("messages", "text", "question", "prompt")
Baseline: TypeAlias = str | Callable[[pd.DataFrame], np.ndarray | pd.Series | pd.DataFrame]


@dataclass(frozen=True, eq=False)
class Block:
    """A named feature block, how the ridge is to scale it (`ridge.SCALINGS`), and what to know when reading its row."""

    name: str
    features: Features
    scaling: str
    note: str


def block(baseline: Baseline, facts: pd.DataFrame, category: str | None = None, target: str | None = None) -> Block:
    """Look a baseline up, or make one of a numeric fact or a function.

    baseline  "mean", "category", "length", "tfidf", a numeric column of `facts`, or a function facts -> array.
    facts     one row per prompt.
    category  the column that "category" stands for (the groups, in `em.predict`); None: the column called so.
    target    the fact to be predicted: a fact or function that is the target itself, up to scale, is refused.

    Errors: KeyError for an unknown name (the columns are listed), ValueError for facts that cannot serve.
    """
    found = _look_up(baseline, facts, category)
    if target is not None and (callable(baseline) or baseline in facts.columns):
        y = facts[target].to_numpy(dtype=np.float64)
        for column in found.features(np.arange(len(facts))).T:
            if np.ptp(column) > 0 and abs(np.corrcoef(column, y)[0, 1]) > 1 - 1e-9:
                raise ValueError(f"the baseline {found.name!r} is the target {target!r} itself, up to scale: leave it out")
    return found


def _look_up(baseline: Baseline, facts: pd.DataFrame, category: str | None) -> Block:
    if callable(baseline):
        name = getattr(baseline, "__name__", type(baseline).__name__)
        return Block(name, fixed(_matrix(baseline(facts), len(facts), name)), "each", "features by the caller's function")
    if baseline == "mean":
        note = "the mean target of the training rows"
        return Block("mean", fixed(np.zeros((len(facts), 1))), "each", note)
    if baseline == "category":
        return _category(facts, category or "category")
    if baseline == "length":
        return Block("length", fixed(length(texts(facts))), "each", "characters and words of the prompt")
    if baseline == "tfidf":
        note = "ridge on word TF-IDF, vocabulary and weights fitted on the training rows of every fold"
        return Block("tfidf", tfidf(texts(facts)), "block", note)
    if baseline in facts.columns:
        return _column(facts, baseline)
    known = ", ".join(repr(name) for name in DEFAULT)
    raise KeyError(
        f"unknown baseline {baseline!r}: choose among {known}, a numeric column of the facts {list(facts.columns)}, or pass a function facts -> array"
    )


def text_column(facts: pd.DataFrame) -> tuple[str, list[str | None]] | None:
    """Where the prompts' text stands (the last user message of `messages`, else text, question or prompt) and what it
    says, None where a prompt has none; None when no such column is there."""
    found = next((name for name in TEXT_COLUMNS if name in facts.columns), None)
    if found is None:
        return None
    column = [user_text(cell) for cell in facts[found]] if found == "messages" else list(facts[found])
    return found, [text if isinstance(text, str) and text.strip() else None for text in column]


def texts(facts: pd.DataFrame) -> list[str]:
    """The text of each prompt; ValueError when there is none to read."""
    found = text_column(facts)
    if found is None:
        raise ValueError(
            f"the baselines 'length' and 'tfidf' read the prompt, and the facts {list(facts.columns)} have none of the "
            f"columns {', '.join(TEXT_COLUMNS)}: add one with with_facts, or name other baselines, say "
            "baselines=('mean', 'category')"
        )
    name, column = found
    kept = [text for text in column if text is not None]
    if len(kept) < len(column):
        raise ValueError(
            f"{len(column) - len(kept)} of {len(column)} prompts have no text in {name!r}, first row {column.index(None)}: fill or drop them"
        )
    return kept


def length(prompts: list[str]) -> Float[np.ndarray, "prompt 2"]:
    """Characters and whitespace-separated words of each prompt."""
    return np.array([[len(text), len(text.split())] for text in prompts], dtype=np.float64)


def tfidf(prompts: list[str]) -> Features:
    """Word TF-IDF (sublinear counts, rows of length 1) whose vocabulary and document frequencies come from the training
    rows alone; words they do not hold count for nothing."""

    def features(train: Int[np.ndarray, " train"]) -> Float[np.ndarray, "prompt feature"]:
        vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        vectorizer.fit([prompts[i] for i in train])
        return np.asarray(vectorizer.transform(prompts).todense(), dtype=np.float64)

    return features


def one_hot(labels: pd.Series) -> Float[np.ndarray, "prompt category"]:
    """One column per distinct label."""
    return pd.get_dummies(labels.astype(str)).to_numpy(dtype=np.float64)


def _category(facts: pd.DataFrame, column: str) -> Block:
    if column not in facts.columns:
        raise ValueError(
            f"the baseline 'category' needs the column {column!r}; the facts have {list(facts.columns)}: name it in groups=, "
            "add it with with_facts, or leave 'category' out of baselines="
        )
    if facts[column].isna().any():
        raise ValueError(f"{int(facts[column].isna().sum())} prompts have no {column!r}: fill or drop them")
    return Block("category", fixed(one_hot(facts[column])), "each", f"one indicator per value of {column!r}")


def _column(facts: pd.DataFrame, name: str) -> Block:
    column = facts[name]
    if not pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"the baseline {name!r} is a fact of type {column.dtype}; a number per prompt is needed (for labels, pass a "
            f"function: lambda facts: pd.get_dummies(facts[{name!r}]))"
        )
    return Block(name, fixed(_matrix(column.to_numpy(dtype=np.float64), len(facts), name)), "each", f"the fact {name!r}")


def _matrix(values: np.ndarray | pd.Series | pd.DataFrame, n: int, name: str) -> Float[np.ndarray, "prompt feature"]:
    matrix = np.asarray(values, dtype=np.float64)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or len(matrix) != n or matrix.shape[1] == 0:
        raise ValueError(f"the baseline {name!r} gave shape {matrix.shape}; needed is [{n}] or [{n}, features]")
    if not np.isfinite(matrix).all():
        rows = int((~np.isfinite(matrix)).any(axis=1).sum())
        raise ValueError(
            f"the baseline {name!r} has NaN or Inf in {rows} of {n} rows: fill or drop those prompts, acts.where(acts.facts[{name!r}].notna())"
        )
    return matrix


def copies(values: Float[np.ndarray, "prompt layer d_model"], facts: pd.DataFrame, tolerance: float = 1e-5) -> list[tuple[int, int]]:
    """Pairs of rows that are one prompt twice: the same text (but for case and blanks), or activations that agree to
    `tolerance` of their norm at every layer. A copy in training makes any predictor look as if it foretold."""
    last = values[:, -1].astype(np.float64)
    gram = last @ last.T
    norms = np.diag(gram)
    near = norms[:, None] + norms[None, :] - 2 * gram <= tolerance**2 * norms[:, None]
    pairs = {
        (int(i), int(j))
        for i, j in np.argwhere(np.triu(near, 1))
        if (np.linalg.norm(values[i] - values[j], axis=-1) <= tolerance * np.linalg.norm(values[i], axis=-1)).all()
    }
    found = text_column(facts)
    if found is not None:
        plain = pd.Series([None if text is None else " ".join(text.casefold().split()) for text in found[1]]).dropna()
        for same in plain.groupby(plain).groups.values():
            pairs |= set(itertools.combinations(sorted(int(i) for i in same), 2))
    return sorted(pairs)


def refuse_copies(acts: Activations, codes: Int[np.ndarray, " prompt"] | None, groups: str | None) -> None:
    """ValueError when a prompt and its copy lie in different groups (`codes`, of the fact `groups`): a held-out group is
    then not unseen. Without groups, where folds promise nothing, a UserWarning."""
    pairs = copies(acts.values, acts.facts)
    bad = pairs if codes is None else [pair for pair in pairs if codes[pair[0]] != codes[pair[1]]]
    if not bad:
        return
    one, other = (acts.facts["id"].iloc[i] for i in bad[0])
    found = f"{len(bad)} pairs of prompts are copies (same text or same activations), e.g. {one!r} and {other!r}"
    if codes is not None:
        raise ValueError(f"{found}, and lie in different groups of {groups!r}: drop one of each, or give both one group")
    warnings.warn(f"{found}: plain folds train on copies of what they test; drop them, or use groups=", stacklevel=3)
