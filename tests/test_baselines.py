"""Guards the rival predictors: read from the right facts, fitted on training rows alone, never the target itself; and the search for copies."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import planted
import pytest

from emlens import baselines
from emlens.activations import Activations

WORDS = np.array(["river", "stone", "cloud", "apple", "chair", "lamp", "music", "paper", "glass", "bread"])


@pytest.fixture
def facts():
    rng = np.random.default_rng(0)
    texts = [f"{' '.join(rng.choice(WORDS, 6))} {i}" for i in range(12)]
    messages = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "old"}, {"role": "user", "content": t}] for t in texts]
    return pd.DataFrame({"messages": messages, "text": "unused", "kind": list("aabbccaabbcc"), "margin before": np.arange(12) ** 2.0, "note": "x"})


def matrix(block, train=None):
    return block.features(np.arange(12) if train is None else train)


def test_text_is_the_last_user_message_or_a_column(facts):
    assert baselines.texts(facts)[3].endswith(" 3")
    assert baselines.texts(pd.DataFrame({"question": ["a b", "c"]})) == ["a b", "c"]
    with pytest.raises(ValueError, match="messages, text, question, prompt"):
        baselines.texts(facts[["kind"]])
    with pytest.raises(ValueError, match="1 of 2 prompts have no text in 'text', first row 1"):
        baselines.texts(pd.DataFrame({"text": ["a", None]}))


def test_length_counts_characters_and_words():
    np.testing.assert_array_equal(baselines.length(["ab cd", "é"]), [[5, 2], [1, 1]])


def test_tfidf_knows_only_the_words_of_training_rows():
    texts = ["red red blue", "blue green", "green red", "violet violet"]
    seen = baselines.tfidf(texts)(np.arange(3))
    assert seen.shape == (4, 3) and not seen[3].any(), "violet is in no training row"
    np.testing.assert_allclose(np.linalg.norm(seen[:3], axis=1), 1)
    assert baselines.tfidf(texts)(np.arange(4)).shape == (4, 4), "the twin: a training row brings its words"


def test_category_is_the_group_column(facts):
    np.testing.assert_array_equal(matrix(baselines.block("category", facts, "kind"))[:4], [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    with pytest.raises(ValueError, match="leave 'category' out"):
        baselines.block("category", facts)


def test_facts_and_functions_are_blocks(facts):
    column = baselines.block("margin before", facts)
    assert column.name == "margin before" and matrix(column).shape == (12, 1)

    def dummies(table):
        return pd.get_dummies(table["kind"])

    own = baselines.block(dummies, facts)
    assert own.name == "dummies" and matrix(own).shape == (12, 3)
    with pytest.raises(ValueError, match=r"needed is \[12\]"):
        baselines.block(lambda table: np.zeros(3), facts)


def test_mean_has_nothing_to_go_by(facts):
    assert not matrix(baselines.block("mean", facts)).any()


def test_bad_baselines_name_the_way_out(facts):
    with pytest.raises(KeyError, match="'tfidf', 'tfidf_chars', 'embedding', 'random_features', a numeric column of the facts"):
        baselines.block("embeddings", facts)
    with pytest.raises(ValueError, match="get_dummies"):
        baselines.block("note", facts)
    facts.loc[2, "margin before"] = np.nan
    with pytest.raises(ValueError, match="1 of 12 rows"):
        baselines.block("margin before", facts)


def test_the_target_in_another_column_is_refused(facts):
    facts["score"] = 100 - 2 * facts["margin before"]
    with pytest.raises(ValueError, match="is the target 'score' itself"):
        baselines.block("margin before", facts, target="score")
    facts["score"] = -np.log1p(facts["margin before"])
    with pytest.raises(ValueError, match="itself, up to scale or a map that keeps the order: leave it out"):
        baselines.block("margin before", facts, target="score")
    facts["score"] = facts["margin before"] + 30 * np.random.default_rng(0).standard_normal(12)
    assert baselines.block("margin before", facts, target="score").name == "margin before", "the twin: merely related is fine"
    facts["score"] = 1.0
    assert baselines.block("margin before", facts, target="score"), "a constant is nobody's copy"


def test_the_target_hidden_in_a_function_is_refused(facts):
    rng = np.random.default_rng(0)
    facts["score"], noise = rng.standard_normal(12), rng.standard_normal((12, 3))

    def column(table):
        return np.column_stack([noise, np.exp(table["score"])])

    def sum_of_columns(table):
        return np.column_stack([noise[:, 0], noise[:, 0] - 3 * table["score"]])

    with pytest.raises(ValueError, match="'column' is the target"):
        baselines.block(column, facts, target="score")
    with pytest.raises(ValueError, match="columns of the baseline 'sum_of_columns' add up to the target 'score'"):
        baselines.block(sum_of_columns, facts, target="score")
    assert baselines.block(lambda table: noise, facts, target="score"), "the twin: three columns of noise"
    assert baselines.block(lambda table: rng.standard_normal((12, 30)), facts, target="score"), "more columns than prompts add up to anything"


def test_facts_made_of_the_target_are_refused():
    rng = np.random.default_rng(0)
    facts = pd.DataFrame({"score": rng.standard_normal(40), "kind": np.repeat(list("abcdefgh"), 5)})
    grouped = facts.groupby("kind")["score"]
    facts["encoded"], facts["others"] = grouped.transform("mean"), (grouped.transform("sum") - facts["score"]) / 4
    facts["deviation"] = facts["score"] - facts["encoded"]
    with pytest.raises(ValueError, match="'encoded' is the mean of the target 'score' over the prompts that share its value"):
        baselines.block("encoded", facts, target="score")
    for name in ("others", "deviation"):
        with pytest.raises(ValueError, match=f"{name!r} and the group together are the target 'score'"):
            baselines.block(name, facts, "kind", target="score")
    facts["earlier"] = facts["score"] + 0.5 * rng.standard_normal(40)
    facts["rating"] = np.round(facts["earlier"])
    facts["level"] = facts.groupby("kind")["earlier"].transform("mean")
    for name in ("earlier", "rating", "level"):
        assert baselines.block(name, facts, "kind", target="score").name == name, "the twin: of earlier scores"


def test_a_target_that_the_group_decides_is_no_leak(facts):
    facts["score"] = facts["kind"].map({"a": 1.0, "b": 2.5, "c": 4.0})
    assert baselines.block("margin before", facts, "kind", target="score").name == "margin before"


def test_all_but_the_target_is_warned_of():
    rng = np.random.default_rng(0)
    facts = pd.DataFrame({"score": rng.standard_normal(200)})
    facts["again"] = facts["score"] + 1e-3 * rng.standard_normal(200)
    with pytest.warns(UserWarning, match=r"'again' orders the prompts as the target 'score' does \(rank correlation 0.99"):
        baselines.block("again", facts, target="score")
    facts["again"] = facts["score"] + 0.3 * rng.standard_normal(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baselines.block("again", facts, target="score")


def test_which_baselines_know_the_text_alone(facts):
    facts["category"] = facts["kind"]
    known = {name: baselines.block(name, facts).text for name in (*baselines.DEFAULT, *baselines.TEXT, "margin before") if name != "embedding"}
    assert known == {"mean": False, "category": True, "length": True, "tfidf": True, "tfidf_chars": True, "margin before": False}
    vowels = baselines.FromText("vowels", lambda texts: np.array([sum(c in "aeiou" for c in text) for text in texts]))
    found = baselines.block(vowels, facts, target="margin before")
    assert found.text and found.name == "vowels" and matrix(found).shape == (12, 1)
    assert not baselines.block(lambda table: table["margin before"], facts).text


def test_letters_see_what_words_do_not():
    texts = ["walking", "walked", "singing", "unwalkable"]
    words, letters = baselines.tfidf(texts)(np.arange(3)), baselines.tfidf(texts, "letters")(np.arange(3))
    assert not words[3].any() and letters[3] @ letters[0] > 0.1
    np.testing.assert_allclose(np.linalg.norm(letters, axis=1), 1)
    assert letters[3] @ letters[0] > letters[3] @ letters[2]


def test_random_features_have_the_covariance_and_nothing_else():
    rng = np.random.default_rng(0)
    x = planted.anisotropic(3000, 0, d=6)
    x[:, 1] = x[:, 0] @ rng.standard_normal((6, 6))
    acts = Activations.from_array(x, layers=[4, 9])
    (_, first), (layer, second) = baselines.rivals("random_features", acts, seed=1)
    rows = first.features(np.arange(10)).astype(np.float64), second.features(np.arange(10)).astype(np.float64)
    assert layer == 9 and first.name == "random_features" and not first.text
    drawn, real = np.hstack(rows), np.hstack([acts.layer(4), acts.layer(9)])
    scale = np.sqrt(np.outer(real.var(axis=0), real.var(axis=0)))
    assert np.abs((np.cov(drawn.T) - np.cov(real.T)) / scale).max() < 0.1, "also between layers"
    assert (np.abs(drawn.mean(axis=0) - real.mean(axis=0)) < 0.1 * real.std(axis=0)).all()
    assert np.abs([np.corrcoef(drawn[:, i], real[:, i])[0, 1] for i in range(12)]).max() < 0.08, "independent of the prompts"
    np.testing.assert_array_equal(first.features(np.arange(10)), rows[0])
    assert np.abs(baselines.rivals("random_features", acts, seed=2)[0][1].features(np.arange(9)) - rows[0]).max() > 0.1


def model(n_layers, layers=None, d=8, seed=0, **facts):
    """A recording of six prompts in a model of so many blocks."""
    kept = range(n_layers) if layers is None else layers
    values = np.random.default_rng(seed).standard_normal((6, len(kept), d))
    told = {"id": list("abcdef"), "text": list("uvwxyz"), **facts}
    return Activations.from_array(values, told, layers=kept, meta={"model": f"m{n_layers}", "architecture": f"LM {n_layers}×{d}"})


def test_another_model_stands_at_the_same_relative_depth():
    acts, other = model(12, [0, 5, 11]), model(24, d=5, seed=1)
    found = baselines.rivals(other.select(ids=list("fedcba")), acts)
    assert [layer for layer, _ in found] == [0, 5, 11] and {block.name for _, block in found} == {"m24"}
    for (_, block), theirs in zip(found, (1, 11, 23), strict=True):
        np.testing.assert_array_equal(block.features(np.arange(3)), other.layer(theirs))
        assert f"at layer {theirs} " in block.note
    assert baselines.rivals(other, acts, name="twin")[0][1].name == "twin"
    tuned = replace(other, meta={**other.meta, "adapter": "medical"})
    assert baselines.rivals(tuned, acts)[0][1].name == "m24 medical"
    few = baselines.rivals(other.select(layers=[2, 20]), acts)
    assert [block.note.split(" (")[0][-2:].strip() for _, block in few] == ["2", "2", "20"], "the nearest there is"


def test_other_prompts_are_no_rival():
    acts = model(12)
    with pytest.raises(ValueError, match="lacks 1 of 6 prompts, e.g. 'c'"):
        baselines.rivals(model(24).where("id != 'c'"), acts)
    with pytest.raises(ValueError, match="1 prompts share an id .* not the 'text', first 'b'"):
        baselines.rivals(model(24, text=list("u?wxyz")), acts)
    with pytest.raises(ValueError, match="one site and position"):
        baselines.rivals(Activations.from_array(acts.values, acts.facts, position="mean"), acts)
    with pytest.raises(TypeError, match="rivals"):
        baselines.block(acts, acts.facts)
    with pytest.raises(ValueError, match="rivals"):
        baselines.block("random_features", acts.facts)


def test_plain_baselines_have_layer_minus_one():
    acts = model(3, before=np.arange(6.0), score=np.arange(6.0)[::-1])
    ((layer, block),) = baselines.rivals("length", acts)
    assert layer == -1 and block.name == "length"
    with pytest.raises(ValueError, match="is the target 'score' itself"):
        baselines.rivals("before", acts, target="score")
    assert baselines.rivals(lambda facts: facts["before"], acts, name="mine")[0][1].name == "mine"


def activations(n=6):
    values = np.random.default_rng(0).standard_normal((n, 3, 8)) + 50  # a large common part, as models have
    return values.astype(np.float32)


def test_copies_are_found_by_activations():
    values, facts = activations(), pd.DataFrame({"id": list("abcdef")})
    assert baselines.copies(values, facts) == []
    values[4] = values[1] * (1 + 1e-7)
    assert baselines.copies(values, facts) == [(1, 4)]
    values[4, 0] += 0.1
    assert baselines.copies(values, facts) == [], "the same at one layer only is not the same prompt"


def test_copies_are_found_by_text():
    facts = pd.DataFrame({"text": ["One  thing", "two", None, "one thing ", "three", None]})
    assert baselines.copies(activations(), facts) == [(0, 3)]


def test_copies_across_groups_are_refused_inside_groups_allowed():
    values = activations()
    values[3] = values[0]
    acts = Activations.from_array(values, {"id": list("abcdef")})
    with pytest.raises(ValueError, match="'a' and 'd', and lie in different groups of 'topic'"):
        baselines.refuse_copies(acts, np.array([0, 0, 0, 1, 1, 1]), "topic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baselines.refuse_copies(acts, np.array([0, 0, 1, 0, 1, 1]), "topic")
    with pytest.warns(UserWarning, match="plain folds train on copies"):
        baselines.refuse_copies(acts, None, None)
