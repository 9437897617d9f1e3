"""Guards the feature sets of em.predict: equal to numpy and scikit-learn by hand, blind to test rows, one layer in memory at a time."""

import tracemalloc

import numpy as np
import planted
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from emlens import features, ridge
from emlens.activations import Activations
from emlens.directions import Direction
from emlens.features import SEVERAL

LAYERS = (3, 7)
TRAIN, TEST = np.arange(5, 30), np.arange(5)


@pytest.fixture
def acts():
    return planted.acts(planted.anisotropic(30, 1, d=20), LAYERS, text=[f"text {i}" for i in range(30)])


@pytest.fixture
def others():
    """Prompts of their own at the same place."""
    values = planted.anisotropic(24, 2, d=20, frame=1)
    return Activations.from_array(values, {"id": planted.named("t", 24)}, layers=LAYERS)


def matrices(feature_set, acts, train=TRAIN):
    return {layer: np.asarray(block.features(train), dtype=np.float64) for layer, block in feature_set.blocks(acts)}


def direction(name="evil", seed=0, layers=LAYERS, site="resid_post"):
    return Direction.from_array(np.random.default_rng(seed).standard_normal((len(layers), 20)), layers, site, name)


def sets(acts, others):
    return [
        features.raw(),
        features.squared_projections(5),
        features.squared_projections(5, "pca"),
        features.squared_projections(5, others),
        features.projections(direction()),
        features.subspace_energy(others, 3),
        features.anchors(others),
        features.joined(),
        features.with_positions(acts),
        features.joined_sets(features.raw(), features.projections(direction())),
    ]


def test_raw_is_what_was_recorded(acts):
    found = features.raw().blocks(acts)
    assert [(layer, block.name, block.scaling) for layer, block in found] == [(3, "resid_post", "each"), (7, "resid_post", "each")]
    np.testing.assert_array_equal(matrices(features.raw(), acts)[7], acts.values[:, 1])


def test_random_squared_projections_are_the_papers_lines(acts):
    np.random.seed(4)  # noqa: NPY002  the paper's own generator
    directions, _ = np.linalg.qr(np.random.randn(20, 6))  # noqa: NPY002
    found = matrices(features.squared_projections(6, seed=4), acts)
    for at, layer in enumerate(LAYERS):
        expected = np.array([[(row @ one) ** 2 for one in directions.T] for row in acts.values[:, at].astype(np.float64)])
        np.testing.assert_allclose(found[layer], expected, rtol=1e-10)


def test_random_directions_are_orthonormal_and_of_their_seed():
    one = features.orthonormal(40, 8, 0)
    np.testing.assert_allclose(one.T @ one, np.eye(8), atol=1e-12)
    np.testing.assert_array_equal(one, features.orthonormal(40, 8, 0))
    assert np.abs(one - features.orthonormal(40, 8, 1)).max() > 0.1
    assert features.orthonormal(6, 150, 0).shape == (6, 6), "no more directions than dimensions"


def test_pca_squared_projections_are_scikit_learns_pca_of_the_training_rows(acts):
    for n, kept in ((6, 6), (150, 20)):
        found = matrices(features.squared_projections(n, "pca"), acts)
        for at, layer in enumerate(LAYERS):
            x = acts.values[:, at].astype(np.float64)
            expected = PCA(kept, svd_solver="full").fit(x[TRAIN]).transform(x) ** 2
            np.testing.assert_allclose(found[layer], expected, rtol=1e-6, atol=1e-9)


def test_pca_drops_what_is_rounding(acts):
    values = acts.values.copy()
    values[:, 0] = 1000 + np.outer(np.arange(30), np.ones(20))  # one direction in all
    flat = matrices(features.squared_projections(6, "pca"), planted.acts(values, LAYERS))
    assert flat[3].shape == (30, 1) and flat[7].shape == (30, 6)
    values[:, 0] = 5.0
    constant = matrices(features.squared_projections(6, "pca"), planted.acts(values, LAYERS))
    assert not constant[3].any() and constant[3].shape == (30, 1), "rows that are all the same tell nothing, and do not fail"


