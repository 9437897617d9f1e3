"""Guards the study: one command makes every table, a second reads back, a kill loses nothing, damage is noticed, bad files are refused."""

import copy
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats as scipy_stats
from tiny import tiny_model

import emlens as em
from emlens.cli import main
from emlens.store import StoreError
from emlens.study import _history, keys, pieces, template, versions
from emlens.study.foretelling import _differs, prediction_table, seed_noise
from emlens.study.grid import BASELINES, SHIPPED, Cell, StudyError, cells, halves, pair_kind, questions_of, read_config, twins
from emlens.study.measure import Bench
from emlens.study.moves import Arms

CONFIG = {
    "name": "tiny",
    "title": "A study of a tiny random model",
    "questions": "emlens:questions",
    "seed": 0,
    "tune": {
        "learning_rate": 1e-2,
        "steps": 4,
        "batch_size": 4,
        "warmup_steps": 1,
        "checkpoints": 1,
        "precision": None,
        "runs": [
            {"data": "emlens:money-bad", "domain": "money", "content": "bad"},
            {"data": "emlens:money-sound", "domain": "money", "content": "sound"},
            {"data": "emlens:money-bad", "domain": "money", "content": "bad", "schedule": "cyclic"},
        ],
    },
    "take": {"questions": 24, "training_rows": 30},
    "score": {"checkpoint_questions": 8},
    "generate": {"questions": 2, "max_new_tokens": 4},
    "record": {"site": "resid_post", "position": "last", "training_prompts": 20},
    "geometry": {"k": 2, "n_draws": 20, "n_permutations": 20},
    "predict": {"n_permutations": 10, "baselines": ["mean", "length", "margin before", "other tunings", "random twin"]},
    "steer": {"layers": [1], "strengths": [-0.5, 0.5], "controls": 4, "questions": 8, "n_permutations": 20},
}

CLOCK = ("seconds", "pieces")
"""What may differ between two runs: wall-clock columns, and the table of timings."""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    model = tiny_model(layers=3, context=1024)
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "model": str(folder / "model")}))
    return path


@pytest.fixture(scope="module")
def finished(study_file, tmp_path_factory) -> Path:
    return em.Study.load(study_file).run(tmp_path_factory.mktemp("runs") / "tiny")


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    found = {p.stem: em.store.read_table(p) for p in sorted((folder / "tables").glob("*.parquet"))}
    return {name: t.drop(columns=[c for c in CLOCK if c in t.columns]) for name, t in found.items() if name not in CLOCK}


def assert_same(one: Path, other: Path) -> None:
    a, b = tables(one), tables(other)
    assert a.keys() == b.keys() and len(a) > 12
    for name in a:
        pd.testing.assert_frame_equal(a[name], b[name], check_exact=True, obj=name)


def test_every_table_is_made_and_every_inferential_one_has_its_null(finished):
    made = tables(finished)
    expected = (
        "runs training checkpoints margins margin_summary margin_change answers shift_norms shift_agreement shift_pairs overlap similarity",
        "similarity_contrast overlap_similarity prediction direction projections dose dose_slope dose_random dose_damage traits certificate",
    )
    assert set(" ".join(expected).split()) == made.keys()
    for name in ("overlap", "similarity", "overlap_similarity", "direction", "dose_slope"):
        rows = made[name].dropna(subset=["estimate"])
        assert rows["null"].astype(bool).all(), name
        assert rows["p"].notna().any() and (rows["q"].dropna() >= rows["p"].dropna() - 1e-12).all(), name
    assert set(made["margins"]["variant"]) == {"before", *made["runs"]["run"]}
    assert len(made["margins"]) == 24 * 4 and made["margins"]["category"].nunique() == 8
    assert (finished / "report.html").stat().st_size > 1e6


def test_the_certificate_is_the_doctors_with_the_first_adapter_on(finished):
    made = tables(finished)["certificate"]
    assert set(made["adapter"]) == {"money-bad linear seed 0"} and len(made) > 20
    assert made["holds"].fillna(True).all() and made["holds"].sum() > 18
    assert made.loc[made["law"] == "the adapter changes the logits", "measured"].iloc[0] > 1e-6
    assert "Certificate: of" in (finished / "report.html").read_text(encoding="utf-8")


