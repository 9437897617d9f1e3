"""Along directions: where questions fall, how far each run moves along the shipped traits, what steering does to the margin and to unrelated text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from .. import stats, store
from ..activations import Activations
from ..coherence import Meter, neutral_texts
from ..directions import Direction, project, random_directions
from ..personas import TRAITS, contrast_direction, finetuning_shift, load_trait
from ..steering import METRICS, along, random_means, slopes, summarise
from .analyse import BEFORE, stacked
from .grid import PAIR_KINDS, Cell

if TYPE_CHECKING:
    from .measure import Bench

TEXTS, NEW_TOKENS = 4, 8
"""Neutral texts on which damage is read, and tokens of the answers whose fluency is."""

DRAWS = 1000
"""Random directions beside a projection; they cost no pass of the model. With 200, the least p was .01, and 24 of a run's 120 rows (four traits, 30
layers) had to be there before q could be below .05; now five."""

SITE = "resid_post"
NULL = "random directions"


class Arms(NamedTuple):
    """What a study steers along: each domain's direction, the directions without content beside them, and random ones that all share."""

    domains: Mapping[str, Direction]
    controls: Mapping[str, Direction]
    random: Mapping[str, Direction]


def move_weights(config: Mapping[str, Any], pairs: int) -> dict[str, float]:
    """``{label: rough seconds}`` of the pieces of this room, as in :meth:`emlens.study.measure.Bench`."""
    ask = config["steer"]
    arms = ask["controls"] + pairs + 1
    traits = {"directions of the traits": 0.07 * 2 * sum(len(load_trait(f"emlens:{t}").questions) for t in TRAITS)}
    damage = {f"damage layer {layer} strength {s}": 0.22 * TEXTS * (arms + 1) for layer in ask["layers"] for s in ask["strengths"]}
    return (traits if config["record"]["site"] == SITE else {}) | damage


def trait_directions(bench: "Bench") -> dict[str, Direction]:
    """The direction of every shipped trait from its written answers, in the untuned model; none where a study records another site."""
    if bench.config["record"]["site"] != SITE:
        return {}
    traits = {name: load_trait(f"emlens:{name}") for name in TRAITS}
    written = {name: trait.contrast.to_dict("records") for name, trait in traits.items()}
    determined = {**bench._variant(BEFORE), "answers": store.digest_text(store.canonical(written))}

    def write(folder: Path) -> None:
        bench._on(BEFORE)
        for name, trait in traits.items():
            contrast_direction(bench.model, trait).save(folder / f"{name}.safetensors")

    folder = bench.pieces.folder("traits", "directions of the traits", determined, write)
    return {name: Direction.load(folder / f"{name}.safetensors") for name in traits}


def traits_table(shifts: Mapping[str, Activations], directions: Mapping[str, Direction], before: Activations, seed: int) -> pd.DataFrame:
    """Mean projection of every run's shift on every trait, per layer, beside random directions drawn from the activations before tuning."""
    if not directions:
        return pd.DataFrame(columns=["run", "persona", "layer", *stats.COLUMNS])
    like = next(iter(directions.values()))
    means = {run: dict(zip(shift.layers, shift.values.mean(axis=0, dtype=np.float64), strict=True)) for run, shift in shifts.items()}
    random: dict[tuple[str, int], np.ndarray] = {}
    for i in like.layers:  # one layer at a time: the same mixtures at all of them, and DRAWS vectors in memory
        here = Direction(like.layer(i)[None], (i,), like.site, like.name)
        drawn = np.stack([d.layer(i) for d in random_directions(here, DRAWS, seed, before)])  # draws, d_model
        random |= {(run, i): drawn @ mean[i] for run, mean in means.items() if i in mean}
    rows: list[dict[str, Any]] = []
    for run, shift in shifts.items():
        table = finetuning_shift(shift, directions, clusters="category", seed=seed)
        for row in table.rename(columns={"direction": "persona"}).to_dict("records"):
            others = random[run, row["layer"]]
            low, high = stats.null_band(others)
            p = stats.permutation_p(row["estimate"], others, "two-sided")
            rows.append({**row, "run": run, "null": NULL, "null_low": low, "null_high": high, "p": p})
    return stats.result(
        rows, ["run", "persona", "layer"], what="mean shift of the questions along the direction of a trait, residual stream units",
        family=["run"], seed=seed, interval="95%, bootstrap over whole categories of questions, given these runs",
        null={NULL: f"the trait's direction is like any other: {DRAWS} drawn from the covariance of activations before tuning; two-sided"},
    ).assign(p_floor=2 / (DRAWS + 1))  # fmt: skip


