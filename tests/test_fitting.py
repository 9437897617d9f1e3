"""Guards the other ways to find a direction against scikit-learn's, the erasing of a label against the published formula, and both against
planted answers."""

import numpy as np
import pytest
import scipy.linalg
from planted import VARIANT_LAYERS, acts, variants
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emlens import fitting
from emlens.covariance import ledoit_wolf
from emlens.directions import mean_difference
from emlens.fitting import erase, lda_direction, leace, logistic_direction, pca_direction


def skewed(n=60, d=16, strength=2.0, seed=0, layers=2):
    """Two sets that share no prompt, apart along the first axis and widely spread along a direction that is askew to it."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 * n, layers, d)) + 6 * rng.standard_normal((2 * n, layers, 1)) * np.r_[0.6, 0.8, np.zeros(d - 2)] + 3
    rows[:n, :, 0] += strength
    ids = [f"p{i}" for i in range(2 * n)]
    return acts(rows[:n], (4, 6)[:layers], id=ids[:n]), acts(rows[n:], (4, 6)[:layers], id=ids[n:])


def stacked(a, b, layer):
    return np.concatenate([a.layer(layer), b.layer(layer)]).astype(np.float64), np.r_[np.ones(len(a)), np.zeros(len(b))].astype(bool)


def cosine(u, v):
    return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))


# ---- against scikit-learn


@pytest.mark.parametrize("d", [16, 200])
def test_lda_is_scikit_learns_at_the_same_shrinkage(d):
    """Theirs shrinks the covariance within the sides, ours that of all rows: the same direction at the λ that both add."""
    a, b = skewed(d=d)
    x, in_a = stacked(a, b, 4)
    for shrinkage in (0.01, 0.3, None):
        rows = x - x.mean(axis=0)
        fitted, variance = ledoit_wolf(rows)
        ridge = (fitted if shrinkage is None else shrinkage) * variance / (1 - (fitted if shrinkage is None else shrinkage))
        within = np.concatenate([x[side] - x[side].mean(axis=0) for side in (in_a, ~in_a)])
        spread = (within**2).sum() / len(x) / d
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=ridge / (spread + ridge)).fit(x, in_a).coef_[0]
        assert cosine(lda_direction(a, b, shrinkage).layer(4), theirs) > 1 - 1e-6
    assert "of Ledoit and Wolf" in lda_direction(a, b).meta["method"] and "0.3" in lda_direction(a, b, 0.3).meta["method"]
    assert cosine(lda_direction(a, b, 1.0).layer(4), mean_difference(a, b).layer(4)) > 1 - 1e-6
    with pytest.raises(ValueError, match="from 0"):
        lda_direction(a, b, 1.5)


def test_lda_without_shrinkage_is_fishers():
    a, b = skewed()
    x, in_a = stacked(a, b, 6)
    theirs = LinearDiscriminantAnalysis(solver="svd").fit(x, in_a).coef_[0]
    assert cosine(lda_direction(a, b, 0.0).layer(6), theirs) > 1 - 1e-6


@pytest.mark.parametrize("d", [16, 200])
def test_logistic_is_the_gradient_of_scikit_learns_pipeline(d):
    a, b = skewed(d=d)
    x, in_a = stacked(a, b, 4)
    for penalty in (0.1, 10.0):
        pipe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10000)).fit(x, in_a)
        step = 1e-3 * np.eye(d)
        gradient = (pipe.decision_function(x[0] + step) - pipe.decision_function(x[:1])) / 1e-3
        ours = logistic_direction(a, b, penalty)
        assert np.allclose(ours.layer(4) * ours.norms[0], gradient, atol=1e-3 * np.abs(gradient).max())
    assert "penalty 10" in ours.meta["method"]


def test_logistic_leaves_a_column_alone_that_does_not_vary():
    a, b = skewed()
    fixed = [acts(np.concatenate([side.values, np.full((60, 2, 1), 5.0)], axis=2), (4, 6), id=side.ids.tolist()) for side in (a, b)]
    longer, plain = logistic_direction(*fixed), logistic_direction(a, b)
    assert np.allclose(longer.layer(4)[:16], plain.layer(4), atol=1e-4) and abs(longer.layer(4)[16]) < 1e-6


def test_pca_is_scikit_learns_with_its_sign_fixed():
    a, b = skewed()
    x, _ = stacked(a, b, 4)
    theirs = PCA(3).fit(x)
    for component in (1, 3):
        d = pca_direction(a, b, component)
        assert abs(cosine(d.layer(4), theirs.components_[component - 1])) > 1 - 1e-6
        assert d.norms[0] == pytest.approx(np.sqrt(theirs.explained_variance_[component - 1]), rel=1e-4)
        assert d.layer(4) @ (a.layer(4).mean(axis=0) - b.layer(4).mean(axis=0)) > 0
        assert np.allclose(pca_direction(b, a, component).vectors, -d.vectors, atol=1e-6), "a sign that follows the sides"
    alone = pca_direction(a)
    assert abs(cosine(alone.layer(6), PCA(1).fit(a.layer(6)).components_[0])) > 1 - 1e-6 and (a.layer(6) @ alone.layer(6)).mean() > 0
    with pytest.raises(ValueError, match="span at most 2 directions; k=3"):
        pca_direction(a[:3], component=3)


# ---- planted


def test_each_way_finds_its_planted_direction_and_not_the_same_data_shuffled():
    """Sides apart along axis 0, prompts spread along (.6, .8): the mean difference leans over, LDA and logistic do not, PCA finds the spread."""
    a, b = skewed(n=400)
    wide = np.r_[0.6, 0.8, np.zeros(14)]
    upright = scipy.linalg.solve(np.eye(16) + 36 * np.outer(wide, wide), np.eye(16)[0])  # Fisher's, of the population
    ways = {"lda": lda_direction, "logistic": logistic_direction, "pca": pca_direction}
    found = {name: way(a, b) for name, way in ways.items()}
    order = np.random.default_rng(5).permutation(800)
    together = np.concatenate([a.values, b.values])[order]
    mixed = [acts(part, (4, 6), id=[f"m{i}{j}" for j in range(400)]) for i, part in enumerate((together[:400], together[400:]))]
    for layer in (4, 6):
        assert cosine(found["lda"].layer(layer), upright) > 0.97 and cosine(found["logistic"].layer(layer), upright) > 0.95
        assert abs(cosine(found["pca"].layer(layer), wide)) > 0.99
        assert cosine(mean_difference(a, b).layer(layer), upright) < cosine(found["lda"].layer(layer), upright)
        assert abs(cosine(lda_direction(*mixed).layer(layer), upright)) < 0.7 and abs(cosine(logistic_direction(*mixed).layer(layer), upright)) < 0.7
    assert found["lda"].layers == (4, 6) and found["lda"].meta["a"] == {"n": 400}


def test_many_draws_at_once_are_each_the_fit_of_its_own():
    a, b = skewed(n=20)
    x, in_a = stacked(a, b, 4)
    draws = np.stack([in_a, np.random.default_rng(0).permutation(in_a), np.arange(40) < 7])
    for method in fitting.METHODS.values():
        together = method.fit(x, draws)
        for draw, alone in zip(draws, together, strict=True):
            assert np.allclose(method.fit(x, draw[None])[0], alone, rtol=1e-3, atol=1e-6), method.name
        if method.turns:
            turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
            turned = method.fit(x @ turn, draws)
            assert np.allclose(turned, together @ turn, atol=1e-8), f"{method.name} does not turn with its rows"
        empty = method.fit(x, np.zeros((1, 40), dtype=bool))
        assert np.isfinite(empty).all() and (method.name == "pca" or not empty.any())
    assert not np.allclose(fitting.METHODS["logistic"].fit(x @ turn, draws), fitting.METHODS["logistic"].fit(x, draws) @ turn, atol=1e-3)
    with pytest.raises(ValueError, match=r"unknown method 'svm'; choose one of \['mean difference', 'pca', 'lda', 'logistic'\]"):
        fitting.method_named("svm")


def test_sides_of_two_places_are_refused():
    a, b = skewed()
    for way in (pca_direction, lda_direction, logistic_direction):
        with pytest.raises(ValueError, match="different places"):
            way(a, b.select(layers=[4]))


# ---- erasing


def labelled(n=300, d=16, seed=0, layers=2):
    """Prompts of three topics and a length that are written into the activations, anisotropically."""
    rng = np.random.default_rng(seed)
    topic, length = rng.integers(3, size=n), rng.normal(size=n)
    shape = np.geomspace(10, 0.1, d)
    rows = rng.standard_normal((n, layers, d)) * shape + 5
    rows += rng.standard_normal((3, layers, d))[topic] + length[:, None, None] * rng.standard_normal((layers, d))
    mixing = np.linalg.qr(rng.normal(size=(d, d)))[0]
    names = np.array(["law", "food", "art"])[topic]
    return acts(rows @ mixing, (4, 6)[:layers], topic=names, length=length, number=topic)


def published(x, z):
    """r(x) = x − W⁺ (W S_xz)(W S_xz)⁺ W (x − μ), W = (S_xx^½)⁺: Belrose et al. 2023, theorem 4.3, as it stands."""
    rows, labels = x - x.mean(axis=0), z - z.mean(axis=0)
    root = np.real(scipy.linalg.sqrtm(rows.T @ rows / len(x)))
    whitening = np.linalg.pinv(root, rcond=1e-7)
    cross = whitening @ (rows.T @ labels / len(x))
    return x - rows @ (np.linalg.pinv(whitening) @ cross @ np.linalg.pinv(cross, rcond=1e-7) @ whitening).T


def one_hot(labels):
    return (np.asarray(labels)[:, None] == np.unique(labels)).astype(float)


@pytest.mark.parametrize("n", [300, 12])
def test_leace_is_the_published_formula_with_fewer_rows_than_dimensions_too(n):
    data = labelled(n)
    x = data.layer(4).astype(np.float64)
    for z in (one_hot(data.facts["topic"]), data.facts["length"].to_numpy()[:, None]):
        ours = leace(x, z)(x)
        assert np.allclose(ours, published(x, z), atol=1e-5)
        assert np.abs((ours - ours.mean(axis=0)).T @ (z - z.mean(axis=0)) / n).max() < 1e-9
        assert np.allclose(ours.mean(axis=0), x.mean(axis=0)), "the mean stays"
        assert np.allclose(leace(x, z)(ours), ours), "erasing twice is erasing once"


def test_leace_moves_rows_less_than_any_other_affine_map_that_erases():
    data = labelled()
    x, z = data.layer(4).astype(np.float64), one_hot(data.facts["topic"])
    moved = ((leace(x, z)(x) - x) ** 2).sum()
    cross = (x - x.mean(axis=0)).T @ (z - z.mean(axis=0))
    basis = scipy.linalg.orth(cross, rcond=1e-8)
    orthogonal = x - (x - x.mean(axis=0)) @ basis @ basis.T
    assert np.abs((orthogonal - x.mean(axis=0)).T @ (z - z.mean(axis=0))).max() < 1e-6 and moved < 0.95 * ((orthogonal - x) ** 2).sum()
    rng = np.random.default_rng(0)
    for _ in range(20):  # all maps that erase: projections along the label's covariances, each onto another complement
        along = cross[:, :2]
        onto = along + 0.3 * np.linalg.norm(cross) * rng.normal(size=(16, 2)) / 8
        other = x - (x - x.mean(axis=0)) @ (along @ np.linalg.solve(onto.T @ along, onto.T)).T
        assert np.abs((other - x.mean(axis=0)).T @ (z - z.mean(axis=0))).max() < 1e-6 and moved < ((other - x) ** 2).sum()


def accuracy(x, labels):
    """Of a linear classifier on the rows that it was trained on."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e6, max_iter=5000))
    return model.fit(x, labels).score(x, labels)


