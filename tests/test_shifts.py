"""Guards shifts: how long, how alike to the training prompts' and to another tuning's; nulls that hold and nulls that fall."""

from dataclasses import replace

import numpy as np
import pytest
from planted import LAYERS, D, acts, isotropic
from scipy import stats as scipy_stats
from sklearn.metrics.pairwise import paired_cosine_distances

from emlens import shifts, stats, subspaces


def test_shift_norms_are_medians():
    before, after = acts(isotropic(21, 1), LAYERS), acts(isotropic(21, 1) + 0.5, LAYERS)
    table = shifts.shift_norms(after - before, before)
    assert np.allclose(table["norm"], 0.5 * np.sqrt(D), atol=1e-5) and table["layer"].tolist() == [3, 7]
    assert np.allclose(table["relative"], table["norm"] / np.median(np.linalg.norm(before.values, axis=2), axis=0))


def test_shift_norms_carry_the_rounding_noise_of_16_bits():
    shift = acts(isotropic(21, 1), LAYERS)
    noisy = replace(shift, meta={"noise_floor": {3: 0.01, 7: 0.02}})
    assert "noise" not in shifts.shift_norms(shift, shift)
    rounding = 0.02 * isotropic(500, 2)[:, 0]  # of that rms a number: as long as the table says
    assert shifts.shift_norms(noisy, shift)["noise"].iloc[1] == pytest.approx(np.sqrt((np.linalg.norm(rounding, axis=1) ** 2).mean()), rel=0.02)


RECORDED = {"model": "tiny", "adapter": "bad", "prompts_sha256": "p" * 64}
"""Some of what a recording says of itself."""

