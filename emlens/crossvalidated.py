"""The mean of a score over folds of repeated cross-validation, with an interval that knows the folds share their training rows. Plain arrays."""

import numpy as np
from scipy import stats as scipy_stats

from .resampling import refuse_not_finite
from .stats import Vector


def nadeau_bengio(values: Vector, test_fraction: float, level: float = 0.95, null: float = 0.0) -> dict[str, float]:
    """Corrected resampled t of Nadeau and Bengio (2003, Machine Learning 52) over the scores of J folds: estimate (their mean), low, high,
    t, p (two-sided, that the mean is `null`), sd (J - 1 in the denominator), n = J.

    values         one score a fold, or one difference of two models' scores on the same fold.
    test_fraction  rows tested / all rows: 1/5 for five folds. Then the variance of the mean is s^2 (1/J + 1/4).

    The training sets overlap: s^2 / J alone is too narrow (for 5 folds x 10 by a factor 3.67). It is an approximation meant for repeated random
    splits of independent rows; whole groups held out are not that. NaN for one fold, t infinite where the folds agree exactly and not on the null.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"values have shape {scores.shape}: one score per fold is needed")
    refuse_not_finite(scores)
    sd = float(scores.std(ddof=1)) if len(scores) > 1 else np.nan
    return corrected_t(float(scores.mean()), sd, len(scores), test_fraction, level, null)


def corrected_t(mean: float, sd: float, n: int, test_fraction: float, level: float = 0.95, null: float = 0.0) -> dict[str, float]:
    """`nadeau_bengio` from what a table keeps of the n folds: their mean and standard deviation (n - 1 in the denominator)."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction}: rows tested / all rows lies inside (0, 1); 1 / n_folds for K folds")
    error = sd * np.sqrt(1 / n + test_fraction / (1 - test_fraction))
    reach = scipy_stats.t.ppf((1 + level) / 2, n - 1) * error if n > 1 else np.nan
    distance = mean - null
    t = distance / error if error > 0 else np.copysign(np.inf, distance) if error == 0 and distance else np.nan
    p = 2 * scipy_stats.t.sf(abs(t), n - 1) if n > 1 else np.nan
    return {"estimate": mean, "low": float(mean - reach), "high": float(mean + reach), "t": float(t), "p": float(p), "sd": float(sd), "n": n}
