"""From two sets of prompts to what their overlap stands beside: halves of both, and the draws of every null, layer by layer."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from . import nulls as null_draws
from ._sides import check_same_layers, facts_column
from .activations import Activations
from .covariance import covariance_overlaps, population
from .measures import Measure, measure_named
from .resampling import codes_of
from .subspaces import Sample, common_coordinates, n_components

Halves: TypeAlias = list[tuple[Sample, Sample]]
Splits: TypeAlias = list[tuple[Int[np.ndarray, " half"], Int[np.ndarray, " half"]]]
_ENOUGH = 1000  # reference prompts, or four times b's: more would hardly change the covariance null, and would cost
_FITTING = {
    "subspaces": ("isotropic", "covariance", "labels", "questions", "reference"),
    "prompts": ("isotropic", "labels", "questions", "reference"),
    "pairs": ("pairs",),
}
_WHY_NOT = {
    "covariance": "it draws subspaces; an Activations of reference prompts asks the same by prompt",
    "pairs": "it permutes which prompt goes with which, and this measure pairs none",
}
Clusters: TypeAlias = str | tuple[str | None, str | None] | None
Groups: TypeAlias = Int[np.ndarray, " prompt"] | None
_OF_PAIRS = "linear CKA pairs prompts and is blind to rotations; nulls='pairs' permutes which prompt goes with which"


@dataclass(frozen=True)
class Sides:
    """Both sides of an overlap, the measure, at each layer how many components of a and of b it takes, and the columns that hold which
    prompts go together (clusters)."""

    a: Activations
    b: Activations
    measure: Measure
    sizes: tuple[tuple[int, int], ...]
    clusters: tuple[str | None, str | None]

    @classmethod
    def of(cls, a: Activations, b: Activations, k: int | tuple[int, int], variance: float | None, measure: str, clusters: Clusters = None) -> "Sides":
        """Checked; b in a's order where both hold the same prompts."""
        named = clusters if isinstance(clusters, tuple) else (clusters, clusters)
        check_same_layers(a, b)
        how = measure_named(measure)
        if set(a.ids) == set(b.ids):
            b = b.select(ids=a.ids)
        elif how.kind == "pairs":
            raise ValueError(f"{measure} pairs prompts, and the sides hold different ones: select(ids=...) the common ones on both")
        if variance is None:
            k_a, k_b = k if isinstance(k, Sequence) else (k, k)
            return cls(a, b, how, ((k_a, k_b),) * len(a.layers), named)
        explained = (a, b) if how.kind == "subspaces" else (a,)
        needed = [max(n_components(side.layer(layer), variance) for side in explained) for layer in a.layers]
        return cls(a, b, how, tuple((k, k) for k in needed), named)

    @property
    def same_prompts(self) -> bool:
        return self.a.n_prompts == self.b.n_prompts and bool((self.a.ids.to_numpy() == self.b.ids.to_numpy()).all())

    def layers(self, *others: Activations) -> Iterator[tuple[Sample, ...]]:
        """At every layer: a, b and other sets (b's number of components), in coordinates of what they span together."""
        for layer, (k_a, k_b) in zip(self.a.layers, self.sizes, strict=True):
            x, *rest = common_coordinates(*(acts.layer(layer) for acts in (self.a, self.b, *others)))
            yield (Sample(x, k_a), *(Sample(rows, k_b) for rows in rest))

    def values(self) -> Float[np.ndarray, " layer"]:
        """The measure at every layer; an error names the layer."""
        found = []
        for layer, (k_a, k_b) in zip(self.a.layers, self.sizes, strict=True):
            try:
                found.append(self.measure.of(Sample(self.a.layer(layer), k_a), Sample(self.b.layer(layer), k_b)))
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from error
        return np.array(found)

    @property
    def told(self) -> str:
        """What an interval's halves are made of."""
        if self.clusters == (None, None):
            return "prompts taken as independent (different topics alone reject and widen: clusters=)"
        of_a, of_b = (name or "single prompts" for name in self.clusters)
        return f"halves of whole clusters: {of_a}" + (f" of a, {of_b} of b" if of_a != of_b else "")

    @property
    def groups(self) -> tuple[Groups, Groups]:
        """Which prompts of a, and of b, go together, as integers from 0; None where each is its own."""
        return groups_of(self.a, self.clusters[0]), groups_of(self.b, self.clusters[1])

    def degrees(self, n_splits: int) -> int:
        """Degrees of freedom of as many splits: not more than there are clusters of a side, less one."""
        return min([n_splits, *(int(codes.max()) for codes in self.groups if codes is not None)])

    def splits(self, n_splits: int, seed: int, n: int | None = None) -> tuple[Splits, Splits]:
        """The rows of both halves of every split, of a and of b; the same prompts are split alike, clusters stay whole. n: prompts a half
        on both sides, or as many as the smallest half of whole clusters has."""
        rng, (in_a, in_b) = np.random.default_rng(seed), self.groups
        of_a = null_draws.halves(self.a.n_prompts, n_splits, rng, n, in_a)
        of_b = of_a if self.same_prompts else null_draws.halves(self.b.n_prompts, n_splits, rng, n, in_b)
        if n is None or in_a is in_b is None:
            return of_a, of_b
        least = min(len(of_a[0][0]), len(of_b[0][0]))
        of_a, of_b = ([(one[:least], other[:least]) for one, other in split] for split in (of_a, of_b))
        return of_a, of_b

    def halves_span(self, splits: tuple[Splits, Splits]) -> list[bool]:
        """Whether, at every layer, half of the prompts span as many directions as are asked for."""
        a, b = (len(side[0][0]) for side in splits)
        if self.measure.kind == "pairs":
            return [a >= 4 for _ in self.sizes]
        return [a > k_a and (self.measure.kind == "prompts" or b > k_b) for k_a, k_b in self.sizes]

    def halves(self, splits: tuple[Splits, Splits]) -> Iterator[tuple[Halves, Halves]]:
        """At every layer, both halves of every split, of a and of b."""
        for samples in self.layers():
            a, b = ([(side.part(one), side.part(other)) for one, other in split] for side, split in zip(samples, splits, strict=True))
            yield a, b