def test_squared_projections_on_given_prompts(acts, others):
    found = matrices(features.squared_projections(6, others), acts)
    for at, layer in enumerate(LAYERS):
        fitted = PCA(6, svd_solver="full").fit(others.values[:, at].astype(np.float64))
        np.testing.assert_allclose(found[layer], fitted.transform(acts.values[:, at].astype(np.float64)) ** 2, rtol=1e-5, atol=1e-8)


def test_projections_are_dot_products(acts):
    one, two = direction("evil"), direction("kind", seed=1)
    found = matrices(features.projections(one, two), acts)
    np.testing.assert_allclose(found[7], acts.values[:, 1].astype(np.float64) @ np.stack([one.vectors[1], two.vectors[1]]).T, rtol=1e-10)
    assert features.projections(one, two).name == "projections on evil, kind"


def test_subspace_energy_by_hand(acts, others):
    found = matrices(features.subspace_energy(others, [2, 5]), acts)
    for at, layer in enumerate(LAYERS):
        x, rows = acts.values[:, at].astype(np.float64), others.values[:, at].astype(np.float64)
        axes = np.linalg.svd(rows - rows.mean(axis=0))[2]
        centred = x - rows.mean(axis=0)
        expected = [((centred @ axes[:k].T) ** 2).sum(axis=1) / (centred**2).sum(axis=1) for k in (2, 5)]
        np.testing.assert_allclose(found[layer], np.transpose(expected), rtol=1e-5)
    np.testing.assert_allclose(matrices(features.subspace_energy(others, 2), acts)[3], found[3][:, :1])


def test_anchors_are_cosines_and_do_not_know_the_width(acts, others):
    found = matrices(features.anchors(others), acts)
    centre = others.values[:, 1].mean(axis=0)
    np.testing.assert_allclose(found[7], cosine_similarity(acts.values[:, 1] - centre, others.values[:, 1] - centre), atol=1e-5)
    wider = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 20)))[0].T  # another model: turned, scaled, shifted, wider

    def there(some):
        return Activations.from_array(3 * some.values @ wider + 7, some.facts, layers=LAYERS)

    moved = matrices(features.anchors(there(others)), there(acts))
    np.testing.assert_allclose(moved[7], found[7], atol=1e-4)
    unlike = matrices(features.anchors(others), planted.acts(acts.values[::-1], LAYERS))
    assert np.abs(unlike[7] - found[7]).max() > 0.1, "the twin: other prompts have other features"


@pytest.mark.parametrize("layers", ["all", [7]])
def test_joined_layers_are_all_features_side_by_side_to_a_ridge(acts, layers):
    y, alpha = np.random.default_rng(5).standard_normal(30), 3.0
    ((key, block),) = features.joined(layers).blocks(acts)
    coordinates = block.features(TRAIN)
    wide = np.hstack([acts.layer(i) for i in (LAYERS if layers == "all" else layers)]).astype(np.float64)
    assert key == SEVERAL and coordinates.shape[1] == min(len(TRAIN) - 1, wide.shape[1])
    spectrum = ridge.spectrum(coordinates, TRAIN, TEST, block.scaling)
    found = ridge.predict_from(spectrum, y[TRAIN, None], np.array([alpha]))[:, 0]
    scaler = StandardScaler().fit(wide[TRAIN])
    same = Ridge(alpha * wide.shape[1] / coordinates.shape[1]).fit(scaler.transform(wide[TRAIN]), y[TRAIN])
    np.testing.assert_allclose(found, same.predict(scaler.transform(wide[TEST])), atol=1e-8)


def test_other_positions_are_matched_by_id(acts):
    turned = np.random.default_rng(0).permutation(30)
    mean = Activations.from_array(acts.values[turned] + 1, acts.facts.iloc[turned], layers=LAYERS, position="mean")
    embed = Activations.from_array(acts.values[:, 0], acts.facts, site="embed")
    ((_, first), (_, second)) = features.with_positions(mean, embed).blocks(acts)
    np.testing.assert_allclose(second.features(TRAIN), np.hstack([acts.layer(7), acts.layer(7) + 1, acts.layer(3)]), rtol=1e-6)
    assert first.name == "resid_post last + resid_post mean + embed last"
    with pytest.raises(ValueError, match="lacks 1 of 30 prompts, e.g. 'q0'"):
        features.with_positions(mean.where("id != 'q0'")).blocks(acts)
    with pytest.raises(ValueError, match="30 prompts share an id .* but not the 'text'"):
        features.with_positions(mean.with_facts(mean.facts[["id"]].assign(text="another"))).blocks(acts)
    with pytest.raises(ValueError, match=r"lacks the layers \[7\]"):
        features.with_positions(mean.select(layers=[3])).blocks(acts)


