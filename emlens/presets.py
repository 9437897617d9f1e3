"""The two descriptions of the paper's procedure that circulate, as keyword arguments: `em.overlap(a, b, **em.PUBLISHED["overlap"])`.

Neither is the house's own default. `PUBLISHED` is what the paper's public code does; `REVIEW` what a review page of the paper says it does:
none of that is in the code, so numbers made with it compare with nothing that was published.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "overlap": MappingProxyType({"measure": "norm_fraction", "variance": 0.95, "nulls": "isotropic", "n_draws": 1, "seed": 0}),
    }
)
"""As the public code: the mean over b of ||P(x - mu)|| / ||x - mu||, P and mu the PCA of a to 95 % of its variance, beside *one* random
subspace of as many dimensions (so p says nothing: it is 0.5 or 1)."""

REVIEW: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "overlap": MappingProxyType({"measure": "mean_cos", "k": 8, "nulls": "isotropic", "n_draws": 1000}),
    }
)
"""As the review page: the mean cosine of the principal angles of the first 8 components, beside 1000 Gaussian draws (here: random subspaces)."""
