"""Guards subspaces: angles as scipy's, known overlaps, nulls that hold and nulls that fall."""

import time

import numpy as np
import pytest
import scipy.linalg
from planted import LAYERS, D, acts, anisotropic, isotropic, named
from scipy import stats as scipy_stats
from sklearn.decomposition import PCA

from emlens import geometry, subspaces

# ---- arrays


@pytest.mark.parametrize("shape", [(30, 40), (90, 40), (1100, 1050)])
def test_principal_subspace_is_that_of_sklearn(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.arange(1, shape[1] + 1) ** -1.0 + 5.0
    ours = subspaces.principal_subspace(x, 4)
    theirs = PCA(4, svd_solver="full").fit(x).components_.T if shape[0] < 1000 else np.linalg.svd(x - x.mean(axis=0))[2][:4].T
    assert np.allclose(np.abs(np.diag(ours.T @ theirs)), 1, atol=1e-7)  # component by component, in order
    assert np.allclose(ours.T @ ours, np.eye(4), atol=1e-12)


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


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b: geometry.overlap(a, b.select(layers=[3])), "different layers"),
        (lambda a, b: geometry.principal_angles(a, acts(isotropic(30, 0, d=20), LAYERS)), "d_model 40 and 20"),
        (lambda a, b: geometry.overlap(a, b, nulls=("gaussian",)), "unknown null 'gaussian'"),
        (lambda a, b: geometry.split_half_overlap(a, k=20), "k=20 was asked"),
    ],
)
def test_geometry_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call(acts(isotropic(30, 0), LAYERS), acts(isotropic(30, 1), LAYERS))


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


def test_a_demo_sized_overlap_takes_seconds():
    rng = np.random.default_rng(0)
    a, b = (acts(rng.standard_normal((n, 6, 576)).astype(np.float32), id=named(p, n)) for n, p in ((320, "a"), (96, "b")))
    started = time.perf_counter()
    geometry.overlap(a, b, k=8, n_draws=200)
    assert time.perf_counter() - started < 6  # 0.8 s alone on one core; 30 layers take five times this