@dataclass(frozen=True)
class Null:
    """A null that was asked for: its kind, and its reference set where it has one."""

    kind: str
    reference: Activations | None = None

    def tail(self, measure: Measure) -> str:
        """The tail its p is of."""
        return measure.apart if self.kind == "labels" else measure.closer

    def told(self, sides: Sides) -> str:
        """What `.attrs["null"]` says of it."""
        name = "isotropic subspace" if self.kind == "isotropic" else self.kind
        text = null_draws.describe(name, None if self.kind == "questions" else self.tail(sides.measure))
        if self.kind == "labels" and (groups := _of_both(sides)) is not None:
            many = null_draws.arrangements(sides.a.n_prompts, groups, sides.same_prompts)
            text += "; clusters: prompts dealt out inside the groups that both sides hold" if many is None else f"; whole clusters, in {many} ways"
        return text if self.reference is None else f"{text}; {self.reference.n_prompts} reference prompts"

    def draws(self, sides: Sides, n_draws: int, seed: int) -> Float[np.ndarray, "draws layer"]:
        """Draws of the overlap at every layer; every draw uses the same random numbers at all layers."""
        given = () if self.reference is None else (self.reference,)
        return _DRAWN[self.kind](sides, n_draws, seed, *given)


def nulls_asked(nulls: Sequence[str | Activations] | str | Activations, sides: Sides, reference: Activations | None) -> dict[str, Null]:
    """Nulls in order, by the name they are shown under; ValueError for what is unknown or says nothing about the measure."""
    asked: dict[str, Null] = {}
    for null in [nulls] if isinstance(nulls, (str, Activations)) else nulls:
        of: Activations | None = None
        if isinstance(null, Activations):
            number = sum(one.kind == "reference" for one in asked.values()) + 1
            kind, name, of = "reference", "reference" if number == 1 else f"reference {number}", null
        elif null in ("isotropic", "covariance", "labels", "questions", "pairs"):
            kind = name = null
        else:
            raise ValueError(
                f"unknown null {null!r}; choose 'isotropic', 'covariance', 'labels', 'questions' or 'pairs', or give Activations of reference prompts"
            )
        if kind not in _FITTING[sides.measure.kind]:
            why = _OF_PAIRS if sides.measure.kind == "pairs" else _WHY_NOT[kind]
            raise ValueError(f"null {kind!r} says nothing about {sides.measure.name}: {why}")
        asked[name] = Null(kind, _separate(sides, reference) if kind == "covariance" else of)
    if reference is not None and "covariance" not in asked:
        raise ValueError("reference= is the set that null 'covariance' draws from, and that was not asked for; as a null by itself: nulls=reference")
    common = len(set(sides.a.ids) & set(sides.b.ids))
    if "labels" in asked:
        _of_both(sides)
    if "labels" in asked and common and not sides.same_prompts:
        raise ValueError(f"{common} prompts are on both sides, others on one only: null 'labels' needs sides that share all prompts or none")
    return asked


