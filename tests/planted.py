"""Random arrays with something planted in them, or nothing: sets of prompts for the tests of the analysis rooms."""

import numpy as np

from emlens.activations import Activations

D = 40
LAYERS = (3, 7)
VARIANT_LAYERS = (2, 5, 9)


def isotropic(n, seed, layers=2, d=D):
    return np.random.default_rng(seed).standard_normal((n, layers, d))


def anisotropic(n, seed, layers=2, d=D, power=1.0, frame=0):
    """Rows with a power-law spectrum in a frame of axes; sets of one `frame` share their subspace, others do not."""
    axes = np.linalg.qr(np.random.default_rng(1000 + frame).standard_normal((d, d)))[0]
    return (isotropic(n, seed, layers, d) * np.arange(1, d + 1) ** -power) @ axes.T + 2.0


def acts(values, layers=None, site="resid_post", **facts):
    """Activations with ids q0, q1, … unless `id` is among the facts."""
    return Activations.from_array(values, {"id": named("q", len(values)), **facts}, layers=layers or range(values.shape[1]), site=site)


def named(prefix, n):
    return [f"{prefix}{i}" for i in range(n)]


def variants(strength, seed=0, n=32, noise=0.3, layers=VARIANT_LAYERS, d=16):
    """The same prompts in two variants; in `a` each is moved by `strength` along one direction a layer."""
    rng = np.random.default_rng(seed)
    shape = (n, len(layers), d)
    prompts, planted = 3 * rng.standard_normal(shape) + 5, rng.standard_normal((len(layers), d))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    a = prompts + noise * rng.standard_normal(shape) + strength * planted
    b = prompts + noise * rng.standard_normal(shape)
    category = np.repeat([f"c{i}" for i in range(8)], n // 8)
    return acts(a, layers, category=category), acts(b, layers, category=category), planted