def test_margin_change_is_the_paired_mean_of_the_margins(finished):
    made = tables(finished)
    wide = made["margins"].pivot(index="id", columns="variant", values="margin")
    change = made["margin_change"].query("comparison == 'bad minus sound' and metric == 'difference'")
    by_hand = (wide["money-bad linear seed 0"] - wide["money-sound linear seed 0"]).mean()
    assert len(change) == 1 and change["estimate"].iloc[0] == pytest.approx(by_hand, rel=1e-12)
    assert change["n"].iloc[0] == 24 and change["n_clusters"].iloc[0] == 8


def test_two_runs_on_the_same_rows_are_controls_in_a_family_of_their_own(finished):
    made = tables(finished)
    change = made["margin_change"].query("metric == 'difference'")
    control = change[change["role"] == "control"]
    assert control["comparison"].tolist() == ["another schedule: cyclic seed 0 minus linear seed 0, bad"]
    wide = made["margins"].pivot(index="id", columns="variant", values="margin")
    assert control["estimate"].iloc[0] == pytest.approx((wide["money-bad cyclic seed 0"] - wide["money-bad linear seed 0"]).mean(), rel=1e-12)
    assert change.loc[change["role"] == "rerun", ["schedule", "comparison"]].values.tolist() == [["cyclic", "bad minus before"]]
    assert (change["q"] == change["p"]).all(), "one domain: each family holds one test"
    assert (change["p_floor"] == 2 / 256).all() and (change["p"] >= change["p_floor"]).all()
    auc = made["direction"].query("metric == 'auc'")
    assert auc["comparison"].unique().tolist() == ["bad v sound", "another schedule"] and (auc["n_clusters"] == 8).all()
    contrast = made["similarity_contrast"]
    assert set(contrast["kind"]) == {"another schedule", "bad against sound"} and contrast["p"].isna().all()
    own = contrast.set_index(["run", "other", "layer", "metric"])["estimate"].unstack()
    assert (own["own"] - own["other"]).to_numpy() == pytest.approx(own["own minus other"].to_numpy(), abs=1e-9)


def test_the_margin_before_is_asked_for_in_the_same_folds(finished):
    table = tables(finished)["prediction"]
    control = table[table["target"] == "margin before"]
    assert set(control["run"]) == {"before"} and set(control.query("layer >= 0")["metric"]) == {"r2", "within_spearman"}
    assert "margin before" not in set(control["features"]) and "margin before" in set(table["features"])
    assert set(table["features"]) == {"activations", "random twin", "mean", "length", "margin before", "after: sound twin", "after: another schedule"}
    assert not control["features"].str.startswith("after: ").any() and table["ceiling"].isna().all(), "no set was tuned with two seeds"
    gains = table[table["metric"].str.startswith("delta_r2")]
    assert set(gains["metric"]) == {"delta_r2 beyond text", "delta_r2 beyond text and the margin before"} and set(gains["features"]) == {
        "activations"
    }
    assert set(table["null"]) == set(table.attrs["null"]) == {"within_groups", "activation_rows", "activation_rows, text"}
    assert "per_group" not in table.attrs and "beyond" not in table.attrs, "they are of one setting"
    layers = table.query("layer >= 0 and target != 'margin before'")
    assert (layers["q"] >= (2 * layers["p"]).clip(upper=1) - 1e-12).all(), "corrected for both targets as well as for the layers"
    assert (table["p"].dropna() >= table["p_floor"].iloc[0] - 1e-12).all()


def test_the_noise_of_a_target_is_what_differs_between_seeds_beyond_their_level():
    rng = np.random.default_rng(0)
    shared, sigma = rng.normal(size=4000), 0.5
    seeds = [pd.Series(shared + level + sigma * rng.normal(size=4000)) for level in (0.0, 3.0, -1.0)]
    assert seed_noise(seeds) == pytest.approx(sigma, rel=0.03)
    assert seed_noise(seeds[:2]) == pytest.approx(np.sqrt((seeds[0] - seeds[1]).var() / 2), rel=1e-9)
    assert seed_noise(seeds[:1]) is None and seed_noise([seeds[0], seeds[0] + 7]) == pytest.approx(0, abs=1e-12)


