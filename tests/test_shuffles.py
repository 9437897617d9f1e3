"""Guards which targets could as well stand with other prompts: whole groups that change places among groups of equal size."""

import math

import numpy as np
import pytest

from emlens import shuffles


def test_group_blocks_enumerates_few_groups():
    codes = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 3])  # three of size 3 trade places, the one of size 2 stays
    orders = shuffles.group_blocks(codes, 11, 200, 0)
    assert orders.shape == (math.factorial(3) - 1, 11) and len(np.unique(orders, axis=0)) == 5
    assert not (orders == np.arange(11)).all(axis=1).any(), "the observed arrangement is not among the draws"
    assert (np.sort(orders, axis=1) == np.arange(11)).all() and (orders[:, 9:] == [9, 10]).all()
    for order in orders:
        for group in range(3):
            moved = order[codes == group]
            assert len(set(codes[moved])) == 1 and (np.diff(moved) == 3).all(), "a group moves as a whole, in its own order"


def test_group_blocks_samples_many_groups_and_refuses_unequal_ones():
    codes = np.repeat(np.arange(8), 3)
    orders = shuffles.group_blocks(codes, 24, 50, seed=1)
    assert orders.shape == (50, 24) and len(np.unique(orders, axis=0)) > 45
    assert (orders == shuffles.group_blocks(codes, 24, 50, seed=1)).all() and (orders != shuffles.group_blocks(codes, 24, 50, seed=2)).any()
    with pytest.raises(ValueError, match="within_groups"):
        shuffles.group_blocks(np.array([0, 0, 0, 1, 1]), 5, 50, 0)
