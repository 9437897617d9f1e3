"""Laws of what a model says: scores and texts against bare forward passes, steering with and without a cache, and the tokenizer's part."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..models import HookedModel
from ..positions import tokenize
from .law import NATS, ROUNDING, law, worst
from .patient import ONE_EACH, DoesNotApply, Patient

N_NEW = 4
"""Tokens generated."""


@law(
    "log-likelihood = one plain pass a text",
    unit="nats/token",
    tolerance=NATS,
    remedy="Shared prompts or their cache change the scores of this family: score with model.caching = False (one whole pass a text, slower).",
)
def score(patient: Patient) -> float:
    """Two contrast answers to each of a few questions, scored as margins are (each prompt once, its cache shared by its answers), against
    log-softmax of transformers' logits on each text alone. Padding between prompt and answer, and windows that count it, would show here."""
    few, answers = patient.few.loc[patient.few.index.repeat(2)], _answers(patient)
    ours = patient.model.log_likelihood(few, answers, patient.adapter)["per_token"].to_numpy()
    plain = []
    with patient.bare() as hf:
        for messages, answer in zip(few["messages"], answers, strict=True):
            t = tokenize(messages, patient.model.tokenizer, answer)
            logp = hf(**patient.batch([t.ids]), use_cache=False).logits[0].double().log_softmax(-1).cpu()
            plain.append(float(logp[range(t.n_prompt - 1, len(t.ids) - 1), list(t.ids[t.n_prompt :])].mean()))
    return float(np.abs(ours - np.array(plain)).max())


def _answers(patient: Patient) -> list[str]:
    return [row[side][0] for row in patient.few.to_dict("records") for side in ("aligned_answers", "misaligned_answers")]


@law(
    "generated text = greedy choice of plain passes",
    unit="share of texts that differ",
    tolerance=0.0,
    remedy="Generation of this family needs something that padding or the cache takes from it: generate one prompt at a time "
    "(model.generate(prompts.iloc[[i]])), and with model.caching = False if that does not help.",
)
def greedy(patient: Patient) -> float:
    """A left-padded batch generated with the cache, against the likeliest token of one whole, unpadded pass after the other, up to the first
    token whose lead over the second is within rounding."""
    ends = {patient.model.tokenizer.eos_token_id, *_listed(getattr(patient.model.hf.generation_config, "eos_token_id", None))}
    texts = patient.model.generate(patient.few, patient.adapter, max_new_tokens=N_NEW)["answer"]
    wrong = 0
    with patient.bare() as hf:
        for t, text in zip(patient.few_tokens, texts, strict=True):
            chosen: list[int] = []
            while len(chosen) < N_NEW:
                logits = patient.next_logits(hf, [*t.ids, *chosen])
                first, second = logits.topk(2).values.tolist()
                if first - second <= ROUNDING.get(patient.model.dtype, ROUNDING["bfloat16"]) * abs(first) or int(logits.argmax()) in ends:
                    break
                chosen.append(int(logits.argmax()))
            clear = patient.model.tokenizer.decode(chosen, skip_special_tokens=True).strip().rstrip("\ufffd")
            wrong += not text.startswith(clear)
    return wrong / len(texts)


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---- steering


@law(
    "steering adds strength × norm × direction",
    unit="of the norm of what is added",
    tolerance={**ROUNDING, "bfloat16": 1e-1},
    remedy="The edit does not arrive at resid_post as it was given: do not steer or ablate this family with this engine; try engine='hooks'.",
)
def steer(patient: Patient) -> float:
    """``resid_post`` of the middle block with strength 0.5 less that without is half the model's median residual norm along the direction."""
    model, layer = patient.model, patient.middle
    expected = 0.5 * float(model.residual_norms()[layer]) * patient.direction.layer(layer)
    with model.steer(patient.direction, layers=layer, strength=0.5):
        after = patient.record(layers=[layer], budget=ONE_EACH).values
    return worst(after - patient.alone("resid_post")[:, [layer]], np.broadcast_to(expected, after.shape))