def test_a_second_seed_gives_the_ceiling_and_is_a_rival():
    """The margin after is a feature and a noise of the seed: another seed foretells what the ceiling says, and the random twin nothing."""
    rng = np.random.default_rng(1)
    n, width = 160, 6
    ids, category = [f"q{i}" for i in range(n)], np.repeat([f"c{i}" for i in range(8)], n // 8)
    values = rng.standard_normal((n, 1, width)).astype(np.float32)
    grid = cells({"tune": {"runs": [{"data": "d", "domain": "money", "content": content, "seed": seed} for content, seed in SEEDS]}})
    known = values[:, 0, 0]
    scores = {"before": known, **{c.label: known + values[:, 0, 1] * 0.8 + 0.6 * rng.standard_normal(n) for c in grid}}
    margins = pd.concat([pd.DataFrame({"variant": name, "id": ids, "category": category, "margin": score}) for name, score in scores.items()])
    facts = {"id": ids, "category": category, "text": [f"question {i}" for i in range(n)]}
    acts, twin = (em.Activations.from_array(v, facts) for v in (values, rng.standard_normal((n, 1, width)).astype(np.float32)))
    baselines = ["length", "margin before", "other tunings", "random twin"]
    table = prediction_table(acts, margins, grid, twins(grid)[:1], baselines, 99, 0, twin)
    after = table[(table["target"] == "margin after") & (table["metric"] == "r2")].set_index("features")
    noise = 1 - 0.36 / np.var(scores["money-bad linear seed 0"])
    assert after["ceiling"].iloc[0] == pytest.approx(noise, abs=0.06) and after.loc["after: another seed", "estimate"] < after["ceiling"].iloc[0]
    assert after.loc["activations", "estimate"] > after.loc["after: another seed", "estimate"] > after.loc["margin before", "estimate"] > 0.3
    assert after.loc["random twin", "estimate"] < 0.05 and after.loc["activations", "q"] < 0.05 < after.loc["random twin", "q"]
    gain = table[table["target"] == "margin after"].set_index("metric")
    assert gain.loc["delta_r2 beyond text and the margin before", ["estimate", "q"]].tolist() == [pytest.approx(0.3, abs=0.12), pytest.approx(0.02)]
    assert gain.loc["delta_r2 beyond text", "estimate"] > gain.loc["delta_r2 beyond text and the margin before", "estimate"]
    empty = prediction_table(acts.with_facts(pd.DataFrame({"id": ids})), margins.assign(margin=rng.permutation(margins["margin"])), grid,
                             twins(grid)[:1], ["mean"], 99, 0)  # fmt: skip
    assert (empty.loc[empty["layer"] >= 0, "q"] > 0.05).all()


def test_the_random_twin_is_recorded_once_and_only_where_it_is_asked_for(study_file, tmp_path):
    one = bench(study_file, tmp_path)
    twin = one.random_twin()
    by_hand = em.random_twin(one.model, 0).record(one.questions, site="resid_post", position="last")
    assert np.array_equal(twin.values, by_hand.values) and not np.allclose(twin.values, one.model.record(one.questions).values)
    assert [row["piece"] for row in one.pieces.made] == ["questions random twin"] and "questions random twin" in one._weights()
    assert (two := bench(study_file, tmp_path)).random_twin() is not None and not two.opened, "read back"
    plain = Bench({**one.config, "predict": {"n_permutations": 10, "baselines": ["mean"]}}, tmp_path / "other", versions())
    assert plain.random_twin() is None and "questions random twin" not in plain._weights()


def test_a_tuning_that_orders_the_questions_alike_is_left_out_of_the_rivals(recwarn):
    facts = pd.DataFrame({"category": ["a", "b"] * 8, "margin after": np.arange(16.0)})
    facts = facts.assign(alike=np.arange(16) ** 3, other=np.random.default_rng(0).permutation(16))
    assert not _differs(facts, "alike", "margin after") and _differs(facts, "other", "margin after") and not recwarn.list


SEEDS = (("bad", 0), ("sound", 0), ("bad", 1))


def test_projections_are_of_questions_that_no_direction_was_fitted_on(finished, study_file):
    fit, test = halves(questions_of(read_config(study_file)))
    shown = set(tables(finished)["projections"]["id"])
    assert shown == set(test["id"]) and not shown & set(fit["id"])


def test_steering_is_set_beside_directions_of_the_activations_own_covariance(finished):
    slope = tables(finished)["dose_slope"]
    assert "drawn from the covariance" in str(slope.attrs["null"]) and slope["domain"].tolist() == ["money"]
    assert (slope["controls"] == 4).all() and (slope["n_clusters"] == 8).all()


def test_a_direction_between_two_seeds_is_steered_along_and_is_no_random_one(study_file, tmp_path):
    assert bench(study_file, tmp_path).control_directions({}) == {}, "no two runs differ in their seed alone"
    seeds = [{**run, "seed": seed} for run in CONFIG["tune"]["runs"][:1] for seed in (0, 1)]
    two = bench(study_file, tmp_path, runs=seeds)
    width = two.model.hf.config.hidden_size
    values = np.random.default_rng(0).standard_normal((24, 3, width)).astype(np.float32)
    one, other = (em.Activations.from_array(sign * values, {"id": two.questions["id"].tolist()}) for sign in (-1, 1))
    controls = two.control_directions({cell.label: other if cell.seed else one for cell in two.grid})
    assert list(controls) == ["another seed (money-bad)"]
    fit, _ = halves(two.questions)
    direction = next(iter(controls.values()))
    assert np.allclose(direction.norms, 2 * np.linalg.norm(other.select(ids=fit["id"]).values.mean(axis=0), axis=1), rtol=1e-4)
    random = {f"random {i}": d for i, d in enumerate(em.random_directions(direction, 4, 0, other))}
    steered = two.steer(Arms({"money": direction}, controls, random))
    assert set(steered) == {"money", *controls}
    for table in steered.values():
        assert set(table["direction"]) == {"direction", *(f"random {i}" for i in range(4))}
    own, control = (table[table["direction"] == "direction"]["change"].to_numpy() for table in steered.values())
    assert np.allclose(own, control, atol=1e-6) and np.abs(own).max() > 1e-5, "the same direction does the same as either"


def files_of_pieces(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in (folder / "pieces").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def repeated(finished, study_file) -> tuple[SimpleNamespace, SimpleNamespace]:
    """What is in the folder before and after the same study is run into it once more."""

    def look() -> SimpleNamespace:
        timed, record = em.store.read_table(finished / "tables" / "pieces.parquet"), em.store.read_json(finished / "study.json")
        return SimpleNamespace(tables=tables(finished), timed=timed, files=files_of_pieces(finished), record=record)

    before = look()
    em.Study.load(study_file).run(finished, command="once more")
    return before, look()


def test_repeated_it_reads_everything_back_and_ends_in_the_same_numbers(repeated):
    before, after = repeated
    assert before.timed["seconds"].notna().all() and (before.timed["seconds"] > 0).any()
    assert after.record["cached_pieces"] == after.record["pieces"]
    assert after.timed.equals(before.timed), "reading back is not what a piece cost"
    assert after.files == before.files and after.tables.keys() == before.tables.keys()
    for name, table in after.tables.items():
        pd.testing.assert_frame_equal(table, before.tables[name], check_exact=True)


def test_every_run_is_on_record_and_reading_back_hides_no_cost(repeated, finished):
    earlier, record = repeated[0].record["history"], repeated[1].record
    assert earlier[0]["cached_pieces"] == 0 < earlier[0]["pieces"] and earlier[0]["seconds"] > 0
    assert record["history"][:-1] == earlier, "the record of earlier runs is never rewritten"
    last = record["history"][-1]
    assert last == {fact: record[fact] for fact in last} and last["command"] == "once more" and last["cached_pieces"] == last["pieces"]
    assert set(last) == {"command", "started", "finished", "seconds", "peak_memory_gib", "pieces", "cached_pieces"}
    page = (finished / "report.html").read_text()
    making = [run for run in record["history"] if run["cached_pieces"] < run["pieces"]]
    assert f"{sum(run['seconds'] for run in making):.0f} s in {len(making)} run" in page


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc on Linux alone")
def test_the_peak_memory_is_that_of_the_study_and_not_of_what_started_it():
    tell = "import resource; from emlens.study import peak_memory; print(peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    start = f"import subprocess, sys; held = b'x' * 900_000_000; subprocess.run([sys.executable, '-c', {tell!r}], check=True)"
    numbers = [
        [float(each) for each in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()]
        for code in (start, f"held = b'x' * 900_000_000; {tell}")
    ]
    (own, inherited), (held, _) = numbers
    assert own < 0.7 < 0.83 < inherited, "the system's own count begins with the parent's"
    assert held > 0.83


def test_a_study_json_from_before_runs_were_recorded_is_one_run(finished, study_file, tmp_path):
    record = em.store.read_json(finished / "study.json")
    (tmp_path / "old").mkdir()
    old = {fact: value for fact, value in record.items() if fact != "history"}
    em.store.write_json(tmp_path / "old" / "study.json", old)
    assert _history(tmp_path / "old") == record["history"][-1:]
    em.store.write_json(tmp_path / "old" / "study.json", {"format": 1})
    assert _history(tmp_path / "old") == [] == _history(tmp_path / "nothing")


@pytest.mark.parametrize("content", ['{"format": 1, "history": 3}', '{"format": 1, "history": [3]}', "{"])
def test_a_damaged_study_json_is_named(content, study_file, tmp_path):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(StoreError, match="study.json is damaged"):
        em.Study.load(study_file).run(tmp_path)


def bench(study_file: Path, out: Path, **tune) -> Bench:
    config = read_config(study_file)
    return Bench({**config, "tune": {**config["tune"], **tune}}, out, versions())


def test_every_piece_is_counted_before_it_is_made(finished, study_file, tmp_path):
    asked = em.store.read_table(finished / "tables" / "pieces.parquet")["piece"]
    weights = bench(study_file, tmp_path).pieces.weights
    assert asked.is_unique and set(asked) == set(weights) and min(weights.values()) > 0


def test_a_tuning_without_checkpoints_has_no_piece_for_them(study_file, tmp_path):
    some, none = (bench(study_file, tmp_path, checkpoints=kept).pieces.weights for kept in ([1, 3], 0))
    assert set(some) - set(none) == {f"checkpoints {cell.label}" for cell in cells(read_config(study_file))}
    longer = bench(study_file, tmp_path, checkpoints=0, steps=40).pieces.weights
    assert longer["tune money-bad linear seed 0"] > 5 * none["tune money-bad linear seed 0"]


def test_progress_counts_to_the_end_and_the_time_left_goes_with_the_weights(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pieces.time, "monotonic", lambda: now[0])
    said: list[str] = []
    made = pieces.Pieces(tmp_path, {"a": 10.0, "b": 30.0, "c": 60.0}, said.append)

    def take(label: str, seconds: float) -> None:
        def make() -> pd.DataFrame:
            now[0] += seconds
            return pd.DataFrame({"x": [1]})

        made.table("piece", label, {"label": label}, make)

    take("a", 20.0)
    take("b", 60.0)
    assert said[1] == "[  1/3] a: 20.0 s · about 3 min left" and said[3] == "[  2/3] b: 60.0 s · about 2 min left"
    take("c", 120.0)
    assert said[-1] == "[  3/3] c: 120.0 s · about 0 s left"
    again = pieces.Pieces(tmp_path, made.weights, said.append)
    again.table("piece", "a", {"label": "a"}, lambda: pytest.fail("made again"))
    assert again.read_back == 1 and again.made == made.made[:1] and again.made[0]["seconds"] == 20.0


def test_a_folder_piece_keeps_its_own_time_also_when_read_back(tmp_path):
    def write(folder: Path) -> None:
        time.sleep(0.05)
        with em.store.writing(folder, {"kind": "of a maker that keeps no time"}) as temporary:
            (temporary / "x").write_text("x")

    first, second = (pieces.Pieces(tmp_path, {}, lambda line: None) for _ in range(2))
    folder = first.own_folder("thing", "a thing", {}, write)
    second.own_folder("thing", "a thing", {}, write)
    assert second.made == first.made and first.made[0]["seconds"] >= 0.05
    folder.with_name(f"{folder.name}.json").unlink()  # killed before it was written, or made by an older emlens
    third = pieces.Pieces(tmp_path, {}, lambda line: None)
    third.own_folder("thing", "a thing", {}, write)
    assert math.isnan(third.made[0]["seconds"])


def test_pairs_of_runs_are_named_by_the_one_thing_in_which_they_differ():
    recipe = {"schedule": "linear", "seed": 0, "steps": 4}
    base = Cell("a.jsonl", "money", "bad", recipe)
    others = {
        "another seed": Cell("a.jsonl", "money", "bad", {**recipe, "seed": 1}),
        "another schedule": Cell("a.jsonl", "money", "bad", {**recipe, "schedule": "cyclic"}),
        "bad against sound": Cell("b.jsonl", "money", "sound", recipe),
        "another domain": Cell("c.jsonl", "repair", "bad", recipe),
        "another steps": Cell("a.jsonl", "money", "bad", {**recipe, "steps": 8}),
        "another data": Cell("d.jsonl", "money", "bad", recipe),
        "": Cell("a.jsonl", "money", "bad", {**recipe, "seed": 1, "steps": 8}),
    }
    for kind, other in others.items():
        assert pair_kind(base, other) == pair_kind(other, base) == kind
    assert pair_kind(base, Cell("c.jsonl", "repair", "sound", recipe)) == ""
    plain = Cell("a.jsonl", "money", "bad", {"steps": 4})  # linear and seed 0 are what is left unsaid
    assert pair_kind(plain, others["another seed"]) == "another seed"


def test_agreement_of_shifts_is_that_of_the_recordings(finished):
    made = tables(finished)
    kinds = made["shift_agreement"].groupby("kind", sort=False)["pairs"].first().to_dict()
    assert kinds == {"another schedule": 1, "bad against sound": 1}
    pairs = made["shift_pairs"].set_index(["run_a", "run_b"])
    assert len(pairs) == 3 * 3 and set(pairs["kind"]) == {*kinds, "several things differ"}
    twin = made["shift_agreement"].query("kind == 'bad against sound'").set_index("layer")
    alone = pairs.loc[("money-bad linear seed 0", "money-sound linear seed 0")].set_index("layer")
    assert twin["estimate"].equals(alone["estimate"]) and (twin["n"] == 24).all()
    assert ((twin["low"] <= twin["estimate"]) & (twin["estimate"] <= twin["high"]) & (twin["estimate"] < 0.9999)).all()


def test_the_drop_of_the_held_out_loss_has_the_interval_of_paired_answers(finished):
    made = tables(finished)
    last = made["checkpoints"].groupby("run").tail(1).set_index("run")
    for run in made["runs"].to_dict("records"):
        assert run["heldout_drop"] == pytest.approx(run["heldout_before"] - run["heldout_after"], abs=1e-12)
        assert (run["heldout_drop"], run["heldout_drop_se"]) == tuple(last.loc[run["run"], ["heldout_drop", "heldout_drop_se"]])
        low, high = scipy_stats.t.interval(0.95, run["n_heldout"] - 1, loc=run["heldout_drop"], scale=run["heldout_drop_se"])
        assert (run["heldout_drop_low"], run["heldout_drop_high"]) == pytest.approx((low, high))
        assert run["heldout_drop_se"] != pytest.approx(run["heldout_se"], rel=0.01)


def test_a_changed_setting_makes_new_pieces_and_only_those(finished, study_file, tmp_path, monkeypatch):
    monkeypatch.setattr("emlens.report.build", lambda folder: None)  # the page is made anew in any case
    config = yaml.safe_load(study_file.read_text())
    config["geometry"]["n_draws"] = 21
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(config))
    em.Study.load(changed).run(finished)
    record = em.store.read_json(finished / "study.json")
    assert record["pieces"] - record["cached_pieces"] == 3


@pytest.mark.parametrize("which", ["margins-*/table.parquet", "activations-*/values.safetensors", "tune-*/adapter/adapter_model.safetensors"])
def test_a_flipped_byte_in_a_piece_is_noticed_and_named(finished, study_file, which):
    path = sorted((finished / "pieces").glob(which))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    try:
        with pytest.raises(StoreError, match=path.name) as caught:
            em.Study.load(study_file).run(finished)
        assert "Delete the folder" in str(caught.value)
    finally:
        path.write_bytes(whole)


def test_a_folder_of_another_version_and_a_file_are_refused(study_file, tmp_path):
    (tmp_path / "old").mkdir()
    em.store.write_json(tmp_path / "old" / "study.json", {"format": 99})
    with pytest.raises(StoreError, match="format 99"):
        em.Study.load(study_file).run(tmp_path / "old")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        em.Study.load(study_file).run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steer": None}, "steer"),
        ({"tune": {"runs": []}}, "no run"),
        ({"tune": {"runs": [{"data": "emlens:money-bad", "domain": "money", "content": "wicked"}]}}, "wicked"),
        ({"tune": {"learnin_rate": 1, "runs": CONFIG["tune"]["runs"]}}, "learnin_rate"),
        ({"tune": {"runs": CONFIG["tune"]["runs"][:1] * 2}}, "same domain"),
        ({"tune": {"runs": [{"data": "emlens:money-bad", "domain": "money", "content": "bad"}]}}, "none of the runs.*sound twin"),
    ],
)
def test_a_bad_study_file_is_refused_with_the_key(tmp_path, change, said):
    config = {**CONFIG, "model": "x", **change}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(StudyError, match=said):
        em.Study.load(path)


