"""Guards subspaces: angles as scipy's, known overlaps, nulls that hold and nulls that fall."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
from planted import LAYERS, D, acts, anisotropic, isotropic, named
from scipy import stats as scipy_stats
from sklearn.decomposition import PCA

from emlens import geometry, measures, nulls, presets, subspaces

# ---- arrays


@pytest.mark.parametrize("shape", [(30, 40), (90, 40), (1100, 1050)])
def test_principal_subspace_is_that_of_sklearn(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.arange(1, shape[1] + 1) ** -1.0 + 5.0
    ours = subspaces.principal_subspace(x, 4)
    theirs = PCA(4, svd_solver="full").fit(x).components_.T if shape[0] < 1000 else np.linalg.svd(x - x.mean(axis=0))[2][:4].T
    assert np.allclose(np.abs(np.diag(ours.T @ theirs)), 1, atol=1e-7)  # component by component, in order
    assert np.allclose(ours.T @ ours, np.eye(4), atol=1e-12)


def test_variances_are_those_of_sklearn_and_the_gram_matrix_may_be_given():
    x = anisotropic(30, 1)[:, 0]
    basis, variances = subspaces.principal_components(x, 4)
    fit = PCA(4, svd_solver="full").fit(x)
    assert np.allclose(variances, fit.explained_variance_)
    again, same = subspaces.principal_components(x, 4, gram=x @ x.T)
    assert np.allclose(np.abs(np.diag(again.T @ basis)), 1, atol=1e-9) and np.allclose(same, variances)


@pytest.mark.parametrize("shape", [(25, 40), (90, 40)])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_n_components_is_the_smallest_number_that_explains_the_share(shape, share):
    x = np.random.default_rng(0).standard_normal(shape) * np.arange(1, 41) ** -0.7 + 3
    k = subspaces.n_components(x, share)
    explained = np.cumsum(PCA(svd_solver="full").fit(x).explained_variance_ratio_)
    assert explained[k - 1] >= share > explained[k - 2]
    with pytest.raises(ValueError, match="between 0 and 1"):
        subspaces.n_components(x, 8)
    with pytest.raises(ValueError, match="are equal here"):
        subspaces.n_components(np.ones((5, 3)), 0.5)


@pytest.mark.parametrize("n", [60, 500])
def test_a_part_is_the_sample_of_its_rows(n):
    x, rows = anisotropic(n, 1)[:, 0], np.random.default_rng(0).permutation(n)[: n // 2]
    part, alone = subspaces.Sample(x, 3).part(rows), subspaces.Sample(x[rows], 3)
    assert subspaces.mean_cos2(part.basis, alone.basis) == pytest.approx(1, abs=1e-10) and np.allclose(part.centre, alone.centre)
    assert subspaces.Sample(x, 3).part(rows, k=2).basis.shape == (D, 2)


def test_a_large_gram_matrix_of_low_rank_is_refused_and_of_just_enough_is_not():
    low = np.random.default_rng(0).standard_normal((400, 3)) @ np.random.default_rng(1).standard_normal((3, 700))
    with pytest.raises(ValueError, match="span only 3 of the k=8"):
        subspaces.principal_subspace(low, 8)
    assert subspaces.mean_cos2(subspaces.principal_subspace(low, 3), np.linalg.svd(low - low.mean(axis=0))[2][:3].T) == pytest.approx(1)
    with pytest.raises(ValueError, match="span only 0 of the k=8"):
        subspaces.principal_subspace(np.ones((400, 700)), 8)


def test_common_coordinates_keep_every_product():
    x, y = isotropic(6, 1)[:, 0], isotropic(9, 2)[:, 0]
    u, v = subspaces.common_coordinates(x, y)
    assert u.shape == (6, 15) and np.allclose(u @ v.T, x @ y.T) and np.allclose(v @ v.T, y @ y.T)
    same, _ = subspaces.common_coordinates(isotropic(30, 1)[:, 0], y[:1].repeat(10, 0))
    assert np.array_equal(same, isotropic(30, 1)[:, 0])


def test_angles_of_a_planted_rotation_also_tiny_ones():
    planted = np.array([1e-9, 1e-4, 0.3, np.pi / 2])
    u = np.eye(D)[:, :4]
    v = np.eye(D)[:, :4] * np.cos(planted) + np.eye(D)[:, 4:8] * np.sin(planted)
    mixed = v @ np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]  # another basis of the same span
    assert np.allclose(subspaces.angles(u, mixed), planted, rtol=1e-4, atol=1e-12)
    assert subspaces.mean_cos2(u, mixed) == pytest.approx((np.cos(planted) ** 2).mean())


def test_identities_of_mean_cos2():
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.standard_normal((D, 5)))[0] for _ in range(2))
    turn = np.linalg.qr(rng.standard_normal((D, D)))[0]
    assert subspaces.mean_cos2(u, u) == pytest.approx(1, abs=1e-12)
    assert subspaces.mean_cos2(np.eye(D)[:, :5], np.eye(D)[:, 5:10]) == 0
    assert subspaces.mean_cos2(np.eye(D), np.linalg.qr(rng.standard_normal((D, D)))[0]) == pytest.approx(1)  # k = d
    assert subspaces.mean_cos2(u, v) == pytest.approx(subspaces.mean_cos2(v, u))
    assert subspaces.mean_cos2(turn @ u, turn @ v) == pytest.approx(subspaces.mean_cos2(u, v))
    assert subspaces.mean_cos2(u, v) == pytest.approx((np.cos(scipy.linalg.subspace_angles(u, v)) ** 2).mean())


def test_rows_that_span_too_little_are_refused():
    with pytest.raises(ValueError, match="k=8 was asked"):
        subspaces.principal_subspace(isotropic(8, 0)[:, 0], 8)
    flat = np.tile(isotropic(1, 0)[:, 0], (30, 1)).astype(np.float32)  # 30 equal prompts but for rounding
    flat = flat * (1 + 1e-7 * isotropic(30, 1)[:, 0])
    with pytest.raises(ValueError, match="beyond float32 rounding"):
        subspaces.principal_subspace(flat, 4)
    with pytest.raises(ValueError, match="layer 7: "):
        geometry.overlap(acts(np.stack([isotropic(30, 1)[:, 0], flat], axis=1), LAYERS), acts(isotropic(30, 2), LAYERS), 4)


def test_explained_energy_and_cosines_of_known_vectors():
    basis, centre = np.eye(4)[:, :2], np.array([1.0, 0, 0, 0])
    rows = np.array([[1.0, 3, 0, 4], [2, 0, 0, 0], [1, 0, 0, 0]])
    assert subspaces.explained_energy(rows, basis, centre).tolist() == [9 / 25, 1, 0]
    assert subspaces.cosines(np.array([[3.0, 4, 0, 0], [0, 0, 0, 0]]), 10 * np.eye(4)[0]).tolist() == [0.6, 0]


# ---- angles and overlap


def test_principal_angles_equal_scipy_and_give_k_rows_a_layer():
    a, b = acts(anisotropic(50, 0), LAYERS), acts(anisotropic(30, 1, frame=1), LAYERS)
    table = geometry.principal_angles(a, b, k=5)
    assert table.groupby("layer").size().to_dict() == {3: 5, 7: 5} and list(table.columns) == [
        "layer",
        "index",
        "angle",
    ]
    for layer, part in table.groupby("layer"):
        u, v = (np.linalg.svd(x.layer(layer) - x.layer(layer).mean(axis=0, dtype=float))[2][:5].T for x in (a, b))
        assert np.allclose(part["angle"], scipy.linalg.subspace_angles(u, v)[::-1], atol=1e-6)
        assert (np.diff(part["angle"]) >= 0).all() and part["index"].tolist() == list(range(5))


def test_overlap_of_a_set_with_itself_is_one():
    a = acts(anisotropic(40, 0))
    table = geometry.overlap(a, a, k=8)
    for column in ("estimate", "low", "high"):
        assert np.allclose(table[column], 1, atol=1e-6)
    assert (geometry.principal_angles(a, a)["angle"] < 1e-6).all()


def test_overlap_is_the_mean_cos2_of_the_angles_and_symmetric():
    a, b = acts(anisotropic(50, 0), LAYERS), acts(anisotropic(30, 1), LAYERS)
    cos2 = (np.cos(geometry.principal_angles(a, b, 6).set_index("layer")["angle"]) ** 2).groupby("layer").mean()
    assert np.allclose(geometry.overlap(a, b, 6)["estimate"], cos2, atol=1e-9)
    assert np.allclose(geometry.overlap(b, a, 6)["estimate"], cos2, atol=1e-9)


def test_isotropic_null_holds_on_isotropic_data():
    """On data with no relation the 95 % band covers 95 +- 3 % of 200 repeats (the layers), and p is uniform."""
    a, b = acts(isotropic(24, 1, 200, 24)), acts(isotropic(20, 2, 200, 24))
    table = geometry.overlap(a, b, k=3, n_draws=400, n_splits=0)
    inside = (table["null_low"] <= table["estimate"]) & (table["estimate"] <= table["null_high"])
    assert 0.92 <= inside.mean() <= 0.98
    assert scipy_stats.kstest(table["p"], "uniform").pvalue > 0.01
    assert table["estimate"].mean() == pytest.approx(3 / 24, abs=0.01) and table.attrs["chance"] == 3 / 24
    assert (table["q"] > 0.05).all()


def test_isotropic_null_falls_on_a_shared_subspace():
    shared = geometry.overlap(acts(anisotropic(60, 1)), acts(anisotropic(40, 2)), k=4)
    assert (shared["p"] == 1 / 201).all() and (shared["estimate"] > shared["null_high"]).all()
    assert shared.attrs["null"]["isotropic"].startswith("hypothesis: ")


def test_reference_null_holds_for_fresh_prompts_of_the_reference_and_falls_for_related_ones():
    """Anisotropic everywhere: `isotropic` rejects always, the reference null only where b is closer to a."""
    n = 60  # repeats, as layers
    a = acts(anisotropic(40, 1, n, 20), id=named("a", 40))
    reference = acts(anisotropic(60, 2, n, 20, frame=1) + 0.4 * anisotropic(60, 3, n, 20), id=named("r", 60))
    fresh = acts(anisotropic(15, 4, n, 20, frame=1) + 0.4 * anisotropic(15, 5, n, 20), id=named("b", 15))
    related = acts(anisotropic(15, 6, n, 20), id=named("b", 15))
    kwargs = {"k": 3, "nulls": ("isotropic", reference), "n_draws": 99, "n_splits": 0}
    nothing = geometry.overlap(a, fresh, **kwargs).set_index("null")
    assert scipy_stats.kstest(nothing.loc["reference", "p"], "uniform").pvalue > 0.01
    assert (nothing.loc["reference", "p"] <= 0.05).mean() <= 0.12
    assert (nothing.loc["isotropic", "p"] <= 0.05).mean() > 0.5  # the weak null rejects all the same
    assert (geometry.overlap(a, related, **kwargs).set_index("null").loc["reference", "p"] <= 0.05).mean() > 0.9


def test_reference_rows_that_are_in_b_are_not_drawn_twice():
    a, b = acts(anisotropic(40, 1), id=named("a", 40)), acts(anisotropic(20, 2), id=named("b", 20))
    with pytest.raises(ValueError, match="no prompt that is not in b"):
        geometry.overlap(a, b, 3, nulls=b)
    other = acts(anisotropic(20, 3), id=named("b", 20))  # other prompts under the same ids are other prompts
    assert geometry.overlap(a, b, 3, nulls=[other], n_draws=19)["p"].between(0.05, 1).all()


def test_overlap_interval_covers_other_prompts_of_the_same_kind():
    n = 150  # repeats, as layers

    def pair(seed):
        return acts(anisotropic(60, seed, n, 20)), acts(anisotropic(40, seed + 50, n, 20), id=named("b", 40))

    table = geometry.overlap(*pair(1), k=3, nulls=())
    others = np.concatenate([geometry.overlap(*pair(s), 3, (), n_splits=0)["estimate"] for s in range(10, 14)])
    covered = (table["low"] <= others.mean()) & (others.mean() <= table["high"])
    assert covered.mean() >= 0.90  # two samples of one population: the hardest case, close to the edge
    width, spread = (table["high"] - table["low"]).median(), np.quantile(others, 0.975) - np.quantile(others, 0.025)
    assert 0.5 < width / spread < 1.5  # and not by being useless
    assert (table["null"] == "").all() and table["p"].isna().all()


def test_ceiling_is_met_at_equal_n_by_two_samples_of_one_population_and_not_by_others():
    a, same, other = (acts(anisotropic(80, s, frame=f), id=named(p, 80)) for s, f, p in [(1, 0, "a"), (2, 0, "b"), (3, 1, "c")])
    for b, meets in ((same, True), (other, False)):
        table = geometry.overlap(a, b, k=4, ceiling=True).query("layer == 0").set_index("metric")
        ceiling, cross = table.loc["ceiling", "estimate"], table.loc["mean_cos2 at ceiling n", "estimate"]
        assert ceiling == pytest.approx(np.sqrt(table.loc["ceiling a", "estimate"] * table.loc["ceiling b", "estimate"]))
        assert (abs(cross - ceiling) < 0.08) == meets
        assert table.loc["ceiling", "n"] == 40


def test_split_half_overlap_grows_with_n_and_matches_fresh_samples_of_that_size():
    big = acts(anisotropic(400, 1))
    small, large = (geometry.split_half_overlap(big, k=4, n=n) for n in (20, 200))
    assert (large["estimate"] > small["estimate"]).all() and small["n"].tolist() == [20, 20]
    fresh = [geometry.overlap(acts(anisotropic(20, s)), acts(anisotropic(20, s + 100)), 4, n_splits=0)["estimate"].mean() for s in range(20)]
    assert small["estimate"].mean() == pytest.approx(np.mean(fresh), abs=0.05)
    assert (small["p"] < 0.05).all() and geometry.split_half_overlap(acts(isotropic(40, 1)), 4)["p"].min() > 0.05


ONE = pd.DataFrame({"id": named("q", 30), "topic": "t0"})
SOME = pd.DataFrame({"id": named("q", 30), "topic": [f"t{i % 4}" for i in range(30)]})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b: geometry.overlap(a, b.select(layers=[3])), "different layers"),
        (lambda a, b: geometry.principal_angles(a, acts(isotropic(30, 0, d=20), LAYERS)), "d_model 40 and 20"),
        (lambda a, b: geometry.overlap(a, b, nulls=("gaussian",)), "unknown null 'gaussian'"),
        (lambda a, b: geometry.overlap(a, b, measure="cosine"), "unknown measure 'cosine'"),
        (lambda a, b: geometry.overlap(a, b, nulls="pairs"), "says nothing about mean_cos2: it permutes which prompt"),
        (lambda a, b: geometry.overlap(a, b, measure="linear_cka"), "blind to rotations"),
        (lambda a, b: geometry.overlap(a, b.where(np.arange(30) > 3), measure="linear_cka", nulls=()), "hold different ones"),
        (lambda a, b: geometry.overlap(a, b, measure="linear_cka", nulls=(), ceiling=True), "two halves of a set hold different prompts"),
        (lambda a, b: geometry.overlap(a, b, measure="norm_fraction", nulls="covariance", reference=b), "it draws subspaces"),
        (lambda a, b: geometry.overlap(a, b, nulls="covariance"), "needs reference="),
        (lambda a, b: geometry.overlap(a, b, nulls="covariance", reference=b), "30 prompts of the reference are in b too"),
        (lambda a, b: geometry.overlap(a, b, nulls="covariance", reference=b.where(np.arange(30) > 3)), "the reference holds 26 prompts, b 30"),
        (lambda a, b: geometry.overlap(a, b, reference=b), "was not asked for"),
        (lambda a, b: geometry.overlap(a, b.where(np.arange(30) > 3), nulls="labels"), "26 prompts are on both sides"),
        (lambda a, b: geometry.overlap(a, b, variance=95), "between 0 and 1"),
        (lambda a, b: geometry.overlap(a, b, nulls="labels", clusters=("id", None)), "one side has none"),
        (lambda a, b: geometry.overlap(a.with_facts(ONE), b.with_facts(SOME), nulls="labels", clusters="topic"), "1 of 4 clusters are on both sides"),
        (lambda a, b: geometry.overlap(a.with_facts(ONE), b, nulls=(), clusters=("topic", None)), "all rows are of one group"),
        (lambda a, b: geometry.split_half_overlap(a, k=20), "k=20 was asked"),
    ],
)
@pytest.mark.filterwarnings("ignore:the reference holds")
def test_geometry_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call(acts(isotropic(30, 0), LAYERS), acts(isotropic(30, 1), LAYERS))


# ---- other measures


@pytest.mark.parametrize("measure", [name for name, one in measures.MEASURES.items() if one.kind == "subspaces"])
def test_overlap_takes_every_measure_of_subspaces_by_name(measure):
    a, related, other = (acts(anisotropic(60, s, frame=f), LAYERS, id=named(p, 60)) for s, f, p in [(1, 0, "a"), (2, 0, "b"), (3, 1, "c")])
    table = geometry.overlap(a, related, 4, measure=measure, n_draws=99, ceiling=True)
    estimate = table[table["metric"] == measure]
    by_hand = [getattr(measures, measure)(*(subspaces.principal_subspace(x.layer(i), 4) for x in (a, related))) for i in LAYERS]
    assert np.allclose(estimate["estimate"], by_hand) and (estimate["p"] == 0.01).all()
    assert ((estimate["low"] < estimate["estimate"]) & (estimate["estimate"] < estimate["high"])).all()
    assert set(table["metric"]) == {measure, "ceiling", "ceiling a", "ceiling b", f"{measure} at ceiling n"}
    less = measures.MEASURES[measure].closer == "less"
    assert ("tail: less" in table.attrs["null"]["isotropic"]) == less and table.attrs["measure"] == measure
    different = geometry.overlap(a, other, 4, measure=measure, nulls=("labels", "isotropic"), n_draws=99, n_splits=0).set_index("null")
    assert (different.loc["labels", "p"] == 0.01).all() and (different.loc["isotropic", "p"] > 0.01).any()
    assert ("tail: greater" in different.attrs["null"]["labels"]) == less
    halves = geometry.split_half_overlap(a, 4, measure=measure, n_draws=99)
    assert (halves["metric"] == measure).all() and (halves["p"] == 0.01).all()


@pytest.mark.parametrize("measure", ["explained_energy", "norm_fraction"])
def test_overlap_by_prompt_measures_are_the_mean_over_prompts_and_have_their_nulls(measure):
    a, related, other = (acts(anisotropic(60, s, frame=f), LAYERS, id=named(p, 60)) for s, f, p in [(1, 0, "a"), (2, 0, "b"), (3, 1, "c")])
    table = geometry.overlap(a, related, 4, ("isotropic", other, "questions"), 99, measure=measure)
    each = geometry.overlap_by_prompt(a, related, 4).groupby("layer")[measure].mean()
    own = table[table["metric"] == measure]
    assert np.allclose(own.set_index("layer").loc[3, "estimate"], each[3]) and (own["p"] == 0.01).all()
    assert set(table["null"]) == {"isotropic", "reference", "questions"}
    assert (geometry.overlap(a, related, 4, "labels", 99, measure=measure)["p"] > 0.02).all()
    assert (geometry.overlap(a, other, 4, "labels", 99, measure=measure)["p"] == 0.01).all()


def test_linear_cka_pairs_prompts_by_id_and_its_null_permutes_the_pairs():
    a = acts(anisotropic(40, 1), LAYERS)
    alike = acts(a.values + 0.5 * anisotropic(40, 2).astype(np.float32), LAYERS)
    mixed = alike.select(ids=alike.ids.iloc[np.random.default_rng(0).permutation(40)])
    table = geometry.overlap(a, mixed, measure="linear_cka", nulls="pairs", n_draws=99)
    assert table["estimate"].iloc[1] == pytest.approx(measures.linear_cka(a.layer(7), alike.layer(7))) and (table["p"] == 0.01).all()
    assert (table["low"] < table["estimate"]).all() and (table["estimate"] < table["high"]).all()
    strangers = geometry.overlap(a, acts(anisotropic(40, 3, layers=2), LAYERS), measure="linear_cka", nulls="pairs", n_draws=99)
    assert (strangers["p"] > 0.02).all() and (strangers["estimate"].abs() < 0.2).all()


def test_variance_takes_the_smallest_equal_k_of_both_sides_layer_by_layer():
    x = np.stack([anisotropic(60, 1, 1, power=p)[:, 0] for p in (0.5, 1.5)], axis=1)
    a, b = acts(x, LAYERS), acts(anisotropic(50, 2), LAYERS, id=named("b", 50))
    table = geometry.overlap(a, b, variance=0.8, n_draws=50, n_splits=4)
    needed = [max(subspaces.n_components(side.layer(i), 0.8) for side in (a, b)) for i in LAYERS]
    assert table["k"].tolist() == needed == table.attrs["k"] and needed[0] != needed[1]
    assert table.attrs["chance"] == [k / D for k in needed]
    for layer, k in zip(LAYERS, needed, strict=True):
        alone = geometry.overlap(a.select(layers=[layer]), b.select(layers=[layer]), k, n_splits=0, n_draws=50)
        row = table.set_index("layer").loc[layer]
        assert row["estimate"] == pytest.approx(alone["estimate"].iloc[0]) and row["null_high"] == pytest.approx(alone["null_high"].iloc[0], abs=0.05)
    published, needed = geometry.overlap(a, b, **presets.PUBLISHED["overlap"]), [subspaces.n_components(a.layer(i), 0.95) for i in LAYERS]
    assert published["metric"].unique().tolist() == ["norm_fraction"] and published["k"].tolist() == needed
    review = geometry.overlap(a, b, **presets.REVIEW["overlap"])
    assert review["metric"].unique().tolist() == ["mean_cos"] and review["p"].min() == 1 / 1001 and review.attrs["k"] == 8


def test_unequal_k_is_asked_for_by_side():
    a, b = acts(anisotropic(60, 1), LAYERS), acts(anisotropic(50, 2), LAYERS, id=named("b", 50))
    table = geometry.overlap(a, b, k=(3, 10), nulls=("isotropic", "labels"), n_draws=400)
    u, v = subspaces.principal_subspace(a.layer(3), 3), subspaces.principal_subspace(b.layer(3), 10)
    assert table["estimate"].iloc[0] == pytest.approx(((u.T @ v) ** 2).sum() / 3) and table.attrs["chance"] == 10 / D
    null = table.set_index("null").loc["isotropic"].iloc[0]
    assert null["null_low"] < 10 / D < null["null_high"]


# ---- other nulls


def test_labels_of_two_recordings_of_the_same_prompts_change_sides_within_prompts():
    """Two noisy recordings of one set of prompts are exchangeable within a prompt; a shifted subspace is not."""
    rng, n = np.random.default_rng(0), 40  # repeats, as layers
    prompts = anisotropic(30, 1, n, 20)
    one, other = (acts(prompts + 0.2 * rng.standard_normal(prompts.shape)) for _ in range(2))
    p = geometry.overlap(one, other, 3, "labels", 59, n_splits=0)["p"]
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01 and (p <= 0.05).mean() <= 0.12
    moved = acts(prompts + 0.8 * anisotropic(30, 2, n, 20, frame=1))
    assert (geometry.overlap(one, moved, 3, "labels", 19, n_splits=0)["p"] <= 0.05).mean() > 0.9


def in_topics(seed, name, share, groups=8, size=6, layers=50, frame=0):
    """Prompts in topics of their own, of one population (a frame): a share of the variance lies between topics."""
    level, own = (anisotropic(n, seed + i, layers, 20, frame=frame) - 2 for i, n in enumerate((groups, groups * size)))
    values = np.sqrt(share) * np.repeat(level, size, axis=0) + np.sqrt(1 - share) * own
    return acts(values, id=named(name, groups * size), topic=np.repeat(named(name, groups), size))


def test_labels_of_one_population_in_different_topics_hold_with_whole_topics_and_not_without():
    """50 copies, as layers; and another population falls with whole topics too."""
    a, b, other = in_topics(1, "a", 0.5), in_topics(3, "b", 0.5), in_topics(5, "c", 0.5, frame=1)
    options = {"k": 3, "nulls": "labels", "n_draws": 19, "n_splits": 0}
    whole, rows = (geometry.overlap(a, b, clusters=clusters, **options) for clusters in ("topic", None))
    assert (whole["p"] <= 0.05).mean() <= 0.14 < 0.4 < (rows["p"] <= 0.05).mean() and np.allclose(whole["estimate"], rows["estimate"])
    assert scipy_stats.kstest(whole["p"], "uniform").pvalue > 0.01
    assert (geometry.overlap(a, other, clusters="topic", **options)["p"] <= 0.05).mean() > 0.8
    assert "whole clusters, in 12870 ways" in whole.attrs["null"]["labels"] and "alone reject" in rows.attrs["null"]["labels"]
    assert "halves of whole clusters: topic" in whole.attrs["interval"] and "taken as independent" in rows.attrs["interval"]


def test_halves_of_whole_topics_make_a_wider_interval_and_a_lower_ceiling_where_topics_differ():
    a, b = in_topics(1, "a", 0.6, layers=8), in_topics(3, "b", 0.6, layers=8)
    whole, rows = (geometry.overlap(a, b, 3, (), ceiling=True, clusters=clusters).set_index("metric") for clusters in ("topic", None))
    width = [(table.loc["mean_cos2", "high"] - table.loc["mean_cos2", "low"]).mean() for table in (whole, rows)]
    assert width[0] > 1.1 * width[1]
    assert whole.loc["ceiling", "estimate"].mean() < rows.loc["ceiling", "estimate"].mean() - 0.1 and (whole.loc["ceiling", "n"] == 24).all()
    halves = [geometry.split_half_overlap(a, 3, n=20, clusters=clusters) for clusters in ("topic", None)]
    assert halves[0]["estimate"].mean() < halves[1]["estimate"].mean() - 0.1 and (halves[0]["n"] == 20).all()
    assert "of whole topic" in halves[0].attrs["what"]
    none, flat = in_topics(1, "a", 0.0, layers=8), in_topics(3, "b", 0.0, layers=8)
    wide, narrow = (geometry.overlap(none, flat, 3, (), clusters=clusters) for clusters in (("topic", None), None))
    assert (wide["high"] - wide["low"]).mean() == pytest.approx((narrow["high"] - narrow["low"]).mean(), rel=0.25)
    assert "topic of a, single prompts of b" in wide.attrs["interval"]
    two = [geometry.overlap(a[:12], b[:12], 3, (), clusters=clusters) for clusters in ("topic", None)]
    assert (two[0]["high"] - two[0]["low"]).mean() > 0.8, "two topics a side: one degree of freedom"
    assert (two[1]["high"] - two[1]["low"]).mean() < 0.7
    uneven = geometry.overlap(a[:33], b[:41], 3, ("questions",), ceiling=True, clusters="topic")
    assert uneven.query("metric == 'ceiling'")["n"].between(10, 16).all()


def test_a_reference_below_twice_b_warns_and_a_large_one_does_not():
    a, b, c = (acts(anisotropic(n, s), LAYERS, id=named(p, n)) for n, s, p in [(40, 1, "a"), (20, 2, "b"), (60, 3, "c")])
    with pytest.warns(UserWarning, match="holds 39 prompts, b 20: below twice as many") as warned:
        geometry.overlap(a, b, 3, "covariance", 9, n_splits=0, reference=c[:39])
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        geometry.overlap(a, b, 3, "covariance", 9, n_splits=0, reference=c[:40])


def test_the_questions_control_is_b_against_itself_at_the_size_of_the_ceiling():
    a = acts(anisotropic(80, 1, power=2.5), LAYERS, id=named("a", 80))
    b = acts(anisotropic(50, 2, frame=1), LAYERS, id=named("b", 50))
    table = geometry.overlap(a, b, 4, ("questions", "isotropic"), 50, ceiling=True).set_index("null")
    questions, rest = table.loc["questions"], table.loc[""].set_index("metric")
    assert (questions["metric"] == "mean_cos2 at ceiling n").all() and (questions["n"] == 25).all() and questions["p"].isna().all()
    assert np.allclose(questions["estimate"], rest.loc["mean_cos2 at ceiling n", "estimate"])
    assert (questions["null_low"].to_numpy() <= rest.loc["ceiling b", "estimate"].to_numpy()).all()
    assert (questions["null_high"].to_numpy() < rest.loc["ceiling a", "estimate"].to_numpy()).all()
    assert (questions["estimate"] < questions["null_low"]).all()  # training prompts overlap questions less than other questions do
    same = geometry.overlap(acts(anisotropic(80, 1, frame=1), LAYERS, id=named("a", 80)), b, 4, "questions")
    assert len(same) == 4 and ((same["estimate"] > same["null_low"]) | same["null_low"].isna()).all()
    assert "control" in table.attrs["null"]["questions"]


def test_every_null_of_an_overlap_is_told_in_the_attrs():
    a, b, c = (acts(anisotropic(n, s), LAYERS, id=named(p, n)) for n, s, p in [(40, 1, "a"), (20, 2, "b"), (60, 3, "c")])
    table = geometry.overlap(a, b, 3, ("isotropic", "covariance", c, "labels", "questions"), 20, ceiling=True, reference=c)
    assert list(table.attrs["null"]) == ["isotropic", "covariance", "reference", "labels", "questions"]
    assert all(text.startswith("hypothesis: ") for text in (*table.attrs["null"].values(), table.attrs["ceiling"]))
    assert table.attrs["null"]["covariance"].endswith("60 reference prompts") and table.attrs["null"]["labels"].endswith("tail: less")
    assert set(table["null"]) == {"", "isotropic", "covariance", "reference", "labels", "questions"}
    assert not {"before and after swapped", "rows permuted"} & set(nulls.DESCRIPTIONS), "both leave an overlap as it is"


def test_wide_activations_give_the_same_nulls_as_in_their_own_coordinates():
    """d_model above all rows together: everything is computed in fewer coordinates, with one result."""
    a, b, c = (anisotropic(n, s, d=20) for n, s in [(40, 1), (15, 2), (30, 3)])
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 20)))[0].T
    kwargs = {"k": 3, "n_draws": 30, "n_splits": 6}
    narrow, wide = (
        geometry.overlap(one, other, nulls=["labels", third], **kwargs)
        for one, other, third in [[acts(x @ turn, id=named(p, len(x))) for x, p in [(a, "a"), (b, "b"), (c, "c")]] for turn in (np.eye(20), axes)]
    )
    columns = ["estimate", "low", "high", "null_low", "null_high", "p"]
    assert np.allclose(narrow[columns], wide[columns], atol=1e-6)


# ---- by prompt


def test_overlap_by_prompt_is_the_formula():
    train, before = acts(anisotropic(50, 1), LAYERS), acts(anisotropic(10, 2), LAYERS)
    table = geometry.overlap_by_prompt(train, before, k=3)
    assert list(table.columns) == ["id", "layer", "explained_energy", "norm_fraction", "cosine_to_mean"] and len(table) == 20
    fit, x = PCA(3, svd_solver="full").fit(train.layer(7).astype(float)), before.layer(7)[4].astype(float)
    row = table.query("layer == 7 and id == 'q4'").iloc[0]
    share = np.linalg.norm(fit.transform(x[None])) / np.linalg.norm(x - fit.mean_)
    assert row["norm_fraction"] == pytest.approx(share, abs=1e-9) and row["explained_energy"] == pytest.approx(share**2)
    assert row["cosine_to_mean"] == pytest.approx(x @ fit.mean_ / np.linalg.norm(x) / np.linalg.norm(fit.mean_))


def test_energy_of_isotropic_prompts_is_k_over_d_on_average():
    table = geometry.overlap_by_prompt(acts(isotropic(60, 1)), acts(isotropic(800, 2)), k=10)
    assert table["explained_energy"].mean() == pytest.approx(10 / D, abs=0.01)
