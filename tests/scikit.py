"""Nested ridge written out with scikit-learn, all targets at once: the oracle of the tests of the ridge and of prediction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.preprocessing import StandardScaler


def predicted(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """``[penalty, row, target]``: the test rows, by a ridge on the training rows with features scaled as those are."""
    scaler = StandardScaler().fit(x[train])
    before, after = scaler.transform(x[train]), scaler.transform(x[test])
    return np.array([Ridge(alpha=penalty).fit(before, y[train]).predict(after).reshape(len(test), -1) for penalty in penalties])


def nested(x: np.ndarray, y: np.ndarray, folds: Sequence[Any], penalties: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Predictions ``[row, target]`` of rows held out, and the penalty chosen ``[fold, target]``: by the mean of the inner folds' squared errors."""
    predictions, chosen = np.empty(y.shape), np.empty((len(folds), y.shape[1]))
    for fold, (train, test, inner) in enumerate(folds):
        errors = [np.square(predicted(x, y, a, b, penalties) - y[b]).mean(axis=1) for a, b in inner]
        best = np.mean(errors, axis=0).argmin(axis=0)
        chosen[fold] = np.array(penalties)[best]
        predictions[test] = np.take_along_axis(predicted(x, y, train, test, penalties), best[None, None], axis=0)[0]
    return predictions, chosen


def leave_one_group_out(groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, tuple[tuple[np.ndarray, np.ndarray], ...]]]:
    """(train, test, inner folds) of whole groups, inner rows numbered as the rows of the whole."""
    folds = []
    for train, test in LeaveOneGroupOut().split(groups, groups=groups):
        inner = LeaveOneGroupOut().split(train, groups=groups[train])
        folds.append((train, test, tuple((train[a], train[b]) for a, b in inner)))
    return folds
