"""A predictor to keep: fitted once, applied to new prompts with intervals, refusing what lies far outside what it has seen.

`em.predict` asks whether activations foretell a score; here the ridge of one of its rows is kept. Intervals are CV+ over
whole groups (Barber et al. 2021, arXiv 1905.02928) with every group of equal weight however many prompts it has, as in the
hierarchical jackknife+ (Lee, Barber and Willett 2023, arXiv 2306.06342). With one group a fold, and groups that are
exchangeable with the new one, that covers at least 2 level - 1, and in practice `level` or more (few groups: more); what it
covered of groups that had no part in it is measured and goes with the predictor.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import features as sets
from . import portables, refusals, stats, store
from .activations import Activations, Place
from .baselines import refuse_copies, same_prompts
from .conformal import Conformal, Matrix, Seen, conformal, distance, guaranteed, half_width, interval, line, seen
from .features import FeatureSet
from .folds import make_folds
from .portables import Portable, portable
from .ridge import PENALTIES, Fold, nested_ridge, r2
from .threads import one_thread

FEW_GROUPS = 20
FORMAT = "emlens predictor 1"
MARGIN = 1.5
"""Rows more than this many times as far away as the farthest row of any held-out group are refused."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """A ridge on the activations of one place, with what is needed to apply it to new prompts. Made by `em.fit_predictor`.

    target, target_range   the fact it foretells, and its least and greatest value in training.
    place, d_model, meta   where it reads, and of which model.
    features               what of the activations it sees; weights, intercept: in the units of these features.
    groups, n, n_groups    the fact whose whole groups were held out (None: single prompts), and how many.
    penalty, r2            chosen by the folds; pooled out-of-fold R2, as in the row of em.predict (which has its nulls).
    level, half_width      of its intervals: prediction +- about half_width; half_width_of_mean: of a predictor without features.
    coverage               mean over groups of the share of a group's prompts in the intervals made without its fold (folds and
                           penalty too), coverage_interval: 95 % bootstrap over groups; held_out: group, n, coverage, width.
    """

    target: str
    target_range: tuple[float, float]
    place: Place
    d_model: int
    meta: dict[str, Any]
    features: FeatureSet
    groups: str | None
    n: int
    n_groups: int
    folds: str
    penalty: float
    r2: float
    level: float
    half_width: float
    half_width_of_mean: float
    coverage: float
    coverage_interval: tuple[float, float]
    held_out: pd.DataFrame
    weights: Float[np.ndarray, " feature"]
    intercept: float
    conformal: Conformal
    seen: Seen

    @property
    def cautions(self) -> list[str]:
        """What to bear in mind when its intervals are read."""
        if self.groups is None:
            return ["single prompts were held out: nothing is known of its intervals in a new category"]
        few = f"{self.n_groups} groups of {self.groups!r} were seen, fewer than {FEW_GROUPS}: a new one may be unlike all of them"
        best = self.n_groups / (self.n_groups + 1)
        none = f"{self.n_groups} groups guarantee no finite interval above level {best:.3f}: at {self.level:g} only the measured coverage speaks"
        return [few] * (self.n_groups < FEW_GROUPS) + [none] * (not guaranteed(self.n_groups, self.level))

    def __repr__(self) -> str:
        worst = self.held_out.loc[self.held_out["coverage"].idxmin()]
        units = "prompts" if self.groups is None else f"groups of {self.groups!r}"
        low, high = self.coverage_interval
        told = f"measured coverage {self.coverage:.2f} [{low:.2f}, {high:.2f}] over {self.n_groups} held-out {units}"
        least = "" if self.groups is None else f", least {worst['coverage']:.2f} in {worst['group']!r}"
        widths = f"± {self.half_width:.3g} (± {self.half_width_of_mean:.3g} without features)"
        shown = [f"Predictor of {self.target!r}", str(self.place), self.features.name, f"{self.n} prompts, out-of-fold R2 {self.r2:.3f}"]
        return " · ".join([*shown, f"{self.level:.0%} intervals {widths}, {told}{least}"])

    def predict(self, acts: Activations, *, outside: str = "refuse", anchors: Activations | None = None) -> pd.DataFrame:
        """Foretell the target of new prompts: a frame id, prediction, low, high, distance; `.attrs` says what they mean.

        acts      the same site, position, layer and model as it was fitted on.
        outside   "refuse": ValueError when a row is more than `MARGIN` times as far from the training rows as any row of a
                  held-out group was (distance 1); "nan": such rows get NaN.
        anchors   of a predictor on "anchors": the same anchor prompts in another model; `acts` are then of that model, at one
                  layer, select(layers=[...]). The measured coverage is the first model's, `.attrs` says so.

        Errors: TypeError for what are no Activations; ValueError for another place, width or model, or rows outside.
        """
        refusals.refuse_other_than_activations(acts)
        if outside not in ("refuse", "nan"):
            raise ValueError(f"outside={outside!r}: 'refuse' such rows, or 'nan' for NaN in their place")
        x = self._features(acts, anchors)
        away = distance(self.seen, x, self.penalty)
        beyond = away > MARGIN
        if beyond.any() and outside == "refuse":
            ids = ", ".join(repr(one) for one in acts.ids[beyond].head(5)) + (", ..." if beyond.sum() > 5 else "")
            raise ValueError(
                f"{int(beyond.sum())} of {len(acts)} prompts lie far outside what the predictor has seen, up to {away.max():.3g} times as far as any "
                f"row of a held-out group (allowed {MARGIN}): {ids}: leave them out, or outside='nan' for NaN in their place"
            )
        low, high = interval(self.conformal, x, self.level)
        numbers = np.column_stack([x @ self.weights + self.intercept, low, high])
        numbers[beyond] = np.nan
        table = pd.DataFrame({"id": acts.ids.to_numpy(), **dict(zip(("prediction", "low", "high"), numbers.T, strict=True)), "distance": away})
        unit = "prompt" if self.groups is None else "group"
        table.attrs = {
            "what": f"{self.target!r} foretold by a saved predictor from {self.place}, {self.features.name}",
            "interval": f"level {self.level:g}, CV+ over {self.folds}, every {unit} of equal weight",
            "coverage": {"mean over groups": self.coverage, "95% bootstrap": list(self.coverage_interval), "n_groups": self.n_groups},
            "per_group": self.held_out.to_dict("list"),
            "r2": self.r2,
            "target_range": list(self.target_range),
            "distance": f"1 is the farthest row of a held-out group; beyond {MARGIN} refused",
            "model": self._model_in_words(acts, anchors),
            "cautions": [*self.cautions, *self._outside_the_range(table["prediction"])],
        }
        return table

    def _outside_the_range(self, predictions: pd.Series) -> list[str]:
        least, most = self.target_range
        n = int(((predictions < least) | (predictions > most)).sum())
        told = f"{n} of {len(predictions)} predictions lie outside the range of {self.target!r} in training, {least:.4g} to {most:.4g}"
        return [f"{told}: a ridge knows no bounds; clip them where the scale has ends"] * (n > 0)

    def _model_in_words(self, acts: Activations, anchors: Activations | None) -> str:
        if anchors is not None:
            mine, theirs = self.meta.get("model", "the first"), acts.meta.get("model", "unnamed")
            return f"another, {theirs}, by way of the anchors: R2, intervals and coverage were measured in {mine} and may not hold in it"
        known = set(portables.IDENTITY) & set(self.meta) & set(acts.meta)
        return "as fitted" if known else "not known to be the same: one of the two does not say which it is"

    def _features(self, acts: Activations, anchors: Activations | None) -> Matrix:
        """The features of new rows; refuses another place or model."""
        if (acts.site, acts.position) != (self.place.site, self.place.position):
            raise ValueError(f"the predictor reads {self.place}, these activations are {acts.place}: record them there")
        if anchors is not None:
            return self._by_anchors(acts, anchors)
        if not set(self.place.layers) <= set(acts.layers):
            raise ValueError(f"the predictor reads {self.place}, these activations are {acts.place}: record that layer too")
        if acts.d_model != self.d_model:
            raise ValueError(f"the predictor reads a width of {self.d_model}, these activations have d_model {acts.d_model}: another model")
        differ = portables.unlike(self.meta, acts.meta)
        if differ:
            raise ValueError(
                f"the predictor was fitted on {self.meta.get('model', 'one model')}, these activations are of another ({', '.join(differ)} differ): "
                "record them in the same model and variant; a predictor on 'anchors' can move, with anchors="
            )
        return portables.matrix_of(self.features, acts.select(layers=self.place.layers), self.place.layers[0])

    def _by_anchors(self, acts: Activations, anchors: Activations) -> Matrix:
        """The features of rows of another model, by the same anchor prompts in it."""
        if not isinstance(self.features, Portable) or self.features.kind != "anchors":
            raise ValueError(f"anchors= is for a predictor on portable('anchors', ...); this one sees {self.features.name!r}: leave it out")
        if len(acts.layers) != 1:
            raise ValueError(f"which layer of the other model? The activations have {len(acts.layers)}: acts.select(layers=[...]) one of them")
        kept = self.features.data[0]
        if not isinstance(kept, Activations) or len(anchors) != len(kept):
            raise ValueError(f"{len(anchors)} anchors were given; the predictor was fitted with {len(self.weights)}: give the same prompts")
        return portables.matrix_of(sets.anchors(same_prompts(kept, anchors)), acts, acts.layers[0])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything into one safetensors file with a checksum, whole or not at all; `em.load_predictor` reads it back to
        the last bit. ValueError for features that are a function of your own: `portable` names those that can be kept."""
        from safetensors.numpy import save_file

        if not isinstance(self.features, Portable):
            raise ValueError(
                f"the features {self.features.name!r} are a function and cannot be written: fit with portable(...), of {', '.join(portables.KINDS)}"
            )
        target = Path(path)
        data = [portables.told(one) for one in self.features.data]
        said = {name: getattr(self, name) for name in _PLAIN} | {"place": [self.place.site, self.place.layers, self.place.position]}
        said |= {"features": {"kind": self.features.kind, "options": self.features.options, "data": [facts for facts, _ in data]}}
        told = json.dumps(store.plain({**said, "held_out": self.held_out.to_dict("list")}), ensure_ascii=False)
        parts = {"fit": {"weights": self.weights}, "conformal": self.conformal._asdict(), "seen": self.seen._asdict()}
        parts["data"] = {str(number): values for number, (_, values) in enumerate(data)}
        tensors = {f"{part}.{name}": np.asarray(values, order="C") for part, some in parts.items() for name, values in some.items()}
        with store.replacing(target) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "predictor": told, "sha256": _digest(tensors, told)})
        return target