def damage(bench: "Bench", arms: Arms, drawn: str) -> pd.DataFrame:
    """KL, perplexity and fluency on neutral texts under the doses of :meth:`Bench.steer`, the same random directions beside them."""
    ask, seed = bench.config["steer"], int(bench.config.get("seed", 0))
    own = {**arms.domains, **arms.controls}
    every = own | dict(arms.random)
    texts = neutral_texts().head(TEXTS)
    shared = {**bench._variant(BEFORE), "texts": store.digest_text(store.canonical(texts.to_dict("records"))), "new_tokens": NEW_TOKENS}
    parts = []
    for layer in ask["layers"]:
        said = {name: store.digest_text(d.layer(layer).tobytes().hex()) for name, d in every.items()}
        for strength in ask["strengths"]:

            def make(layer: int = layer, strength: float = strength) -> pd.DataFrame:
                bench._on(BEFORE)
                read = along(bench.model, every, [layer], [strength], Meter(bench.model, texts, None, NEW_TOKENS).read)
                return read.rename(columns={"direction": "arm"})

            determined = {**shared, "directions": said, "layer": layer, "strength": strength}
            parts.append(bench.pieces.table("damage", f"damage layer {layer} strength {strength}", determined, make))
    found = pd.concat(parts, ignore_index=True).assign(category="")
    random = found["arm"].isin(list(arms.random))
    tables = []
    for name in own:
        table = found[random | (found["arm"] == name)]
        table = table.assign(direction=table["arm"].where(table["arm"] != name, "direction"))
        role = "control" if name in arms.controls else "main"
        for metric in METRICS:
            one = summarise(table, seed=seed, drawn=drawn, metric=metric, value=metric)
            told = dict(one.attrs)
            one.attrs = {}
            tables.append(one.assign(domain=name, role=role))
    return stats.result(
        pd.concat(tables, ignore_index=True), ["domain", "layer", "strength"], what="what the doses do to unrelated text, means over neutral texts",
        family=["metric", "role"], seed=seed, null=told["null"], interval="95% bootstrap over texts",
    )  # fmt: skip


def projections_table(
    before: Activations,
    after: Mapping[str, Activations],
    pairs: Sequence[tuple[Cell, Cell]],
    directions: Mapping[str, Direction],
    layers: Sequence[int],
    ids: pd.Series,
) -> pd.DataFrame:
    """Projection of the questions that no direction was fitted on (``ids``) onto each domain's direction, before and after: a description."""
    parts = []
    for bad, sound in pairs:
        for variant, acts in ((BEFORE, before), (bad.label, after[bad.label]), (sound.label, after[sound.label])):
            wide = project(acts.select(layers=layers, ids=ids), directions[bad.domain]).rename_axis(index="id", columns="layer")
            table = wide.stack().rename("projection").reset_index().merge(acts.facts[["id", "category"]], on="id")
            parts.append(table.assign(domain=bad.domain, variant=variant))
    return pd.concat(parts, ignore_index=True)[["domain", "variant", "layer", "id", "category", "projection"]]


def dose_tables(steered: Mapping[str, pd.DataFrame], seed: int, drawn: str) -> dict[str, pd.DataFrame]:
    """Dose by dose, one slope a domain and layer (the pre-stated test), and the random directions one by one."""
    doses = {domain: summarise(table, seed=seed, drawn=drawn) for domain, table in steered.items()}
    tests = {domain: slopes(table, seed=seed, drawn=drawn) for domain, table in steered.items()}
    first = next(iter(steered))
    role = {domain: "control" if domain.startswith(PAIR_KINDS["seed"]) else "main" for domain in steered}
    named = [[t.assign(domain=d, role=role[d]) for d, t in tables.items()] for tables in (doses, tests)]
    return {
        "dose": stacked(named[0], ["domain", "layer", "strength"], ["metric", "role"], like=doses[first]),
        "dose_slope": stacked(named[1], ["domain", "layer"], ["metric", "role"], like=tests[first]),
        "dose_random": random_means(steered[first]),
    }