def _separate(sides: Sides, reference: Activations | None) -> Activations:
    """The reference set of null "covariance", or ValueError."""
    if reference is None:
        raise ValueError("null 'covariance' needs reference=: Activations of prompts that are in neither set, best a few times as many as b")
    check_same_layers(sides.b, reference)
    if reference.n_prompts < sides.b.n_prompts:
        raise ValueError(f"the reference holds {reference.n_prompts} prompts, b {sides.b.n_prompts}: give at least as many, best a few times as many")
    for name, side in (("a", sides.a), ("b", sides.b)):
        strange = _not_in(reference, side)
        if len(strange) < reference.n_prompts:
            raise ValueError(
                f"{reference.n_prompts - len(strange)} prompts of the reference are in {name} too: null 'covariance' needs a separate reference set"
            )
    if reference.n_prompts < 2 * sides.b.n_prompts:
        warnings.warn(
            f"the reference holds {reference.n_prompts} prompts, b {sides.b.n_prompts}: below twice as many, null 'covariance' rejects too often "
            "(up to 0.11 at .05, 0.13 with heavy tails); give more, or the reference itself as a null, which is exact at any size",
            UserWarning,
            stacklevel=5,
        )
    return reference


def groups_of(acts: Activations, name: str | None) -> Groups:
    """The groups of a column of the facts as integers from 0; None without a name."""
    column = facts_column(acts, name)
    return None if column is None else codes_of(column, acts.n_prompts, f"the column {name!r}")[0]


def _of_both(sides: Sides) -> Groups:
    """The groups of a's prompts and then b's; one value of both columns is one group. None where neither side has any; ValueError where
    null "labels" could not deal them out."""
    columns = [facts_column(side, name) for side, name in zip((sides.a, sides.b), sides.clusters, strict=True)]
    known = [column for column in columns if column is not None]
    if not known:
        return None
    if len(known) == 1:
        raise ValueError(
            "null 'labels' deals out whole clusters of both sides, and one side has none: name a column of each, clusters=(of a, of b) "
            "('id' where each prompt is its own)"
        )
    codes, n_groups = codes_of(np.concatenate(known), len(known[0]) + len(known[1]), "clusters=")
    shared = len(set(known[0]) & set(known[1]))
    if shared and len({*map(frozenset, known)}) > 1:
        raise ValueError(f"{shared} of {n_groups} clusters are on both sides, others on one only: null 'labels' needs sides that share all or none")
    return codes


