"""Laws of reading: what emlens records is what the model computes, however prompts are batched, padded and shared, and whatever reads it."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from .._engines import Engine, adding, decoder_of, find_blocks
from .._passes import mean_row
from ..activations import SINGLE_LAYER_SITES, SITES, Place
from ..adapters import switched
from .law import ACTIVATION, BITWISE, ROUNDING, VECTOR, differing, law, worst
from .patient import DoesNotApply, Patient

Stacked = Float[np.ndarray, "prompt layer d_model"]


@law(
    "recorded in a batch of 8 = one by one",
    unit=VECTOR,
    tolerance=ROUNDING,
    remedy="Padding or the rest of the batch changes what is read: record with budget=1 (a prompt a pass) until it is mended, and name the family "
    "in an issue.",
)
def batch(patient: Patient) -> float:
    """A prompt's activations are its own.

    Guards against rows read at the wrong token of a padded batch, and against the idiom ``output[0]``, which reads batch row 0 now that blocks
    return a tensor (transformers 5).
    """
    return worst(patient.record(prompts=patient.prompts).values, patient.one_by_one)


@law(
    "left padding = right padding",
    unit=VECTOR,
    tolerance=ROUNDING,
    remedy="transformers computes something else for this family when prompts are padded on the left (mask and position ids were given): generate "
    "one prompt at a time; recording pads on the right and is not touched by it.",
)
def padding(patient: Patient) -> float:
    """transformers' own decoder, with mask and position ids, on both paddings.

    Generation pads on the left. GPT-2 is off by 0.07 to 0.4 there when position ids are left out, with no error
    (TransformerLens#1609, nnsight#672).
    """
    rows = [t.ids for t in patient.tokens]
    right, left = patient.batch(rows), patient.batch(rows, side="left")
    left["position_ids"] = (left["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    with patient.bare() as hf:
        decoder = decoder_of(hf)
        a = decoder(**left, use_cache=False).last_hidden_state[:, -1]
        b = decoder(**right, use_cache=False).last_hidden_state[range(len(rows)), [len(r) - 1 for r in rows]]
    return worst(a.float().cpu(), b.float().cpu())


@law(
    "template prefix computed once = each prompt whole",
    unit=VECTOR,
    tolerance=ROUNDING,
    remedy="Record with prefix=False: this family's cache does not carry everything that a later token reads.",
)
def prefix(patient: Patient) -> float:
    """Every token of a few prompts, with their common beginning computed once and without.

    State-space layers and unusual masks carry more than keys and values from token to token.
    """
    shared = patient.record(position="all", prefix=True)
    if not shared.meta["plan"]["prefix"]:
        raise DoesNotApply(f"the {patient.model.engine.name} engine shares no prefix of these prompts; each is computed whole")
    return worst(shared.values, patient.record(position="all").values)


@law(
    "record = transformers' hidden states, every layer",
    unit=VECTOR,
    tolerance=ROUNDING,
    remedy="The blocks that were found are not the ones transformers reports: name them by hand, load_model(…, parts={'blocks': 'model.layers', "
    "'final_norm': 'model.norm'}).",
)
def hidden(patient: Patient) -> float:
    """``embed`` and ``resid_post`` of all blocks but the last against ``output_hidden_states`` of a pass without padding or hooks of ours.

    Guards against layers counted off by one (persona_vectors#12, TransformerLens#909).
    """
    ours = np.concatenate([patient.alone("embed"), patient.alone("resid_post")[:, :-1]], axis=1)
    return worst(ours, patient.states[:, :-1])


@law(
    "final norm of the last resid_post = hidden_states[-1]",
    unit=VECTOR,
    tolerance=ROUNDING,
    remedy="The final norm that was found is another module: name it by hand, load_model(…, parts={'final_norm': 'model.norm'}).",
)
def norm(patient: Patient) -> float:
    """``hidden_states[-1]`` is after the final norm, ``resid_post`` of the last block before it: both ``final_norm`` as recorded and the norm
    of ``resid_post`` must be it. Taking one for the other shifts the last layer of a plot by a factor."""
    _, module = find_blocks(patient.model.hf, patient.model._parts)
    with patient.bare(), torch.no_grad():
        weight = next(module.parameters(), torch.empty(0, device=patient.model.device))
        last = torch.from_numpy(patient.alone("resid_post")[:, -1:]).to(weight.device, patient.model.hf.dtype)
        normed = module(last)[:, 0].float().cpu().numpy()
    expected = patient.states[:, -1]
    return max(worst(normed, expected), worst(patient.alone("final_norm")[:, 0], expected))


ADDED = "of the norm of what is added"
BY_HAND = (
    "Which modules add what was found wrongly: name them by hand, load_model(…, parts={'attn_out': 'self_attn', 'mlp_out': 'mlp', 'resid_mid': "
    "'post_attention_layernorm'}). resid_pre and resid_post can be trusted all the same."
)


@law("resid_pre + attn_out + mlp_out = resid_post", unit=ADDED, tolerance=ROUNDING, remedy=BY_HAND)
def adds_up(patient: Patient) -> float:
    """What attention and MLP add is all that a block adds, after post-norms (Gemma) and residual multipliers (Granite)."""
    _has(patient, "attn_out", "mlp_out")
    x, a, m, y = (_tensor(patient, site) for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    sums = ((x + a) + m, (a + m) + x, (x + m) + a)  # one of these orders is the model's own, and exact in any dtype
    return _off([s - y for s in sums], [a, m])


@law("resid_pre + attn_out = resid_mid", unit=ADDED, tolerance=ROUNDING, remedy=BY_HAND)
def mid(patient: Patient) -> float:
    """The stream between attention and MLP. Families that run them side by side (GPT-NeoX, Falcon) have none."""
    _has(patient, "attn_out", "resid_mid")
    x, a, y = (_tensor(patient, site) for site in ("resid_pre", "attn_out", "resid_mid"))
    return _off([x + a - y], [a])


def _has(patient: Patient, *sites: str) -> None:
    engine = patient.model.engine
    lacking = [site for site in sites if site not in engine.sites]
    if not lacking:
        return
    if engine.name == "hooks" and "attn_out" in lacking:
        patient.together("attn_out")  # raises, with what was found and how to name the parts
    if lacking == ["resid_mid"] and "attn_out" in engine.sites and engine.name == "hooks":
        raise DoesNotApply(
            f"{type(patient.model.hf).__name__} has no resid_mid: no module reads resid_pre + attn_out (attention and MLP side by side)"
        )
    raise DoesNotApply(f"the {engine.name} engine has no {' and no '.join(lacking)} on {type(patient.model.hf).__name__}")


def _tensor(patient: Patient, site: str) -> torch.Tensor:
    return torch.from_numpy(patient.together(site).values).to(patient.model.hf.dtype)


def _off(gaps: list[torch.Tensor], added: list[torch.Tensor]) -> float:
    size = sum(a.double().norm(dim=-1) for a in added)
    return min(float((gap.double().norm(dim=-1) / size).max()) for gap in gaps)


@law(
    "the same call twice, the same bits",
    unit=ACTIVATION,
    tolerance=BITWISE,
    remedy="Something random or stateful is left in the model: model.hf.eval() (dropout), torch.use_deterministic_algorithms(True) on a GPU. Else "
    "expect recordings to differ by this much from run to run.",
)
def twice(patient: Patient) -> float:
    """A recording is repeated. Dropout left on, or kernels that add in any order, would show here."""
    return differing(patient.record().values, patient.together("resid_post").values)


# ---- the other engines


def _agree(patient: Patient, name: str) -> float:
    ours, theirs = patient.engines["hooks"], patient.engines[name]
    found = [worst(_read(patient, theirs, site), _hooked(patient, site)) for site in SITES if site in ours.sites and site in theirs.sites]
    return max(*found, worst(_edited(patient, theirs), _edited(patient, ours)))


def _hooked(patient: Patient, site: str) -> Stacked:
    """The same by the default engine: where that is the model's own, it was read before."""
    own = patient.model.engine.name == "hooks"
    return patient.together(site).values if own else _read(patient, patient.engines["hooks"], site)


def _read(patient: Patient, engine: Engine, site: str, layers: Sequence[int] | None = None) -> Stacked:
    rows = [t.ids for t in patient.few_tokens]
    place = Place(site, (0,) if site in SINGLE_LAYER_SITES else tuple(layers or range(engine.n_layers)), "last")
    with switched(engine.hf, patient.adapter):
        kept = engine.read(place, mean_row([[len(r) - 1] for r in rows]), **patient.batch(rows))
    return np.stack([kept[layer].float().cpu().numpy() for layer in place.layers], axis=1)


def _edited(patient: Patient, engine: Engine) -> Stacked:
    """The last layer with a vector of the stream's own size added at the middle one."""
    size = float(np.linalg.norm(patient.alone("resid_post")[:, patient.middle], axis=-1).mean())
    vector = torch.from_numpy(patient.direction.layer(patient.middle)).to(patient.model.device)
    with engine.editing({("resid_post", patient.middle): adding(vector, size)}):
        return _read(patient, engine, "resid_post", [engine.n_layers - 1])


@law(
    "transformer-lens' bridge reads and edits the same",
    unit=VECTOR,
    tolerance=ROUNDING,
    remedy="Do not mix activations of engine='bridge' (or model.bridge) with those of the default engine on this family; trust the hooks, which are "
    "compared with transformers above.",
)
def bridge(patient: Patient) -> float:
    """The default engine against a TransformerBridge on a twin: every site both have, and the last layer under an edit of the middle one."""
    return _agree(patient, "bridge")


@law(
    "nnsight reads and edits the same",
    unit=VECTOR,
    tolerance=ROUNDING,
    remedy="Do not mix activations of engine='nnsight' with those of the default engine on this family; trust the hooks, which are compared with "
    "transformers above.",
)
def nnsight(patient: Patient) -> float:
    """The default engine against an nnsight trace of the same modules, as for the bridge."""
    return _agree(patient, "nnsight")