_PLAIN = (
    "target", "target_range", "d_model", "meta", "groups", "n", "n_groups", "folds", "penalty", "r2", "level", "half_width", "half_width_of_mean",
    "coverage", "coverage_interval", "intercept",
)  # fmt: skip


def load_predictor(path: str | os.PathLike[str]) -> Predictor:
    """Read what `Predictor.save` wrote. FileNotFoundError; ValueError for a damaged file or one that is no predictor."""
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"there is no file {target}: save a predictor there first, or give the path of one")
    header, tensors = store.whole(target)
    if header.get("format") != FORMAT:
        raise ValueError(f"{target} is no predictor of ours (format {header.get('format')!r}, needed {FORMAT!r}): fit one and save it")
    if _digest(tensors, header["predictor"]) != header.get("sha256"):
        raise ValueError(f"{target} is damaged: its content is not what its header says: write it again")
    said = json.loads(header["predictor"])
    parts: dict[str, dict[str, Any]] = {"fit": {}, "conformal": {}, "seen": {}, "data": {}}
    for name, values in tensors.items():
        part, _, name = name.partition(".")
        parts[part][name] = values if values.ndim else float(values)
    site, layers, position = said.pop("place")
    features, held_out = said.pop("features"), pd.DataFrame(said.pop("held_out"))
    data = [portables.read(facts, parts["data"][str(number)]) for number, facts in enumerate(features["data"])]
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return Predictor(
        **plain,
        place=Place(site, tuple(layers), position),
        features=portable(features["kind"], *data, **features["options"]),
        held_out=held_out,
        weights=parts["fit"]["weights"],
        conformal=Conformal(**parts["conformal"]),
        seen=Seen(**parts["seen"]),
    )