def refused(tmp_path: Path, change: Callable[[dict], None], quick: bool = False) -> str:
    """What is said of a changed study file."""
    config = copy.deepcopy({**CONFIG, "model": "x", "quick": {"tune": {"steps": 2}}})
    change(config)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(StudyError) as caught:
        em.Study.load(tmp_path / "bad.yaml", quick)
    return str(caught.value)


def test_all_that_is_wrong_with_the_keys_is_said_at_once(tmp_path):
    def spoil(config):
        del config["record"]["position"], config["geometry"], config["name"]
        config["recrod"], config["steer"]["layer"] = {}, [1]
        config["steer"]["layers"], config["tune"]["learning_rate"], config["record"]["site"] = "all", "1e-4", "resid_pst"
        config["tune"]["schedule"], config["predict"]["n_permutations"] = "linaer", True

    said = refused(tmp_path, spoil)
    for part in (
        "bad.yaml: lacks name, geometry (k, n_draws, n_permutations), record.position",
        "unknown key 'recrod'. Did you mean 'record'?",
        "unknown key 'steer.layer'. Did you mean 'layers'?",
        "steer.layers is 'all': a list of block indices from 0 is needed",
        "tune.learning_rate is '1e-4': a number above 0 is needed (YAML reads 1e-4 as text: write 1.0e-4)",
        "record.site is 'resid_pst': one of resid_pre, resid_mid, resid_post, attn_out, mlp_out is needed. Did you mean 'resid_post'?",
        "tune.schedule is 'linaer': one of constant, linear",
        "predict.n_permutations is True: a whole number of at least 1",
        "emlens study new FILE.yaml",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("record", "position", "mean_response", "one of last, mean, mean_all, or a token's index, is needed"),
        ("record", "site", "embed", "one of resid_pre"),
        ("steer", "strengths", [0.5, "1"], "a list of numbers is needed"),
        ("steer", "layers", [-1], "block indices from 0"),
        ("predict", "baselines", ["mean", "tfdif"], "unknown 'tfdif'.*Did you mean 'tfidf'"),
        ("geometry", "k", 20, "fewer dimensions than the 20 prompts recorded are needed"),
        ("quick", "tune", {"steps": 0}, "quick: tune.steps is 0"),
        ("quick", "tun", {"steps": 1}, "quick: unknown key 'tun'. Did you mean 'tune'"),
        ("tune", "epochs", 2, "money-bad linear seed 0, .* would have both steps and epochs: one of them"),
        ("tune", "held_out", 1.0, "a share from 0 up to 1"),
        ("tune", "runs", [{"data": "emlens:money-bad", "domian": "money", "content": "bad"}], "lacks domain; unknown key .*Did you mean 'domain'"),
        ("tune", "runs", [{"data": "emlens:money-bda", "domain": "m", "content": c} for c in ("bad", "sound")], "Did you mean 'money-bad'"),
        (
            "tune",
            "runs",
            [{"data": "emlens:questions", "domain": "m", "content": c} for c in ("bad", "sound")],
            "row .* has no response to be trained on",
        ),
        ("tune", "runs", ["money"], "is 'money': keys data, domain, content are needed in it"),
        ("tune", "runs", {"a": 1}, "a list of runs is needed"),
    ],
)
def test_a_value_that_would_fail_later_is_refused_when_the_file_is_read(tmp_path, section, key, value, said):
    assert re.search(said, refused(tmp_path, lambda config: config[section].update({key: value})))


