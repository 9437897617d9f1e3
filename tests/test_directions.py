"""Guards directions: mean differences, random controls, projections, files."""

import numpy as np
import pytest
from planted import VARIANT_LAYERS as LAYERS
from planted import acts as planted_acts
from planted import variants
from safetensors.numpy import load_file, save_file

from emlens import directions
from emlens.directions import Direction


def acts(values, **facts):
    return planted_acts(values, facts.pop("layers", LAYERS), **facts)


# ---- the noun


def test_mean_difference_finds_a_planted_direction_and_keeps_its_length():
    a, b, planted = variants(4.0, n=400)
    d = directions.mean_difference(a, b, name="planted")
    assert ((d.vectors * planted).sum(axis=1) > 0.98).all() and np.allclose(d.norms, 4, atol=0.2)
    assert d.layers == LAYERS and d.name == "planted" and d.meta["a"]["n"] == 400 and d.meta["position"] == "last"
    assert np.allclose(d.layer(5), (a.layer(5).mean(axis=0) - b.layer(5).mean(axis=0)) / d.norms[1], atol=1e-5)
    assert np.allclose(directions.mean_difference(b, a).vectors, -d.vectors)
    assert repr(d) == "Direction 'planted' · 3 layers × 16 · resid_post · layers 2,5,9 · last"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a, b: (a, b.select(layers=[2, 5])), "different places"),
        (lambda a, b: (a, acts(b.values, site="attn_out")), "different places"),
        (lambda a, b: (a, acts(b.values[:, :, :8])), "d_model 16 and 8"),
        (lambda a, b: (a.where(np.zeros(32, dtype=bool)), b), "side a holds no prompt"),
        (lambda a, b: (a, a), r"no direction at layers \[2, 5, 9\]"),
    ],
)
def test_mean_difference_refuses(spoil, says):
    with pytest.raises(ValueError, match=says):
        directions.mean_difference(*spoil(*variants(1.0)[:2]))