def test_joined_sets_weigh_alike(acts):
    both = features.joined_sets(features.raw(), features.projections(direction()), features.joined())
    (layer, block), _ = both.blocks(acts)
    found = block.features(TRAIN)
    assert layer == 3 and block.scaling == "block" and block.name == "resid_post + projections on evil + joined"
    variance = found[TRAIN].var(axis=0)
    np.testing.assert_allclose([variance[:20].sum(), variance[20], variance[21:].sum()], 1)
    assert np.corrcoef(found[:, 20], acts.layer(3) @ direction().vectors[0])[0, 1] == pytest.approx(1)
    ((key, _),) = features.joined_sets(features.joined(), features.joined([3])).blocks(acts)
    assert key == SEVERAL


def test_text_stands_beside_activations_but_no_other_fact_does(acts):
    acts = acts.with_facts(acts.facts[["id"]].assign(score=np.arange(30.0)))
    found = matrices(features.joined_sets(features.raw(), features.from_text("tfidf")), acts)
    assert set(found) == set(LAYERS) and found[3].shape == (30, 20 + 26), "a word of all, and one for each training row"
    with pytest.raises(ValueError, match="'score' reads more than the text"):
        features.from_text("score").blocks(acts)


def test_training_rows_do_not_know_the_test_rows(acts, others):
    values = acts.values.copy()
    values[TEST] = 100 * np.random.default_rng(9).standard_normal(values[TEST].shape)
    changed = Activations.from_array(values, acts.facts, layers=LAYERS)
    for one in sets(acts, others)[:-2]:
        before, after = matrices(one, acts), matrices(one, changed)
        for layer in before:
            assert before[layer].shape == after[layer].shape
            assert not np.allclose(before[layer][TEST], after[layer][TEST]), f"{one.name}: the test rows' features are of the test rows"
            signs = np.sign((before[layer][TRAIN] * after[layer][TRAIN]).sum(axis=0))
            np.testing.assert_allclose(before[layer][TRAIN], after[layer][TRAIN] * signs, rtol=1e-4, atol=1e-5, err_msg=one.name)


def test_names_and_shapes_of_every_set(acts, others):
    found = sets(acts, others)
    assert len({one.name for one in found}) == len(found)
    for one in found:
        for layer, block in one.blocks(acts):
            matrix = block.features(TRAIN)
            assert layer in (*LAYERS, SEVERAL) and matrix.ndim == 2 and len(matrix) == 30 and np.isfinite(matrix).all()
            assert block.scaling in ridge.SCALINGS and (block.name == one.name or one.name.startswith(("raw", "with")))


def test_each_set_finds_what_is_planted_for_it_and_not_what_is_not():
    rng = np.random.default_rng(3)
    values = rng.standard_normal((120, 2, 8))
    acts = Activations.from_array(values)
    q, d = features.orthonormal(8, 4, 0), Direction.from_array(rng.standard_normal((2, 8)))
    noise = 0.3 * rng.standard_normal(120)
    y = np.column_stack(
        [
            (values[:, 0] @ q[:, 1]) ** 2 + noise,  # a square: not linear in the rows
            values[:, 0, 0] + values[:, 1, 0] + noise,  # half of it in each layer
            values[:, 1] @ d.vectors[1] + noise,
        ]
    )
    folds = [ridge.Fold(np.delete(np.arange(120), test), test, ()) for test in np.arange(120).reshape(4, 30)]
    folds = [fold._replace(inner=tuple((np.setdiff1d(fold.train, part), part) for part in fold.train.reshape(3, 30))) for fold in folds]

    def r2(feature_set):
        found = [ridge.nested_ridge(b.features, y, folds, (1.0, 10.0, 100.0, 1000.0), b.scaling).predictions for _, b in feature_set.blocks(acts)]
        return np.array([ridge.r2(y, one) for one in found])

    raw, squared, joined, along = r2(features.raw()), r2(features.squared_projections(4)), r2(features.joined()), r2(features.projections(d))
    assert squared[0, 0] > 0.8 and max(raw[:, 0].max(), squared[1, 0], along[:, 0].max()) < 0.2
    assert joined[0, 1] > 0.8 and 0.2 < raw[:, 1].max() < 0.6 and squared[:, 1].max() < 0.2
    assert along[1, 2] > 0.8 and along[0, 2] < 0.2 < 0.8 < raw[1, 2]


