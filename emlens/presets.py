"""The two descriptions of the paper's procedure that circulate, as keyword arguments: `em.overlap(a, b, **em.PUBLISHED["overlap"])`.

Neither is the house's own default. `PUBLISHED` is what the paper's public code does; `REVIEW` what a review page of the paper says it does:
none of that is in the code, so numbers made with it compare with nothing that was published.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .activations import Activations
from .features import Blocks, FeatureSet, raw, squared_projections
from .learners import lasso, ridge


def _last_layer(acts: Activations) -> Blocks:
    if acts.position != "last":
        raise ValueError(f"the review page reads the last token; these activations are of position {acts.position!r}: record position='last'")
    return raw().blocks(acts)[-1:]


LAST_LAYER = FeatureSet("raw, last layer", "the last of the layers given, at the last token", _last_layer)
"""The rows of the last layer that the activations have, at the last token."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "overlap": MappingProxyType({"measure": "norm_fraction", "variance": 0.95, "nulls": "isotropic", "n_draws": 1, "seed": 0}),
        "predict": MappingProxyType(
            {
                "features": squared_projections(150, "random", seed=0),
                "model": lasso((1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0), tol=1e-4, choose="r2"),
                "baselines": ("mean",),
                "metrics": ("fold_r2", "fold_rmse"),
                "n_folds": 5,
                "repeats": 10,
                "n_permutations": 200,
                "seed": 42,
            }
        ),
        "compare_scores": MappingProxyType(
            {"of": ("mean", "spread"), "tests": ("wilcoxon", "ks", "pearson", "slope"), "correction": "none"},
        ),
    }
)
"""As the public code: the mean over b of ||P(x - mu)|| / ||x - mu||, P and mu the PCA of a to 95 % of its variance, beside *one* random
subspace of as many dimensions (so p says nothing: it is 0.5 or 1).

predict: squares of 150 uncentred projections on random orthonormal directions (seed 0 of the five), lasso, RepeatedKFold(5, 10, 42) that
holds no topic out, means over the 50 folds with the interval of Nadeau and Bengio, beside the mean of the target; 200 permutations of all
rows (p >= 1/201, which every published row reaches). The choice of a layer is left to `acts.select`; the paper took the last. With
`model="ols"` instead of the lasso, it is the paper's unregularised row.

compare_scores: paired Wilcoxon, Kolmogorov-Smirnov, Pearson and least-squares slope of the per-question means and standard deviations, no
correction."""

REVIEW: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "overlap": MappingProxyType({"measure": "mean_cos", "k": 8, "nulls": "isotropic", "n_draws": 1000}),
        "predict": MappingProxyType(
            {
                "features": LAST_LAYER,
                "model": ridge((1.0,)),
                "baselines": ("mean", "random_features"),
                "metrics": ("r2", "spearman"),
                "n_folds": 5,
            }
        ),
        "compare_scores": MappingProxyType({"of": ("mean",), "tests": ("t", "f", "rank_sum"), "correction": "bonferroni", "family": ()}),
    }
)
"""As the review page: the mean cosine of the principal angles of the first 8 components, beside 1000 Gaussian draws (here: random subspaces).

predict: ridge with alpha = 1 on the last layer at the last token, 5 folds that hold no topic out, R2 and rho, beside random activations.

compare_scores: Student's t, the F test of variances and the rank-sum test, as if the questions were not paired; Bonferroni over everything shown."""
