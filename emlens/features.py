"""What of the activations a predictor sees: raw rows, squared projections, directions, overlaps, anchors; layers and positions joined.

A `FeatureSet` turns activations into one feature block a layer (or one of several layers), for the folds of `em.predict`.
Blocks are found when a fold asks for them, a layer at a time in float64, so that a recording may fill most of the memory;
whatever is fitted (principal axes, scales) is fitted on the training rows of each fold, or on prompts of your own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from . import _identity
from ._sides import check_same_place
from .activations import SINGLE_LAYER_SITES, Activations
from .baselines import TEXT, Baseline, Block, block, same_prompts, side_by_side
from .directions import Direction, project
from .names import meant
from .ridge import Features, fixed, scale
from .subspaces import explained_energy, leading_eigenvectors, principal_components, unit_rows

SEVERAL = -2
"""The layer key of features made of several layers (-1 is the baselines')."""

_ROUNDING = 1e-6  # principal axes along which rows spread less than this share of their length are float32 rounding

Blocks: TypeAlias = list[tuple[int, Block]]


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A named way from activations to feature blocks.

    name  stands in the column `features` of a Result (the blocks may say it more exactly).
    note  what to know when reading its rows.
    of    activations -> [(layer, Block)], with layer `SEVERAL` for features of several layers. Yours may be any function.
    """

    name: str
    note: str
    of: Callable[[Activations], Blocks]

    def blocks(self, acts: Activations) -> Blocks:
        """A block per layer of `acts`, or one of several layers; ValueError where these activations do not fit."""
        return self.of(acts)

    def named(self, name: str) -> "FeatureSet":
        """The same features under another name, blocks too: to tell two of a kind apart."""
        return FeatureSet(name, self.note, lambda acts: [(layer, replace(one, name=name)) for layer, one in self.of(acts)])

    def remembered(self, acts: Activations) -> "FeatureSet":
        """The same features of these activations, each made once for every set of training rows: for several targets, or many calls."""
        kept = [(layer, replace(one, features=_remembered(one.features))) for layer, one in self.of(acts)]
        return replace(self, of=lambda acts: kept)


# ---- the feature sets


def of_block(one: Block) -> FeatureSet:
    """A single block, a baseline's say, as a feature set of several layers."""
    return FeatureSet(one.name, one.note, lambda acts: [(SEVERAL, one)])


def raw() -> FeatureSet:
    """The rows as they were recorded, each of the d_model features standardised; the block is named by the site."""
    return FeatureSet("raw", "", lambda acts: [(i, Block(acts.site, fixed(acts.layer(i)), "each", "")) for i in acts.layers])


def squared_projections(n: int = 150, source: str | Activations = "random", seed: int = 0) -> FeatureSet:
    """The paper's features: x_qj = (a_q . d_j)^2 along n orthonormal directions (fewer where the width allows no more).

    source  "random": a uncentred, d_j the columns of Q in the QR decomposition of standard normal numbers [d_model, n] from
            `np.random.RandomState(seed)`, the same at every layer. "pca": ((a_q - mu) . v_j)^2 with mean and principal axes
            of the training rows, fitted anew in every fold. Activations (the prompts of the tuning, say): the same with
            their mean and axes.
    """
    told = "" if n == 150 else f" n={n}"
    if isinstance(source, Activations):
        note = f"squared projections on the first {n} principal axes of {len(source)} prompts of their own, about their mean"
        return _by_layer(
            f"squared_projections of given prompts{told}", note, lambda acts, i: _squared_on_axes(acts.layer(i), _there(source, acts).layer(i), n)
        )
    if source == "pca":
        note = f"squared projections on the first {n} principal axes of the training rows of every fold, about their mean"
        return _by_layer(f"squared_projections pca{told}", note, lambda acts, i: _squared_pca(acts.layer(i), n))
    if source != "random":
        raise ValueError(f"source={source!r}: choose 'random', 'pca', or give the Activations whose principal axes are to be used")
    note = f"squared projections on {n} random orthonormal directions (as many as d_model where that is less; seed {seed}), uncentred"
    name = f"squared_projections{told}" + (f" seed={seed}" if seed else "")
    directions = cache(lambda d_model: orthonormal(d_model, n, seed))
    return _by_layer(name, note, lambda acts, i: _once(lambda: (acts.layer(i).astype(np.float64) @ directions(acts.d_model)) ** 2))


def projections(*directions: Direction) -> FeatureSet:
    """The scalar projection on each direction: persona directions, a mean difference."""
    if not directions:
        raise ValueError("no direction was given: projections(evil, sycophantic), each a Direction")

    def of_layer(acts: Activations, layer: int) -> Features:
        one = acts.select(layers=[layer])
        for direction in directions:
            project(one[:0], direction)  # says at once what does not fit
        return _once(lambda: np.column_stack([project(one, d)[layer].to_numpy() for d in directions]))

    names = ", ".join(d.name for d in directions)
    return _by_layer(f"projections on {names}", f"scalar projections on {names}", of_layer)


def subspace_energy(train_acts: Activations, k: int | Sequence[int]) -> FeatureSet:
    """How much of a prompt the training prompts' principal subspace holds: ||P(x - mu)||^2 / ||x - mu||^2, a feature for each k.

    train_acts  the prompts of the tuning at the same place: P is of their first k principal components, mu their mean.
    """
    ks = [int(k)] if isinstance(k, int | np.integer) else [int(one) for one in k]

    def of_layer(acts: Activations, layer: int) -> Features:
        x, rows = acts.layer(layer), _there(train_acts, acts).layer(layer)

        def energies() -> Float[np.ndarray, "prompt feature"]:
            basis, centre = principal_components(rows, max(ks))[0], rows.mean(axis=0, dtype=np.float64)
            return np.column_stack([explained_energy(x, basis[:, :one], centre) for one in ks])

        return _once(energies)

    told = ", ".join(map(str, ks))
    note = f"share of a prompt's energy in the first {told} principal components of {len(train_acts)} training prompts"
    return _by_layer(f"subspace_energy k={told}", note, of_layer)


def anchors(anchor_acts: Activations) -> FeatureSet:
    """Cosine similarity to each of a fixed set of anchor prompts, both about the anchors' mean (relative representations;
    Moschella et al. 2023): as many features as anchors whatever the width, so that a predictor can move between models
    that both read the anchors. Anchors are prompts recorded at the same place, in the same order everywhere.
    """

    def of_layer(acts: Activations, layer: int) -> Features:
        x, rows = acts.layer(layer), _there(anchor_acts, acts).layer(layer)

        def similarities() -> Float[np.ndarray, "prompt feature"]:
            centre = rows.mean(axis=0, dtype=np.float64)
            return unit_rows(x - centre) @ unit_rows(rows - centre).T

        return _once(similarities)

    return _by_layer("anchors", f"cosine similarity to each of {len(anchor_acts)} anchor prompts, about their mean", of_layer)


def joined(layers: str | Iterable[int] = "all") -> FeatureSet:
    """Several layers side by side, every feature standardised by the training rows.

    The block holds the coordinates of the rows along the training rows' principal axes: a ridge (or PLS) cannot tell them
    from the layers x d_model features themselves, and they are at most as many as prompts. Its penalty counts per
    coordinate ("block"): as scikit-learn's Ridge(alpha) at alpha x features / coordinates.
    """
    chosen = None if isinstance(layers, str) else tuple(int(i) for i in layers)
    if chosen is None and layers != "all":
        raise ValueError(f"layers={layers!r}: give 'all' or block indices, joined([8, 12, 16])")

    def of(acts: Activations) -> Blocks:
        some = acts if chosen is None else acts.select(layers=chosen)

        def features(train: Int[np.ndarray, " train"]) -> Float[np.ndarray, "prompt feature"]:
            gram = np.zeros((len(some), len(some)))
            for i in some.layers:
                z = scale(some.layer(i).astype(np.float64), train)
                gram += z @ z.T
            return principal_scores(gram, train)

        note = f"layers {', '.join(map(str, some.layers))} side by side"
        return [(SEVERAL, Block(name, features, "block", note))]

    name = "joined" if chosen is None else f"joined {', '.join(map(str, chosen))}"
    return FeatureSet(name, "several layers side by side, every feature standardised", of)


def with_positions(*other_acts: Activations) -> FeatureSet:
    """The rows beside the same prompts' rows at other positions or sites (matched by id), layer by layer, each feature
    standardised. A recording of a site of one layer (embed, final_norm) stands beside every layer."""
    if not other_acts:
        raise ValueError("no other recording was given: with_positions(model.record(prompts, position='mean'))")
    names = [f"{other.site} {other.position}" for other in other_acts]

    def of(acts: Activations) -> Blocks:
        beside = [same_prompts(acts, other) for other in other_acts]
        for other in beside:
            missing = [i for i in acts.layers if i not in other.layers]
            if missing and other.site not in SINGLE_LAYER_SITES:
                raise ValueError(f"the recording at {other.place} lacks the layers {missing}: record it there, or select(layers=...) the common ones")

        def side_by_side(layer: int) -> Float[np.ndarray, "prompt feature"]:
            rest = [other.layer(other.layers[0] if other.site in SINGLE_LAYER_SITES else layer) for other in beside]
            return np.concatenate([acts.layer(layer), *rest], axis=1)

        def features(layer: int) -> Features:
            return lambda train: side_by_side(layer)

        name = " + ".join([f"{acts.site} {acts.position}", *names])
        return [(i, Block(name, features(i), "each", "positions or sites side by side")) for i in acts.layers]

    return FeatureSet(f"with {' + '.join(names)}", "positions or sites side by side", of)


def from_text(baseline: Baseline = "tfidf", category: str | None = None) -> FeatureSet:
    """A text baseline as features, to be joined with others: joined_sets(raw(), from_text()). `category` is the column that
    "category" stands for. ValueError for a baseline that reads more than text and category."""

    def of(acts: Activations) -> Blocks:
        found = block(baseline, acts.facts, category)
        if not found.text:
            raise ValueError(f"{found.name!r} reads more than the text: it may hold the target; give it in baselines=, or choose among {TEXT}")
        return [(SEVERAL, found)]

    name = baseline if isinstance(baseline, str) else getattr(baseline, "name", "text")
    return FeatureSet(name, "features of the text", of)


def joined_sets(*feature_sets: FeatureSet) -> FeatureSet:
    """Several feature sets side by side at each layer, every one with the same total variance in training, so that three
    projections are not drowned by thousands of raw features. A set of several layers stands beside every layer."""
    if len(feature_sets) < 2:
        raise ValueError(f"{len(feature_sets)} feature sets were given; two or more are needed to join")

    def of(acts: Activations) -> Blocks:
        every = [dict(one.blocks(acts)) for one in feature_sets]
        keys = list(dict.fromkeys(i for blocks in every for i in blocks if i != SEVERAL)) or [SEVERAL]
        for one, blocks in zip(feature_sets, every, strict=True):
            missing = [i for i in keys if i not in blocks and SEVERAL not in blocks]
            if missing:
                raise ValueError(
                    f"the feature set {one.name!r} has no block at layers {missing}, others have: give activations with layers common to all"
                )
        return [(i, side_by_side([blocks.get(i) or blocks[SEVERAL] for blocks in every])) for i in keys]

    return FeatureSet(" + ".join(one.name for one in feature_sets), "feature sets side by side, each with the same total variance", of)


NAMED: dict[str, Callable[[], FeatureSet]] = {"raw": raw, "squared_projections": squared_projections, "joined": joined}
"""The feature sets that need no argument, by name."""


def feature_set(given: str | FeatureSet) -> FeatureSet:
    """A feature set by its name ("raw", "squared_projections", "joined"), or as it is; ValueError lists the names."""
    if isinstance(given, FeatureSet):
        return given
    if given not in NAMED:
        raise ValueError(
            f"unknown features {given!r}: choose among {', '.join(map(repr, NAMED))}, or give a FeatureSet, "
            f"say em.features.projections(direction) or em.features.subspace_energy(train_acts, k=8).{meant(given, NAMED)}"
        )
    return NAMED[given]()


# ---- on arrays


def orthonormal(d_model: int, n: int, seed: int) -> Float[np.ndarray, "d_model _"]:
    """min(n, d_model) orthonormal columns: Q of the QR decomposition of standard normal numbers from RandomState(seed)."""
    return np.linalg.qr(np.random.RandomState(seed).standard_normal((d_model, n)))[0]


def principal_scores(
    gram: Float[np.ndarray, "prompt prompt"], train: Int[np.ndarray, " train"], n: int | None = None, floor: float = 0.0
) -> Float[np.ndarray, "prompt feature"]:
    """(x - mu) . v_j for all rows, with mean mu and principal axes v_j of the training rows, from the Gram matrix x . x'.

    n      number of axes; None: as many as the training rows span. floor: axes along which the training rows' root sum of
           squares is not more than this are dropped (rounding). At least one is kept, of zeros where rows are all the same.
    """
    to_train = gram[:, train]
    crossed = to_train - to_train.mean(axis=1, keepdims=True) - to_train[train].mean(axis=0) + to_train[train].mean()
    most = max(1, min(len(train) - 1, len(train) if n is None else n))
    values, vectors = leading_eigenvectors(crossed[train], most)
    kept = np.sqrt(np.clip(values, 0, None)) > max(floor, np.sqrt(len(train) * np.finfo(np.float64).eps * max(values[0], 0.0)))
    if not kept.any():
        return np.zeros((len(gram), 1))
    return crossed @ (vectors[:, kept] / np.sqrt(values[kept]))


def _squared_pca(x: Float[np.ndarray, "prompt d_model"], n: int) -> Features:
    """Squared scores on the training rows' axes; the products of all rows are computed once for all folds."""

    @cache
    def products() -> tuple[Float[np.ndarray, "prompt prompt"], float]:
        rows = x.astype(np.float64)
        floor = _ROUNDING * float(np.linalg.norm(rows))
        rows -= rows.mean(axis=0)  # a shift of all rows falls out; taken first, it costs no digits
        return rows @ rows.T, floor

    def features(train: Int[np.ndarray, " train"]) -> Float[np.ndarray, "prompt feature"]:
        gram, floor = products()
        return principal_scores(gram, train, n, floor) ** 2

    return features


def _squared_on_axes(x: Float[np.ndarray, "prompt d_model"], source: Float[np.ndarray, "other d_model"], n: int) -> Features:
    def squares() -> Float[np.ndarray, "prompt feature"]:
        axes = principal_components(source, min(n, len(source) - 1, source.shape[1]))[0]
        return ((x - source.mean(axis=0, dtype=np.float64)) @ axes) ** 2

    return _once(squares)


# ---- how they are put together


def _by_layer(name: str, note: str, of_layer: Callable[[Activations, int], Features]) -> FeatureSet:
    """A block at every layer; `of_layer` refuses at once what does not fit and computes when asked for the features."""
    return FeatureSet(name, note, lambda acts: [(i, Block(name, of_layer(acts, i), "each", note)) for i in acts.layers])


def _once(make: Callable[[], Float[np.ndarray, "prompt feature"]]) -> Features:
    """A block that needs no fitting, computed when it is first asked for."""
    kept = cache(make)
    return lambda train: kept()


def _remembered(make: Features) -> Features:
    kept = cache(lambda train: make(np.frombuffer(train, dtype=np.int64)))
    return lambda train: kept(np.asarray(train, dtype=np.int64).tobytes())


def _there(source: Activations, acts: Activations) -> Activations:
    """Other prompts at the layers of `acts`; ValueError unless they were read at the same place of one architecture."""
    missing = [i for i in acts.layers if i not in source.layers]
    if missing:
        raise ValueError(f"the given prompts were recorded at {source.place} and lack the layers {missing}: record them at {acts.place}")
    there = source.select(layers=acts.layers)
    check_same_place(there, acts)
    _identity.refuse_unlike(acts.meta, source.meta, "read the prompts beside the given ones", False)
    return there