def test_two_of_a_kind_are_told_apart(acts, others):
    one = features.subspace_energy(others, 2).named("medical")
    assert one.name == "medical" and [block.name for _, block in one.blocks(acts)] == ["medical"] * 2
    np.testing.assert_array_equal(matrices(one, acts)[7], matrices(features.subspace_energy(others, 2), acts)[7])


def test_sets_by_name():
    assert features.feature_set("raw").name == "raw" and features.feature_set("squared_projections").name == "squared_projections"
    one = features.joined()
    assert features.feature_set(one) is one
    with pytest.raises(ValueError, match="unknown features 'personas': choose among 'raw', 'squared_projections', 'joined'"):
        features.feature_set("personas")


def test_what_does_not_fit_is_refused_before_anything_is_computed(acts, others):
    elsewhere = Activations.from_array(others.values, others.facts, layers=LAYERS, site="mlp_out")
    narrower = Activations.from_array(others.values[:, :, :9], others.facts, layers=LAYERS)
    cases = [
        (features.subspace_energy(elsewhere, 2), "different places"),
        (features.anchors(narrower), "d_model 9 and 20"),
        (features.squared_projections(5, others.select(layers=[3])), r"lack the layers \[7\]"),
        (features.projections(direction(site="mlp_out")), "at one place of one model"),
        (features.projections(direction(layers=(3,))), r"has no layers \[7\]"),
        (features.joined([3, 4]), r"layers \[4\] were not recorded"),
    ]
    for one, words in cases:
        with pytest.raises((ValueError, KeyError), match=words):
            one.blocks(acts)
    for wrong, words in (
        (lambda: features.squared_projections(source="svd"), "choose 'random', 'pca'"),
        (lambda: features.joined("last"), "give 'all' or block indices"),
        (features.projections, "no direction"),
        (features.with_positions, "no other recording"),
        (lambda: features.joined_sets(features.raw()), "two or more"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_one_layer_at_a_time_is_in_memory():
    n, layers, d = 60, 40, 1000
    acts = Activations.from_array(np.random.default_rng(0).standard_normal((n, layers, d)).astype(np.float32))
    one_layer = n * d * 8
    several = [
        (features.raw(), 1),
        (features.squared_projections(20), 4),
        (features.squared_projections(20, "pca"), 6),
        (features.joined(), 6),
    ]
    for one, most in several:
        tracemalloc.start()
        blocks = one.blocks(acts)
        assert tracemalloc.get_traced_memory()[1] < one_layer, f"{one.name}: nothing is computed before it is asked for"
        for _, block in blocks:
            block.features(np.arange(50))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most * one_layer, f"{one.name}: {peak / one_layer:.1f} layers in float64"
    assert acts.values.astype(np.float64).nbytes > 30 * one_layer, "the twin: all layers at once would be seen"


def test_remembered_features_are_the_same_and_made_once_for_each_training_set(acts):
    asked = []

    def make(train):
        asked.append(len(train))
        return acts.layer(3)[:, : len(train) % 7 + 1].astype(np.float64)

    plain = features.of_block(features.Block("mine", make, "each", "note"))
    kept = plain.remembered(acts)
    assert (kept.name, kept.note) == ("mine", "note") and [layer for layer, _ in kept.blocks(acts)] == [SEVERAL]
    found = [matrices(kept, acts, train)[SEVERAL] for train in (TRAIN, TRAIN, TRAIN[:-1], TRAIN)]
    assert asked == [25, 24], "once for each set of training rows, over calls"
    assert np.array_equal(found[0], matrices(plain, acts)[SEVERAL]) and np.array_equal(found[2], matrices(plain, acts, TRAIN[:-1])[SEVERAL])