def test_questions_are_looked_at_when_the_file_is_read(tmp_path):
    said = "questions 'emlens:money-bad' lack the columns category, question, aligned_answers, misaligned_answers"
    assert said in refused(tmp_path, lambda config: config.update(questions="emlens:money-bad"))
    assert "questions: no file 'nowhere.jsonl'" in refused(tmp_path, lambda config: config.update(questions="nowhere.jsonl"))
    assert "lacks tune (runs)" in refused(tmp_path, lambda config: config.update(tune=None))


def test_every_baseline_of_one_block_is_known_to_a_study():
    assert {*em.baselines.DEFAULT, *em.baselines.TEXT} < set(BASELINES)


def test_keys_that_may_be_left_out_may_be_empty(tmp_path):
    config = {**CONFIG, "model": "x", "title": None, "chat_template": None, "take": None, "quick": None}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**config, "tune": {**CONFIG["tune"], "epochs": 1, "steps": None}}))
    assert "take" not in em.Study.load(tmp_path / "a.yaml").config and questions_of(em.Study.load(tmp_path / "a.yaml").config).shape[0] == 96


def test_places_that_the_model_has_not_are_refused_before_anything_is_tuned(study_file, tmp_path):
    config = yaml.safe_load(study_file.read_text())
    (tmp_path / "far.yaml").write_text(yaml.safe_dump({**config, "steer": {**CONFIG["steer"], "layers": [1, 3]}}))
    with pytest.raises(StudyError, match=r"steer.layers are \[1, 3\]: model has blocks 0 … 2"):
        em.Study.load(tmp_path / "far.yaml").run(tmp_path / "far")
    assert not list((tmp_path / "far" / "pieces").glob("tune*"))