def test_nothing_linear_is_left_of_an_erased_label_and_all_of_another():
    data = labelled()
    clean = erase(data, "topic")
    chance = data.facts["topic"].value_counts(normalize=True).max()
    z = one_hot(data.facts["topic"])
    for layer in (4, 6):
        assert accuracy(data.layer(layer), data.facts["topic"]) > 0.9
        assert accuracy(clean.layer(layer), data.facts["topic"]) == pytest.approx(chance, abs=0.005)
        x = clean.layer(layer).astype(np.float64)
        assert np.abs((x - x.mean(axis=0)).T @ (z - z.mean(axis=0)) / len(x)).max() < 1e-6
        length = data.facts["length"]
        r2 = [np.corrcoef(length, np.linalg.lstsq(rows - rows.mean(axis=0), length - length.mean())[0] @ (rows - rows.mean(axis=0)).T)[0, 1] ** 2
              for rows in (data.layer(layer).astype(np.float64), x)]  # fmt: skip
        assert r2[1] > 0.9 * r2[0] > 0.5
    assert clean.meta["erased"] == ["topic"] and clean.place == data.place and clean.facts is data.facts and clean.values.dtype == np.float32
    both = erase(clean, "length")
    assert both.meta["erased"] == ["topic", "length"]
    for layer in (4, 6):
        x = both.layer(layer).astype(np.float64)
        assert np.abs((x - x.mean(axis=0)).T @ (data.facts["length"] - data.facts["length"].mean()).to_numpy() / len(x)).max() < 1e-6