@pytest.mark.parametrize(
    ("vectors", "layers", "says"),
    [
        (np.ones((2, 4), dtype=np.float32), (0, 1), "layer 0 has length 2, not 1"),
        (np.eye(4, dtype=np.float32)[:2] * np.float32(np.nan), (3, 4), "layer 3 has length nan"),
        (np.eye(4, dtype=np.float32)[:2], (0,), "for 1 layers"),
    ],
)
def test_a_direction_that_is_none_is_refused(vectors, layers, says):
    with pytest.raises(ValueError, match=says):
        Direction(vectors, layers)
    with pytest.raises(ValueError, match="zero, NaN or infinite"):
        Direction.from_array(np.array([[0.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="unknown site"):
        Direction(np.eye(4, dtype=np.float32)[:1], (0,), site="residual")


def test_a_layer_is_asked_for_by_its_own_number():
    d = Direction.from_array(np.diag([1.0, 2, 3]), LAYERS)
    assert d.layer(9).tolist() == [0, 0, 1] and d.norms.tolist() == [1, 2, 3]
    with pytest.raises(KeyError, match=r"no layer 1; it has \[2, 5, 9\]"):
        d.layer(1)


def test_random_directions_are_unit_of_the_same_norms_and_a_prefix_of_more():
    like = Direction.from_array(np.diag([1.0, 2, 3, 4])[:3] @ np.ones((4, 4)) + np.eye(4)[:3], LAYERS)
    few, many = directions.random_directions(like, 2, seed=1), directions.random_directions(like, 200, seed=1)
    assert all(np.array_equal(x.vectors, y.vectors) for x, y in zip(few, many, strict=False))
    rows = np.stack([d.vectors for d in many])
    assert np.allclose(np.linalg.norm(rows, axis=2), 1, atol=1e-6) and np.array_equal(many[7].norms, like.norms)
    assert np.abs(rows.mean(axis=0)).max() < 0.15 and not np.allclose(rows[:, 0], rows[:, 1])
    assert many[7].layers == LAYERS and many[7].name == "random 7"
    with pytest.raises(ValueError, match="at least 1"):
        directions.random_directions(like, 0, seed=1)


def test_random_directions_like_activations_have_their_covariance():
    """Uniform directions are a lenient control: along them activations hardly vary. Those drawn from the covariance follow it."""
    spread = np.array([8.0, 4, 1, 1, 1, 1, 1, 1])
    rows = np.random.default_rng(0).standard_normal((400, 2, 8)) * spread + 30
    like, prompts = Direction.from_array(np.eye(8)[:2], (2, 5)), acts(rows, layers=(2, 5))
    drawn, uniform = (directions.random_directions(like, 300, seed=1, acts=given) for given in (prompts, None))
    vectors, plain = (np.stack([d.vectors for d in each]) for each in (drawn, uniform))
    assert np.allclose(np.linalg.norm(vectors, axis=2), 1, atol=1e-6) and np.array_equal(drawn[0].norms, like.norms)
    energy = (vectors**2).mean(axis=(0, 1))
    oracle = np.random.default_rng(2).standard_normal((20000, 8)) * spread
    oracle = ((oracle / np.linalg.norm(oracle, axis=1, keepdims=True)) ** 2).mean(axis=0)
    assert np.allclose(energy, oracle, atol=0.03) and np.allclose((plain**2).mean(axis=(0, 1)), 1 / 8, atol=0.03)
    assert abs((vectors[:, 0] * vectors[:, 1]).sum(axis=1).mean()) < 0.15, "layers are drawn apart; the mean (30) is no direction"
    few = directions.random_directions(like, 2, seed=1, acts=prompts)
    assert all(np.array_equal(x.vectors, y.vectors) for x, y in zip(few, drawn, strict=False))
    assert "covariance" in drawn[0].meta["method"] and uniform[0].meta["method"] == "random"
    with pytest.raises(ValueError, match=r"lack layers \[5\]"):
        directions.random_directions(like, 2, seed=1, acts=prompts.select(layers=[2]))
    with pytest.raises(ValueError, match="do not vary"):
        directions.random_directions(like, 2, seed=1, acts=acts(np.ones((3, 2, 8)), layers=(2, 5)))


# ---- projecting


def test_project_is_the_inner_product_with_the_layer_of_that_number():
    a, b, _ = variants(2.0)
    d = directions.mean_difference(a, b)
    table = directions.project(a.select(layers=[9, 2]), d)
    assert list(table.columns) == [9, 2] and table.index.name == "id" and table.index.tolist() == a.ids.tolist()
    assert table.loc["q3", 9] == pytest.approx(float(a.layer(9)[3] @ d.layer(9)), abs=1e-4)
    assert np.allclose((directions.project(a, d) - directions.project(b, d)).mean(), d.norms, atol=1e-4)
    assert directions.project(a, d).stack().loc[("q0", 5)] == directions.project(a, d).loc["q0", 5]


def test_project_refuses_other_places():
    a, b, _ = variants(2.0)
    d = directions.mean_difference(a, b)
    for other, says in [
        (acts(a.values, layers=(1, 2, 5)), r"no layers \[1\]"),
        (acts(a.values, site="mlp_out"), "mlp_out of width 16"),
        (acts(a.values[:, :, :8]), "of width 8"),
    ]:
        with pytest.raises(ValueError, match=says):
            directions.project(other, d)


# ---- files


def test_a_saved_direction_comes_back_whole(tmp_path):
    a, b, _ = variants(2.0)
    d = directions.mean_difference(a, b, name="naïve")
    back = Direction.load(d.save(tmp_path / "new folder" / "d.safetensors"))
    assert np.array_equal(back.vectors, d.vectors) and np.array_equal(back.norms, d.norms)
    assert (back.layers, back.site, back.name, back.meta) == (d.layers, d.site, d.name, d.meta)
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["d.safetensors"]


def test_a_flipped_byte_and_a_foreign_file_are_noticed(tmp_path):
    path = Direction.from_array(np.eye(4)).save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    for place in (len(whole) - 3, whole.index(b"resid_post"), 3):  # tensors, header text, header length
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged|no direction of ours"):
            Direction.load(path)
    save_file({"x": np.ones(3, dtype=np.float32)}, path)
    with pytest.raises(ValueError, match="no direction of ours"):
        Direction.load(path)
    path.write_bytes(whole)
    assert np.array_equal(load_file(path)["vectors"], np.eye(4)) and Direction.load(path).layers == (0, 1, 2, 3)


def test_other_suffixes_and_missing_files_name_the_way_out(tmp_path):
    d = Direction.from_array(np.eye(4))
    for act in (d.save, Direction.load):
        with pytest.raises(ValueError, match=r"ends in \.safetensors"):
            act(tmp_path / "d.gguf")
    with pytest.raises(FileNotFoundError, match="save a direction there first"):
        Direction.load(tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())