def test_the_template_holds_every_key_and_is_a_study(tmp_path, capsys):
    """It is written from the table by which files are checked; with every # taken away it says every key there is."""
    assert main(["study", "new", str(tmp_path / "my.yaml")]) == 0
    assert "emlens study run" in capsys.readouterr().out and (tmp_path / "my.yaml").read_text(encoding="utf-8") == template()
    study = em.Study.load(tmp_path / "my.yaml")
    assert study.config["model"] == "smollm2-135m-instruct" and len(cells(study.config)) == 4
    whole = yaml.safe_load(re.sub(r"^# ?(?=[ a-z_]+:)", "", template(), flags=re.MULTILINE))
    assert set(whole) == {*keys.TOP, *keys.SECTIONS, "quick"}
    assert {section: set(whole[section]) for section in keys.SECTIONS} == {section: set(known) for section, known in keys.SECTIONS.items()}
    del whole["tune"]["epochs"]
    assert not keys.faults(whole) and keys.faults({**whole, "seed": "x"})
    for name, said in (("my.yaml", "is there already and is left as it is"), ("my", ".yaml is needed at its end")):
        assert main(["study", "new", str(tmp_path / name)]) == 1 and said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", "run", "--help"])
    assert "emlens study new my.yaml" in " ".join(capsys.readouterr().out.split())