ASKED = {
    "shift_norms": lambda s, ok: shifts.shift_norms(s, ok),
    "mean_share": lambda s, ok: shifts.mean_share(s),
    "mean_share of others": lambda s, ok: shifts.mean_share(ok, s),
    "shift_cosines": lambda s, ok: shifts.shift_cosines({"a": ok, "b": s}),
    "shift_agreement": lambda s, ok: shifts.shift_agreement([(ok, ok), (ok, s)], n_boot=20),
    "similarity": lambda s, ok: shifts.similarity(ok, s, n_draws=20),
    "similarity to": lambda s, ok: shifts.similarity(s, ok, n_draws=20),
    "similarity_contrast": lambda s, ok: shifts.similarity_contrast(ok, s, ok),
    "split_half_similarity": lambda s, ok: shifts.split_half_similarity(s, n_splits=3, n_draws=20),
    "similarity_by_prompt": lambda s, ok: shifts.similarity_by_prompt(ok, s),
    "overlap_similarity": lambda s, ok: shifts.overlap_similarity(ok, ok, ok, s, k=2, n_permutations=20),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_recording_is_no_shift(name):
    """Forgetting to subtract `before` would give a similarity near 1 of any two tunings: the stream itself."""
    plain = acts(isotropic(20, 1), LAYERS)
    before, after = replace(plain, meta={**RECORDED, "adapter": None}), replace(acts(isotropic(20, 2), LAYERS), meta=RECORDED)
    ASKED[name](after - before, plain)
    ASKED[name](plain, plain)  # of an array nobody knows
    with pytest.raises(ValueError, match=r"is a recording \(Activations 20 prompts.*tiny · adapter bad\): a shift is needed, after - before"):
        ASKED[name](after, plain)


# ---- what the mean explains, and how alike tunings are


def test_the_share_of_the_mean_is_its_formula_and_found_where_it_was_planted():
    train, other = acts(0.5 + isotropic(200, 1), LAYERS), acts(0.5 + isotropic(40, 2), LAYERS, category=np.repeat(["x", "y"], 20))
    table = shifts.mean_share(train, other, clusters="category").set_index("layer")
    d, nu = other.layer(7).astype(float), train.layer(7).mean(axis=0, dtype=float)
    assert table.loc[7, "estimate"] == pytest.approx(1 - ((d - nu) ** 2).sum() / (d**2).sum(), abs=1e-9)
    assert table.loc[7, "estimate"] == pytest.approx(0.25 / 1.25, abs=0.03)  # variance 1 and mean 0.5 in every dimension
    assert (table["low"] <= table["estimate"]).all() and (table["estimate"] <= table["high"]).all() and (table["n"] == 40).all()
    opposite = shifts.mean_share(train, acts(-other.values, LAYERS))
    assert (opposite["high"] < 0).all()  # no shift at all would be a better guess


def test_the_share_of_the_mean_of_pure_noise_is_zero_also_of_the_training_prompts_themselves():
    shares = [shifts.mean_share(acts(isotropic(10, s)))["estimate"].mean() for s in range(20)]
    assert abs(np.mean(shares)) < 0.03  # the mean of ten would explain a tenth of the noise it is made of
    assert shifts.mean_share(acts(0.5 + isotropic(100, 1)))["estimate"].mean() == pytest.approx(0.2, abs=0.03)
    x = isotropic(6, 3)[:, 0]
    assert shifts.mean_share(acts(x[:, None]))["estimate"].iloc[0] == pytest.approx(1 - 6 * x.var(axis=0, ddof=1).sum() / (x**2).sum(), abs=1e-6)
    with pytest.raises(ValueError, match="two at least"):
        shifts.mean_share(acts(x[:1, None]))


def test_shift_cosines_compare_every_two_tunings_prompt_by_prompt_and_in_the_mean():
    one, other = two_seeds(0.5)
    shuffled = other.select(ids=other.ids.iloc[np.random.default_rng(0).permutation(40)])
    table = shifts.shift_cosines({"a": one, "b": shuffled, "c": acts(-one.values, LAYERS)})
    assert table[["one", "other"]].drop_duplicates().to_numpy().tolist() == [["a", "b"], ["a", "c"], ["b", "c"]] and len(table) == 6
    row = table.query("one == 'a' and other == 'b' and layer == 7").iloc[0]
    x, y = one.layer(7).astype(float), other.layer(7).astype(float)
    assert row["mean_cosine"] == pytest.approx((1 - paired_cosine_distances(x, y)).mean(), abs=1e-6)
    assert row["cosine_of_means"] == pytest.approx(1 - paired_cosine_distances(x.mean(axis=0)[None], y.mean(axis=0)[None])[0], abs=1e-6)
    assert np.allclose(table.query("other == 'c' and one == 'a'")[["mean_cosine", "cosine_of_means"]], -1, atol=1e-6)
    with pytest.raises(ValueError, match="two named shifts"):
        shifts.shift_cosines({"a": one})
    with pytest.raises(ValueError, match="10 prompts are on one side only"):
        shifts.shift_cosines({"a": one, "b": other.where(np.arange(40) < 30)})


# ---- two tunings


def two_seeds(noise, seed=0, n=40):
    """Shifts of the same prompts by two seeds of one tuning: a common part of length about 1 a prompt, and each seed's own noise."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n, 2, D)) / np.sqrt(D)
    category = np.repeat([f"c{i}" for i in range(8)], n // 8)
    return tuple(acts(common + noise * rng.standard_normal((n, 2, D)) / np.sqrt(D), LAYERS, category=category) for _ in range(2))


def test_row_cosines_equal_sklearn_and_a_row_of_length_zero_has_none():
    x, y = isotropic(20, 1)[:, 0], isotropic(20, 2)[:, 0]
    assert np.allclose(subspaces.row_cosines(x, y), 1 - paired_cosine_distances(x, y), atol=1e-12)
    x[3] = 0
    assert subspaces.row_cosines(x, y)[3] == 0 and not np.isnan(subspaces.row_cosines(x, x)).any()


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 100.0])
def test_agreement_of_two_seeds_is_the_share_of_what_they_have_in_common(noise):
    table = shifts.shift_agreement([two_seeds(noise)])
    assert list(table.columns) == ["layer", "metric", "estimate", "low", "high", "n", "pairs", "n_clusters"] and table["layer"].tolist() == [3, 7]
    assert np.allclose(table["estimate"], 1 / (1 + noise**2), atol=0.06)
    assert (table["low"] <= table["estimate"] + 1e-12).all() and (table["estimate"] <= table["high"] + 1e-12).all()
    assert (table["n"] == 40).all() and (table["pairs"] == 1).all()


def test_agreement_pairs_prompts_by_id_and_takes_the_mean_over_pairs():
    one, other = two_seeds(0.5)
    shuffled = other.select(ids=other.ids.iloc[np.random.default_rng(0).permutation(40)])
    alone = shifts.shift_agreement([(one, other)])
    assert np.allclose(shifts.shift_agreement([(one, shuffled)])["estimate"], alone["estimate"], atol=1e-12)
    both = shifts.shift_agreement([(one, other), (one, one)])
    assert np.allclose(both["estimate"], (alone["estimate"] + 1) / 2, atol=1e-6) and (both["pairs"] == 2).all()
    turned = shifts.shift_agreement([(shuffled, one), (one, other)])  # the first pair's order of prompts is everyone's
    assert np.allclose(turned["estimate"], alone["estimate"], atol=1e-12)


def test_the_interval_of_agreement_is_the_bootstrap_of_whole_categories():
    one, other = two_seeds(0.7)
    table = shifts.shift_agreement([(one, other)], clusters="category", seed=3)
    by_hand = subspaces.row_cosines(one.layer(7), other.layer(7))
    low, high = stats.bootstrap_interval(by_hand, clusters=one.facts["category"], seed=3)
    row = table.set_index("layer").loc[7]
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-9)
    assert not np.allclose(table["low"], shifts.shift_agreement([(one, other)], seed=3)["low"])


def test_agreement_refuses():
    one, other = two_seeds(0.5)
    with pytest.raises(ValueError, match="no pair of shifts"):
        shifts.shift_agreement([])
    with pytest.raises(ValueError, match="10 prompts are on one side only"):
        shifts.shift_agreement([(one, other.where(np.arange(40) < 30))])
    with pytest.raises(ValueError, match="different layers"):
        shifts.shift_agreement([(one, other), (one.select(layers=[3]), other.select(layers=[3]))])
    with pytest.raises(KeyError, match="no column 'topic'"):
        shifts.shift_agreement([(one, other)], clusters="topic")


# ---- beside the training prompts


def test_similarity_is_the_mean_cosine_and_finds_a_shared_shift():
    train = acts(0.5 + isotropic(50, 1), LAYERS)  # every shift has a common part
    shift = acts(0.5 + isotropic(24, 2), LAYERS, category=np.repeat(["x", "y", "z"], 8))
    table = shifts.similarity(train, shift, clusters="category")
    mean = train.layer(7).mean(axis=0)
    by_hand = np.mean([row @ mean / np.linalg.norm(row) / np.linalg.norm(mean) for row in shift.layer(7)])
    assert table.set_index("layer").loc[7, "estimate"] == pytest.approx(by_hand, abs=1e-6)
    assert (table["p"] < 0.01).all() and (table["low"] > 0).all() and (table["estimate"] > table["null_high"]).all()
    opposite = shifts.similarity(train, acts(-shift.values, LAYERS))
    assert (opposite["p"] < 0.01).all() and (opposite["estimate"] < opposite["null_low"]).all()


def test_similarity_null_holds_when_shifts_point_elsewhere():
    """200 repeats (as layers): each set of shifts has a common direction of its own, drawn anew."""
    rng = np.random.default_rng(3)
    train, shift = (acts(rng.standard_normal((20, 200, 30)) + 2 * rng.standard_normal((200, 30))) for _ in range(2))
    table = shifts.similarity(train, shift, n_draws=400)
    inside = (table["null_low"] <= table["estimate"]) & (table["estimate"] <= table["null_high"])
    assert 0.92 <= inside.mean() <= 0.98
    assert scipy_stats.kstest(table["p"], "uniform").pvalue > 0.01


def test_own_less_other_is_zero_for_what_all_tunings_share_and_not_for_what_one_has():
    """A common part in every shift raises both cosines; only a part of its own sets a tuning apart, on whichever side."""
    rng = np.random.default_rng(0)
    common, own, other = 0.7 * rng.standard_normal((3, 2, D))
    category = np.repeat([f"c{i}" for i in range(8)], 5)
    train, shared = (acts(isotropic(60, seed) + common, LAYERS) for seed in (1, 2))
    shift = acts(isotropic(40, 3) + common, LAYERS, category=category)
    same = shifts.similarity_contrast(train, shared, shift, clusters="category").set_index(["metric", "layer"])
    assert (same.loc["own", "estimate"] > 0.3).all() and (same.loc["own minus other", "estimate"].abs() < 0.06).all()
    mine, theirs = acts(isotropic(60, 1) + common + own, LAYERS), acts(isotropic(60, 2) + common + other, LAYERS)
    moved = acts(isotropic(40, 3) + common + own, LAYERS, category=category)
    apart, turned = (shifts.similarity_contrast(a, b, moved, clusters="category") for a, b in ((mine, theirs), (theirs, mine)))
    difference = apart[apart["metric"] == "own minus other"]
    assert (difference["low"] > 0.05).all() and (difference["n"] == 40).all() and (difference["n_clusters"] == 8).all()
    assert np.allclose(turned.loc[turned["metric"] == "own minus other", "estimate"], -difference["estimate"])
    assert apart["p"].isna().all() and apart["q"].isna().all(), "an estimate, no test"
    by_hand = shifts.similarity_by_prompt(mine, moved)["cosine"] - shifts.similarity_by_prompt(theirs, moved)["cosine"]
    layer = shifts.similarity_by_prompt(mine, moved)["layer"] == 7
    low, high = stats.bootstrap_interval(by_hand[layer].to_numpy(), clusters=category, seed=0)
    row = difference.set_index("layer").loc[7]
    assert (row["estimate"], row["low"], row["high"]) == pytest.approx((by_hand[layer].mean(), low, high), abs=1e-6)
    with pytest.raises(KeyError, match="no column 'topic'"):
        shifts.similarity_contrast(mine, theirs, moved, clusters="topic")


def test_split_half_similarity_finds_what_shifts_have_in_common():
    together, apart = acts(0.5 + isotropic(40, 1)), acts(isotropic(40, 2))
    found, nothing = shifts.split_half_similarity(together, n=15), shifts.split_half_similarity(apart)
    assert (found["p"] < 0.01).all() and found["n"].tolist() == [15, 15] and (found["low"] <= found["estimate"]).all()
    assert (nothing["p"] > 0.05).all() and nothing["n"].tolist() == [20, 20]


def test_similarity_by_prompt_is_the_formula():
    train, shift = acts(isotropic(50, 1) + 1, LAYERS), acts(isotropic(10, 2) + 1, LAYERS)
    table = shifts.similarity_by_prompt(train, shift)
    assert list(table.columns) == ["id", "layer", "cosine", "scalar_projection"] and len(table) == 20
    row, x = table.query("layer == 7 and id == 'q4'").iloc[0], shift.layer(7)[4].astype(float)
    mean = train.layer(7).mean(axis=0, dtype=float)
    assert row["scalar_projection"] == pytest.approx(x @ mean / np.linalg.norm(mean), abs=1e-6)
    assert row["cosine"] == pytest.approx(x @ mean / np.linalg.norm(mean) / np.linalg.norm(x))


def planted_relation(strength, seed=0, n=60):
    """Prompts in the training subspace shift like the training prompts (strength 1), or just like any other (0)."""
    rng = np.random.default_rng(seed)
    train = np.zeros((50, 1, D))
    train[:, :, :8] = rng.standard_normal((50, 1, 8))
    train += 0.01 * rng.standard_normal(train.shape)
    inside = rng.uniform(0, 1, (n, 1, 1))
    prompts = rng.standard_normal((n, 1, D)) * np.where(np.arange(D) < 8, 2 * inside, 1)
    common = np.eye(D)[20]
    shift = strength * 4 * inside * common + (1 - strength) * 2 * common + rng.standard_normal((n, 1, D))
    train_shift = common + 0.1 * rng.standard_normal((50, 1, D))
    category = np.repeat([f"c{i}" for i in range(6)], n // 6)
    return acts(train), acts(prompts, category=category), acts(train_shift), acts(shift)


def test_overlap_similarity_finds_a_planted_relation_and_nothing_where_there_is_none():
    there = shifts.overlap_similarity(*planted_relation(1.0), clusters="category").set_index("metric")
    assert there.loc["pearson", "p"] < 0.01 and there.loc["pearson", "low"] > 0 and there.loc["spearman", "p"] < 0.01
    assert set(there.index) == {"pearson", "spearman", "pearson baseline"} and there.loc["pearson", "n_clusters"] == 6
    p = [shifts.overlap_similarity(*planted_relation(0.0, seed), n_permutations=200)["p"].iloc[0] for seed in range(60)]
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01
    root = shifts.overlap_similarity(*planted_relation(1.0), measure="norm_fraction").set_index("metric")
    assert root.loc["spearman", "estimate"] == pytest.approx(there.loc["spearman", "estimate"])  # same ranks
    assert root.loc["pearson", "estimate"] != pytest.approx(there.loc["pearson", "estimate"], abs=1e-6)


def test_overlap_similarity_pairs_prompts_by_id():
    train, prompts, train_shift, shift = planted_relation(1.0)
    order = np.random.default_rng(0).permutation(len(shift))
    shuffled = shift.select(ids=shift.ids.iloc[order])
    same = shifts.overlap_similarity(train, prompts, train_shift, shuffled, within="category")
    assert np.allclose(same["estimate"], shifts.overlap_similarity(train, prompts, train_shift, shift)["estimate"])
    assert "inside category" in same.attrs["null"]["prompts permuted"]


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b: shifts.similarity(a, b.select(layers=[3])), "different layers"),
        (lambda a, b: shifts.similarity(a, b, nulls=("labels",)), "'isotropic'"),
        (lambda a, b: shifts.shift_norms(a, b.select(layers=[3])), "different layers"),
        (lambda a, b: shifts.overlap_similarity(a, b, a, b, measure="energy"), "unknown measure"),
        (lambda a, b: shifts.overlap_similarity(a, b, a, b.where(np.arange(30) < 20)), "record the same prompts"),
    ],
)
def test_shifts_refuse(call, says):
    with pytest.raises(ValueError, match=says):
        call(acts(isotropic(30, 0), LAYERS), acts(isotropic(30, 1), LAYERS))


def test_an_unknown_column_is_a_key_error():
    with pytest.raises(KeyError, match="no column 'topic'"):
        shifts.similarity(acts(isotropic(30, 0)), acts(isotropic(30, 1)), clusters="topic")
