"""Guards the rival predictors: read from the right facts, fitted on training rows alone, never the target itself; and the search for copies."""

import warnings

import numpy as np
import pandas as pd
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
    with pytest.raises(KeyError, match="'tfidf', a numeric column of the facts"):
        baselines.block("embedding", facts)
    with pytest.raises(ValueError, match="get_dummies"):
        baselines.block("note", facts)
    facts.loc[2, "margin before"] = np.nan
    with pytest.raises(ValueError, match="1 of 12 rows"):
        baselines.block("margin before", facts)


def test_the_target_in_another_column_is_refused(facts):
    facts["score"] = 100 - 2 * facts["margin before"]
    with pytest.raises(ValueError, match="is the target 'score' itself"):
        baselines.block("margin before", facts, target="score")
    facts["score"] += np.random.default_rng(0).standard_normal(12)
    assert baselines.block("margin before", facts, target="score").name == "margin before", "the twin: merely related is fine"


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