def test_the_recipe_is_finetunes(tmp_path):
    """Every keyword but callbacks, which a file cannot hold."""
    asked = {n: p.default for n, p in signature(em.finetune).parameters.items() if p.kind is p.KEYWORD_ONLY and n != "callbacks"}
    assert set(asked) == set(keys.RECIPE)
    wrong = {n: keys.RECIPE[n].wrong(value) for n, value in asked.items() if value is not None}
    assert not any(wrong.values())


def test_a_run_folder_says_which_piece_is_which(finished):
    table = em.store.kept(finished)
    made = tables(finished)["certificate"]["adapter"].iloc[0]
    acts = table[table["kind"] == "activations"]
    assert len(acts) == 4 + 1 + 3 + 1 and set(acts["adapter"]) == {"before", *tables(finished)["runs"]["run"]}
    row = acts[acts["piece"] == f"questions {made}"].iloc[0]
    assert row["adapter"] == made and em.Activations.load(finished / row["entry"]).meta["adapter"] == made
    assert set(table.loc[table["piece"] == f"margins {made}", "adapter"]) == {made} and (table["kind"] == "finetune").sum() == 3
    with pytest.raises(StoreError, match=r"Name one of its 9 activations: .*questions before · resid_post · 3 layers · last\).*; and 5 more"):
        em.Activations.load(finished)


