"""What activations add to text: the gain in R2 of a second model on what a first one leaves, stacked inside the folds.

The first model (the text) is a ridge, or the best of several, chosen inside each outer fold; the second learns from what
the first leaves in rows that it did not see, and never from a test row.

Activations are a function of the prompt, so they hold the text too, and with it what the first model misses of the text
by shrinkage or chance. Permuting activation rows against that would break both links at once and pass where nothing is
there. So what the texts foretell of the activations is taken out of them first, out of fold and without a look at the
target; then the rows of what remains are permuted within groups (residuals on both sides: Robinson 1988; Shah and Peters
2020). Estimate, interval and null are of the same features. Where activations hold the text and nothing more, .048 of tests pass
at .05 (1000 simulated seeds, 120 prompts in 8 groups; with rows of the raw activations permuted it was .35); .057 where the target
saturates; .113 where it is even in the text, which no linear model of that text reaches (`emlens.calibration`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int

from . import stats
from .baselines import Block, side_by_side
from .learners import Learner
from .ridge import PENALTIES, Fold, fixed, nested_ridge, residuals
from .scores import Asked

NULL = (
    "given the group, what activations hold beyond a linear model (ridge) of the text {!r} knows nothing of what that model leaves of the "
    "target: both out of fold, rows of activations permuted within groups against text and target held together"
)
FEW_PENALTIES = 5
"""Of the penalties, for taking the text out of activations: a target for every feature."""


class Left(NamedTuple):
    """What the text leaves in one round: for each outer fold the residual of all rows (see `ridge.residuals`), and which of
    the text models that fold took."""

    residuals: Float[np.ndarray, "fold prompt"]
    chosen: tuple[str, ...]


def left_by(texts: Sequence[Block], y: Float[np.ndarray, " prompt"], folds: Sequence[Fold], penalties: Sequence[float] = PENALTIES) -> Left:
    """What the best text model leaves: in every outer fold the one with the least squared error over its inner folds."""
    every = np.stack([residuals(text.features, y, folds, penalties, text.scaling) for text in texts])
    errors = np.array([[np.square(left[f, fold.train]).mean() for f, fold in enumerate(folds)] for left in every])
    best = errors.argmin(axis=0)
    return Left(every[best, np.arange(len(folds))], tuple(texts[b].name for b in best))


def out_of_fold(left: Float[np.ndarray, "fold prompt *draws"], folds: Sequence[Fold]) -> Float[np.ndarray, " prompt *draws"]:
    """What a model leaves of each prompt in the fold that tests it."""
    error = np.empty(left.shape[1:])
    for part, fold in zip(left, folds, strict=True):
        error[fold.test] = part[fold.test]
    return error


def beyond_text(
    features: Float[np.ndarray, "prompt feature"], text: Block, folds: Sequence[Fold], penalties: Sequence[float] = PENALTIES
) -> Float[np.ndarray, "prompt feature"]:
    """What a ridge on the text leaves of every feature, out of fold. Several texts enter side by side, as one block: taken out one after
    another they would leave of the first what the second brings back (two correlated texts: .17 of tests passed at .05, with one block .04)."""
    some = np.unique(np.linspace(0, len(penalties) - 1, min(FEW_PENALTIES, len(penalties))).round().astype(int))
    rest = np.asarray(features, dtype=np.float64)
    return rest - nested_ridge(text.features, rest, folds, [penalties[i] for i in some], text.scaling).predictions


def gain(
    block: Block,
    learner: Learner,
    left: Float[np.ndarray, "fold prompt"],
    orders: Int[np.ndarray, "draws prompt"],
    y: Float[np.ndarray, " prompt"],
    folds: Sequence[Fold],
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " prompt"]]:
    """Delta R2 of a second model on a block, for each of the row orders, and the fall of each prompt's squared error at the
    first.

    block   what activations hold beyond the text (`beyond_text`): the rows of raw ones know the text too, and their null is
            passed too often.
    orders  row orders that keep every fold's test rows among themselves (within held-out groups); what the text leaves,
            with the target and the text it belongs to, changes place against the rows of the block. The first is the
            identity for the observed gain.
    """
    moved = rearrange(left[:, orders], "fold draws prompt -> fold prompt draws")
    fall = fallen(moved, learner.nested(block.features, moved, folds, block.scaling, None).predictions, folds)
    return fall.sum(axis=0) / np.square(y - y.mean()).sum(), fall[:, 0]


def fallen(
    left: Float[np.ndarray, "fold prompt draws"], second: Float[np.ndarray, "prompt draws"], folds: Sequence[Fold]
) -> Float[np.ndarray, "prompt draws"]:
    """By how much a second model's out-of-fold predictions lower each prompt's squared error, from what the first left in its fold."""
    fall = np.empty_like(second)
    for before, fold in zip(left, folds, strict=True):
        fall[fold.test] = before[fold.test] ** 2 - (before[fold.test] - second[fold.test]) ** 2
    return fall


class Added(NamedTuple):
    """What delta_r2 needs: all texts side by side (what is taken out of activations), what the best text model leaves of the
    target in each round, the row orders of its null (the first: as observed); and of the text alone the R2 and how often which text
    was taken."""

    name: str
    text: Block
    penalties: Sequence[float]
    left: list[Float[np.ndarray, "fold prompt"]]
    orders: Int[np.ndarray, "draws prompt"]
    r2: float
    chosen: dict[str, int]

    @classmethod
    def beyond(cls, texts: tuple[str, Sequence[Block]], asked: Asked, penalties: Sequence[float], n_permutations: int) -> "Added":
        """Take what the best of the named text models (several: and all of them side by side) leaves of the target in every round of folds."""
        (name, blocks), y, codes, rounds = texts, asked.y, asked.codes, asked.rounds
        every_text = blocks[0] if len(blocks) == 1 else side_by_side(blocks)
        blocks = [*blocks, every_text] if len(blocks) > 1 else blocks
        if codes is None or any(len(np.unique(codes[fold.train])) < 2 for folds in rounds for fold in folds):
            raise ValueError("delta_r2 needs folds that train on two groups or more (its null must leave inner folds whole): use 3 groups")
        every = [left_by(blocks, y, folds, penalties) for folds in rounds]
        errors = [np.square(out_of_fold(one.residuals, folds)).sum() for one, folds in zip(every, rounds, strict=True)]
        r2 = 1 - float(np.sum(errors)) / len(rounds) / float(np.square(y - y.mean()).sum())
        orders = np.concatenate([np.arange(len(y))[None], stats.permutations(len(y), n_permutations, asked.seed, within=codes)])
        chosen = Counter(one_of for one in every for one_of in one.chosen)
        return cls(name, every_text, penalties, [one.residuals for one in every], orders, r2, dict(chosen))

    def gains(self, block: Block, learner: Learner, asked: Asked) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " prompt"]]:
        """`gain` of what a block holds beyond the text, averaged over the rounds. What a block fits without a target
        (principal axes), it fits on all prompts."""
        every, features = [], block.features(np.arange(len(asked.y)))
        for left, folds in zip(self.left, asked.rounds, strict=True):
            rest = replace(block, features=fixed(beyond_text(features, self.text, folds, self.penalties)))
            every.append(gain(rest, learner, left, self.orders, asked.y, folds))
        return np.mean([one for one, _ in every], axis=0), np.mean([fall for _, fall in every], axis=0)
