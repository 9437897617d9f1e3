# %% [markdown]
# # Part 3, data: do prompts nearer the training prompts shift more like them?
#
# From the paper's published tables: one row per prompt of three narrow tunings at two layers and two positions (12 settings). Recomputes
# every correlation the tables allow (288 of the 960 printed in the figures) and the other numbers of part 3, says which are met, and puts the
# controls beside the paper's reading: prompts permuted (everywhere, and inside their category), prompt length, category, the one-line baseline,
# a random subspace, and what the settings say together. Settings are never pooled, except to check one number that was.
#
#     python analyses/3_data.py [--paper ../shared/paper] [--out figures] [--draws 2000]
#
# Layers are named as there: "layer 32" is block 31 of 64, "layer 64" the stream after the final norm; `last` is the last prompt token,
# `mean_all` the mean over all of the prompt, template and first token included.

# %%
import argparse
import hashlib
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

import emlens as em
from emlens import plots, stats
from emlens.by_prompt import over_settings
from emlens.correlations import correlation_contrast, partial_correlation
from emlens.subspaces import explained_energy

SEED = 0
ALPHA = 0.05
SETTING = ["tuning", "published_layer", "position"]
TUNINGS = {
    ("Qwen2.5-32B-Instruct", "finance", "general"): "Qwen finance",
    ("Qwen2.5-Coder-32B-Instruct", "finance", "hbp"): "Coder finance",
    ("Qwen2.5-Coder-32B-Instruct", "insecure", "hbp"): "Coder insecure",
}  # tuned model, narrow training set, evaluation prompts (1414 or 320)
POSITIONS = {"last_prompt_token": "last", "mean_prompt": "mean_all"}
OVERLAP, SIMILARITY = "prompt_pca_projection_fraction", "mean_delta_cosine"
BASELINE, RANDOM, LENGTH = "prompt_train_mean_cosine_similarity", "random_projection_fraction", ["prompt_len", "inverse_length"]
RECONSTRUCTION, BEYOND_MEAN = "pca_cosine_reconstructed_eval_delta", "pca_explained_l2_fraction_centered"
PARTIALS = {
    "given length": LENGTH,
    "given length, category": [*LENGTH, "category"],
    "given length, category, baseline": [*LENGTH, "category", BASELINE],
}  # covariates taken out of overlap and similarity both; 1 / length because a mean over tokens divides the first token's norm by it
SCORES = {"Coder finance": "Qwen2.5-Coder-32B-Instruct_finance_all_resp_1e-05_hbp", "Coder insecure": "Qwen2.5-Coder-32B-Instruct_insecure_all_resp_1e-05_hbp"}

# What was published or is known of the tables, by quantity: decimals given, then the numbers. Six numbers are Qwen finance, Coder finance, Coder
# insecure, each at layer 32 and 64. A number is met when the recomputed one rounds to it.
PUBLISHED: dict[str, tuple[int, list[float]]] = {
    "mean overlap, six settings: last, mean_all": (3, [0.740, 0.949]),
    "mean overlap with a random subspace: last, mean_all": (3, [0.184, 0.195]),
    "mean overlap, last: least, largest": (2, [0.53, 0.89]),
    "mean overlap, last: k = 1, 8, 32, 128": (3, [0.168, 0.415, 0.598, 0.742]),
    "mean overlap with a random subspace, last: k = 1, 8, 32, 128": (3, [0.011, 0.038, 0.074, 0.158]),
    "mean shift cosine: last, mean_all": (3, [0.656, 0.897]),
    "mean shift cosine, last: least, largest": (2, [0.41, 0.82]),
    "reconstruction cosine, last: k = 0 (the mean alone), 1, 8, 128": (3, [0.656, 0.661, 0.717, 0.831]),
    "energy explained beyond the mean, last: k = 1, 8, 128": (3, [0.064, 0.252, 0.585]),
    "r(overlap, shift cosine), last": (3, [0.849, 0.285, 0.887, 0.257, 0.607, 0.172]),
    "r(overlap, shift cosine), last: mean of six": (3, [0.510]),
    "r(overlap, shift cosine), last, inside categories: mean of six": (3, [0.461]),
    "r(overlap, shift cosine), last, all prompts of all settings pooled": (3, [0.488]),
    "r(overlap, reconstruction cosine at 95 %), last": (3, [0.905, 0.648, 0.943, 0.525, 0.845, 0.369]),
    "r(overlap, reconstruction cosine at 95 %), mean_all": (3, [0.446, 0.749, 0.497, 0.231, 0.538, 0.178]),
    "r(overlap, shift cosine), mean_all": (3, [-0.353, -0.248, -0.176, -0.364, -0.561, -0.204]),
    "r(length, shift cosine), mean_all: least, largest": (2, [0.39, 0.83]),
    "r(overlap with a random subspace, shift cosine), last": (3, [0.424, 0.069, -0.105, 0.137, 0.225, 0.116]),
    "r(cosine to the mean training prompt, shift cosine), last": (3, [0.938, 0.775, 0.953, 0.716, 0.832, 0.552]),
    "r(cosine to the mean training prompt, shift cosine), last: mean of six": (3, [0.794]),
    "variance of training prompts on their first component, layer 32, mean_all": (2, [0.72, 0.38, 0.81]),
    "r(overlap, length), layer 32, mean_all": (2, [-0.65, -0.90, -0.92]),
    "change of RMSE by adding the mean shift, last (%)": (0, [-35, -21, -28, 5, -28, -4]),
    "Spearman(shift cosine, harmless), layer 32, last: Coder finance, Coder insecure": (2, [-0.42, 0.02]),
}

parser = argparse.ArgumentParser()
parser.add_argument("--paper", type=Path, default=Path("../shared/paper"), help="folder of the published tables")
parser.add_argument("--out", type=Path, default=Path("figures"))
parser.add_argument("--draws", type=int, default=2000, help="permutations, and bootstrap samples")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## The tables