def _not_in(reference: Activations, side: Activations) -> list[int]:
    """Rows of the reference that are not a prompt of the side; another prompt under the same id is another prompt."""
    shared = {prompt: row for row, prompt in enumerate(side.ids)}
    return [
        row
        for row, prompt in enumerate(reference.ids)
        if prompt not in shared or not np.array_equal(reference.values[row], side.values[shared[prompt]])
    ]


# ---- the draws of each null (hypothesis, generator and tail: `emlens.nulls.DESCRIPTIONS`)


def _isotropic(sides: Sides, n_draws: int, seed: int) -> Float[np.ndarray, "draws layer"]:
    """A random subspace in place of a's; where both are subspaces, against b's (it does not matter which one is random)."""
    layers, measure = sides.a.layers, sides.measure
    if measure.kind == "subspaces":
        bases = [Sample(sides.b.layer(layer), k_b).basis for layer, (_, k_b) in zip(layers, sides.sizes, strict=True)]
        return null_draws.isotropic_overlaps(bases, n_draws, seed, measure.name, [k_a for k_a, _ in sides.sizes])
    samples = [Sample(sides.a.layer(layer), k_a) for layer, (k_a, _) in zip(layers, sides.sizes, strict=True)]
    return null_draws.isotropic_fractions(samples, [sides.b.layer(layer) for layer in layers], n_draws, seed, root=measure.name == "norm_fraction")


def _covariance(sides: Sides, n_draws: int, seed: int, reference: Activations) -> Float[np.ndarray, "draws layer"]:
    most = max(_ENOUGH, 4 * sides.b.n_prompts)
    if reference.n_prompts > most:
        reference = reference[np.sort(np.random.default_rng(seed).permutation(reference.n_prompts)[:most])]
    width, populations, own = max(k for k, _ in sides.sizes), [], []
    for a, _, rows in sides.layers(reference):
        populations.append(population(rows.x, a.basis, reference.d_model, width))
        own.append(sides.measure.of(a, rows))
    return covariance_overlaps(
        populations, np.array(own), [k for _, k in sides.sizes], sides.b.n_prompts, reference.n_prompts, sides.measure, n_draws, seed
    )


def _reference(sides: Sides, n_draws: int, seed: int, reference: Activations) -> Float[np.ndarray, "draws layer"]:
    """a as it is; in place of b, as many rows of b and the reference together."""
    check_same_layers(sides.b, reference)
    fresh = _not_in(reference, sides.b)
    if not fresh:
        raise ValueError("the reference holds no prompt that is not in b: give unrelated prompts, best several times as many as b")
    rows = list(null_draws.subsamples(sides.b.n_prompts + len(fresh), sides.b.n_prompts, n_draws, seed))
    found = []
    for a, b, others in sides.layers(reference[fresh]):
        pool = Sample(np.concatenate([b.x, others.x]), b.k)
        found.append([sides.measure.of(a, pool.part(chosen)) for chosen in rows])
    return np.array(found).T


def _labels(sides: Sides, n_draws: int, seed: int) -> Float[np.ndarray, "draws layer"]:
    rows = list(null_draws.dealt_out(sides.a.n_prompts, sides.b.n_prompts, n_draws, seed, sides.same_prompts, _of_both(sides)))
    found = []
    for a, b in sides.layers():
        pool = Sample(np.concatenate([a.x, b.x]), a.k)
        found.append([sides.measure.of(pool.part(one), pool.part(other, b.k)) for one, other in rows])
    return np.array(found).T


def _pairs(sides: Sides, n_draws: int, seed: int) -> Float[np.ndarray, "draws layer"]:
    orders = list(null_draws.subsamples(sides.b.n_prompts, sides.b.n_prompts, n_draws, seed))
    return np.array([[sides.measure.of(a, b.part(order)) for order in orders] for a, b in sides.layers()]).T


_DRAWN: dict[str, Callable[..., Float[np.ndarray, "draws layer"]]] = {
    "isotropic": _isotropic,
    "covariance": _covariance,
    "reference": _reference,
    "labels": _labels,
    "pairs": _pairs,
}