@law(
    "steered: with KV cache = without",
    unit="nats/token (float32: or share of texts)",
    tolerance=NATS,
    remedy="The edit depends on where in the pass a token stands (an edit of t[:, -1], say): edit every token, or set model.caching = False.",
)
def steered(patient: Patient) -> float:
    """Scores and greedy texts under steering, with the cache and in whole passes.

    An edit of ``t[:, -1]`` gives different text with and without the cache (TransformerLens#697).
    """
    model, few, answers = patient.model, patient.few, _answers(patient)[::2]
    with model.steer(patient.direction, layers=patient.middle, strength=1.0):
        cached = model.log_likelihood(few, answers, patient.adapter)["per_token"].to_numpy()
        texts = model.generate(few, patient.adapter, max_new_tokens=N_NEW)["answer"]
        with _whole_passes(model):
            whole = model.log_likelihood(few, answers, patient.adapter)["per_token"].to_numpy()
            again = model.generate(few, patient.adapter, max_new_tokens=N_NEW)["answer"]
    differ = float((texts != again).mean()) if model.dtype in ("float32", "float64") else 0.0
    return max(float(np.abs(cached - whole).max()), differ)


@contextmanager
def _whole_passes(model: HookedModel) -> Iterator[None]:
    before, model.caching = model.caching, False
    try:
        yield
    finally:
        model.caching = before


# ---- the tokenizer


@law(
    "exactly one BOS",
    unit="BOS tokens too many or too few at the start",
    tolerance=0.0,
    remedy='Give a chat_template that begins with one bos_token: chat_template="{{ bos_token }}" + … where there is none, and without it where '
    "the template writes two. Use the same one for every model you compare.",
    of="once",
)
def bos(patient: Patient) -> float:
    """The rendered chat begins with one BOS where the tokenizer itself puts one before a text, and with no two where it does not.

    Two (the template's and the tokenizer's: TransformerLens#1418), or none on Gemma, change every number and raise no error.
    """
    tokenizer = patient.model.tokenizer
    mark = tokenizer.bos_token_id
    if mark is None:
        raise DoesNotApply("the tokenizer has no BOS")
    wants = list(tokenizer("a")["input_ids"][:1]) == [mark]
    counts = [next((i for i, token in enumerate(t.ids) if token != mark), len(t.ids)) for t in patient.tokens]
    return float(max(abs(n - 1) if wants else max(n - 1, 0) for n in counts))


@law(
    "one chat template for all variants",
    unit="share of chats that the adapter's template renders otherwise",
    tolerance=0.0,
    remedy="The adapter was tuned with another chat template than the one in use, so that it is asked in a form it was not tuned on. Its own is "
    "model.adapters.templates[name]: load_model(…, chat_template=that), and use it before and after, or shifts mix tuning with template.",
    of="adapter",
)
def template(patient: Patient) -> float:
    """Where an adapter's folder holds a chat template, it renders the chats as the one in use does: asked (as they are recorded), and asked
    and answered (as they are tuned on). Templates that are written otherwise and render the same are the same."""
    theirs = patient.model.adapters.templates.get(patient.adapter_name)
    if theirs is None:
        raise DoesNotApply("the adapter brings no chat template; there is one tokenizer and one template for all variants")
    rows, tokenizer = patient.prompts.to_dict("records"), patient.model.tokenizer
    asked = [row["messages"] for row in rows]
    answered = [[*row["messages"], {"role": "assistant", "content": row["aligned_answers"][0]}] for row in rows]

    def rendered(template: str | None) -> list[str]:
        own = {"chat_template": template, "tokenize": False}
        return [*tokenizer.apply_chat_template(asked, add_generation_prompt=True, **own), *tokenizer.apply_chat_template(answered, **own)]

    return float(np.mean([a != b for a, b in zip(rendered(None), rendered(theirs), strict=True)]))


@law(
    "the tokenizer gives the chat back",
    unit="share of chats",
    tolerance=0.0,
    remedy="Text is lost or its offsets are wrong, so that named positions may point beside their words: use position='last', 'mean_all' or an "
    "index, and load a fast tokenizer that was made for this model.",
    of="once",
)
def round_trip(patient: Patient) -> float:
    """decode(encode(rendered chat)) is the chat, blanks aside (sentencepiece makes and drops some), and the tokens' offsets pass over every
    character that is not blank, in order."""
    lost = 0
    for t in patient.tokens:
        back = patient.model.tokenizer.decode(list(t.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        covered = np.zeros(len(t.text), dtype=bool)
        for start, end in t.offsets:
            covered[start:end] = True
        forward = all(a[0] <= b[0] for a, b in zip(t.offsets, t.offsets[1:], strict=False))
        whole = all(covered[i] or character.isspace() for i, character in enumerate(t.text))
        lost += not (forward and whole and "".join(back.split()) == "".join(t.text.split()))
    return lost / len(patient.tokens)