@one_thread
def fit_predictor(
    acts: Activations,
    target: str,
    *,
    layer: int | None = None,
    groups: str | None = None,
    features: str | FeatureSet = "raw",
    penalties: Sequence[float] = PENALTIES,
    copies: str = "refuse",
    level: float = 0.9,
    seed: int = 0,
) -> Predictor:
    """Fit the ridge of a row of `em.predict` (same features, groups and folds) on all prompts, to be saved and applied to new ones.

    layer      the block whose activations are read; None: the one that was recorded.
    features   "raw", "squared_projections", `portable(...)`, or any FeatureSet that is a function of a row alone; those fitted on the
               training rows (PCA axes, text) are refused.
    penalties  the one with the least mean over the folds of the mean squared error is kept.
    copies     of a prompt in different groups: "refuse" or "allow", as in `em.predict`.
    level      of the intervals; K groups can guarantee K / (K + 1) at best. A UserWarning says so, and when groups are fewer
               than 20. groups=None: single prompts are held out, which says nothing of a new category.

    A ridge knows no bounds: of a rate or a score with ends, predictions may lie outside; they are not clipped, `.attrs["cautions"]` of a
    prediction counts them.

    Errors: as `em.predict` for the target, the groups and copies of a prompt in different groups; KeyError for a layer that was
    not recorded; ValueError for features that cannot be applied to new rows, or a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: a share between 0 and 1, both excluded, say 0.9")
    refusals.refuse_other_than_activations(acts)
    if layer is None and len(acts.layers) > 1:
        raise ValueError(
            f"which layer? {list(acts.layers)} were recorded: layer= names one. em.predict shows what each foretells; the R2 of the best of many is "
            "too high by the choice"
        )
    layer = acts.layers[0] if layer is None else layer
    y, codes = refusals.target_of(acts.facts, target), refusals.group_codes(acts.facts, groups)
    again = refuse_copies(acts, codes, groups, copies)
    there = acts.select(layers=[layer])
    given = portable(features) if isinstance(features, str) and features in {*portables.KINDS} & {*sets.NAMED} else sets.feature_set(features)
    chosen = portables.at_layer(given, layer)
    x, scaling = portables.row_alone(chosen, replace(there, facts=there.facts.drop(columns=target)), layer)
    folds, everyone = make_folds(len(y), codes, None, seed), np.arange(len(y))
    outer = folds.rounds[0]
    cuts = [(fold.train, fold.test) for fold in outer]
    nested = nested_ridge(lambda train: x, y[:, None], outer, penalties, scaling)
    last = nested_ridge(lambda train: x, y[:, None], [Fold(everyone, everyone[:0], tuple(cuts))], penalties, scaling)
    penalty = float(last.penalties[0, 0])
    weights, intercept = line(x, y, everyone, penalty, scaling)
    units = everyone if codes is None else codes
    spare = guaranteed(len(np.unique(units)), level)
    found = conformal(x, y, units, cuts, nested.penalties[:, 0].tolist(), spare, scaling)
    mean = conformal(np.zeros((len(y), 1)), y, units, cuts, [1.0] * len(cuts), spare)
    known = seen(x, everyone, penalty, scaling)
    farthest = max(distance(seen(x, train, penalty, scaling), x[test], penalty).max() for train, test in cuts)
    measured = pd.DataFrame(
        {"group": "all" if groups is None else acts.facts[groups].astype(str).to_numpy(), "coverage": 0.0, "width": 0.0}, index=everyone
    )
    for fold, its in zip(outer, nested.penalties[:, 0], strict=True):
        low, high = interval(conformal(x, y, units, fold.inner, [its] * len(fold.inner), spare, scaling), x[fold.test], level)
        measured.iloc[fold.test, 1:] = np.column_stack([(low <= y[fold.test]) & (y[fold.test] <= high), high - low])
    each = np.bincount(units, measured["coverage"]) / np.bincount(units)
    ends = stats.bootstrap_interval(each, seed=seed)
    out = Predictor(
        target=target,
        target_range=(float(y.min()), float(y.max())),
        place=there.place,
        d_model=there.d_model,
        meta=portables.identity_of(there.meta),
        features=chosen,
        groups=groups,
        n=len(y),
        n_groups=len(each),
        folds=folds.outer + (", its prompts allowed in other groups" if again else ""),
        penalty=penalty,
        r2=float(r2(y[:, None], nested.predictions)[0]),
        level=float(level),
        half_width=half_width(found, level),
        half_width_of_mean=half_width(mean, level),
        coverage=float(each.mean()),
        coverage_interval=(float(ends[0]), float(ends[1])),
        held_out=measured.groupby("group", sort=False).agg(n=("width", "size"), coverage=("coverage", "mean"), width=("width", "mean")).reset_index(),
        weights=weights,
        intercept=intercept,
        conformal=found,
        seen=known._replace(farthest=float(farthest)),
    )
    if groups is not None and (said := [*again, *out.cautions]):
        warnings.warn("; ".join(said), stacklevel=3)  # of the caller, past the decorator
    return out


def _digest(tensors: Mapping[str, np.ndarray], told: str) -> str:
    """SHA-256 of everything a saved predictor says."""
    joined = hashlib.sha256(told.encode("utf-8"))
    for name in sorted(tensors):
        joined.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        joined.update(tensors[name].tobytes())
    return joined.hexdigest()