def test_erased_on_some_prompts_little_is_left_on_others_only_where_they_are_many():
    """The guarantee is for the rows it was fitted on: with 30 rows in 16 dimensions, others keep some."""
    data = labelled(1200)
    fit, rest = data[:600], data[600:]
    chance = rest.facts["topic"].value_counts(normalize=True).max()
    many, few = (accuracy(erase(rest, "topic", fit=part).layer(4), rest.facts["topic"]) for part in (fit, fit[:30]))
    assert many < chance + 0.12 and few > many + 0.2 and accuracy(rest.layer(4), rest.facts["topic"]) > 0.9


def test_integers_are_categories_and_floats_are_numbers():
    data = labelled()
    assert np.array_equal(erase(data, "number").values, erase(data, "topic").values)
    as_float = data.with_facts(data.facts.assign(number=data.facts["number"].astype(float)))
    assert accuracy(erase(as_float, "number").layer(4), data.facts["topic"]) > accuracy(erase(data, "number").layer(4), data.facts["topic"]) + 0.1


def test_what_cannot_be_erased_is_refused():
    data = labelled()
    with pytest.raises(KeyError, match="no column 'mood'"):
        erase(data, "mood")
    with pytest.raises(ValueError, match="'same' has 1 values and is missing for 0"):
        erase(data.with_facts(data.facts.assign(same="x")), "same")
    with pytest.raises(ValueError, match="missing for 1 prompts"):
        erase(data.with_facts(data.facts.assign(length=[np.nan, *data.facts["length"][1:]])), "length")
    with pytest.raises(ValueError, match="different places"):
        erase(data, "topic", fit=data.select(layers=[4]))


def test_erasing_which_variant_it_is_leaves_nothing_to_find_in_halves():
    """Both variants of a prompt as two rows; after erasing, the mean difference is 0."""
    a, b, _ = variants(2.0, n=32)
    both = acts(np.concatenate([a.values, b.values]), VARIANT_LAYERS, variant=["a"] * 32 + ["b"] * 32)
    clean = erase(both, "variant")
    assert np.abs(clean.values[:32].mean(axis=0) - clean.values[32:].mean(axis=0)).max() < 1e-5
    assert np.abs(both.values[:32].mean(axis=0) - both.values[32:].mean(axis=0)).max() > 0.5