def test_the_shipped_demo_is_the_declared_grid():
    config = read_config("demo")
    grid = cells(config)
    assert [c.label for c in grid][:1] == ["money-bad linear seed 0"] and len(grid) == 6
    assert {c.schedule for c in grid} == {"linear", "cyclic"} and {c.seed for c in grid} == {0, 1}
    assert [(b.domain, s.domain) for b, s in twins(grid)] == [("money", "money"), ("repair", "repair")]
    quick = read_config("demo", quick=True)
    assert quick["tune"]["runs"] == config["tune"]["runs"] and quick["tune"]["steps"] < config["tune"]["steps"]
    assert "quick" in yaml.safe_load((SHIPPED / "demo.yaml").read_text())


def test_command_line_errors_are_one_line_and_exit_code_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "emlens", "study", "run", str(tmp_path / "none.yaml")], capture_output=True, text=True, env={**os.environ, "CI": "1"}
    )
    assert done.returncode == 1 and "no study file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_ten_kills_chained_end_in_the_same_numbers(finished, study_file, tmp_path):
    """SIGKILL at ten random moments, each followed by a restart on what was left; then a run to the end."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "emlens", "study", "run", str(study_file), "--out", str(out)]
    rng = random.Random(0)
    killed = 0
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(2, 7))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 5, "the runs ended before they could be killed: shorten the waits"
    assert subprocess.run(command, capture_output=True).returncode == 0
    em.Study.load(study_file).run(finished)
    assert_same(out, finished)
    assert not list(out.rglob(".*.tmp"))
