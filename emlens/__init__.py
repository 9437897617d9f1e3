"""emlens: mechanistic interpretability of emergent misalignment. Public names in the order of the data-flow, loaded on first use."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_prompts": "prompts",
    "load_model": "models",
    "HookedModel": "models",
    "random_twin": "models",
    "doctor": "laws",
    "Activations": "activations",
    "Place": "activations",
    "finetune": "tuning",
    "Run": "tuning",
    "checkpoint_margins": "dynamics",
    "principal_angles": "geometry",
    "overlap": "geometry",
    "overlap_by_prompt": "geometry",
    "split_half_overlap": "geometry",
    "prompt_geometry": "by_prompt",
    "overlap_correlations": "by_prompt",
    "change_correlations": "by_prompt",
    "over_settings": "by_prompt",
    "PUBLISHED": "presets",
    "REVIEW": "presets",
    "shift_norms": "shifts",
    "shift_agreement": "shifts",
    "similarity": "shifts",
    "similarity_by_prompt": "shifts",
    "split_half_similarity": "shifts",
    "overlap_similarity": "shifts",
    "load_trait": "personas",
    "persona_direction": "personas",
    "contrast_direction": "personas",
    "finetuning_shift": "personas",
    "shifts_by_run": "personas",
    "shift_score_correlation": "personas",
    "PersonaMonitor": "personas",
    "screen": "screening",
    "screen_page": "screening",
    "Direction": "directions",
    "mean_difference": "directions",
    "random_directions": "directions",
    "project": "directions",
    "top_prompts": "directions",
    "pca_direction": "fitting",
    "lda_direction": "fitting",
    "logistic_direction": "fitting",
    "erase": "fitting",
    "stability": "separation",
    "held_out_separation": "separation",
    "compare_scores": "comparing",
    "by_question": "comparing",
    "predict": "prediction",
    "fit_predictor": "predictor",
    "load_predictor": "predictor",
    "Predictor": "predictor",
    "portable": "portables",
    "dose_response": "steering",
    "direction_cosines": "convergence",
    "ablation_transfer": "convergence",
    "Study": "study",
    "summary": "summaries",
}

_ROOMS = (
    "prompts", "positions", "loading", "adapters", "models", "showing", "patching", "attribution", "laws", "activations", "formats", "store",
    "geometry", "measures", "by_prompt", "correlations", "calibration", "shifts", "nulls", "directions", "vectors", "fitting", "separation",
    "personas", "screening", "comparing", "effects", "prediction", "predictor", "portables", "conformal", "features", "learners", "folds",
    "scores", "shuffles", "gains", "refusals", "crossvalidated", "ridge", "baselines", "embeddings", "presets", "steering", "coherence",
    "convergence", "tuning", "dynamics", "stats", "names", "summaries", "resampling", "plots", "study", "report", "cli",
)  # fmt: skip

__all__ = ["__version__", *_WHERE, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"emlens has no {name!r}; public names: {', '.join(_WHERE)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
