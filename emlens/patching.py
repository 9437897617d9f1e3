"""Patching: the activations of one variant put in place into the run of another (causal tracing), and the map of what each place carries.

Vig et al. 2020; Meng et al. 2022; with variants of one model in the place of corrupted prompts: the tokens are the same, the weights differ.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ._core import Core, as_table
from ._engines import Edit, HooksEngine, decoder_of
from ._engines.twin import twin
from ._passes import TOKEN_BUDGET, bar, padded
from ._passing import Known, beside, tokens_of
from .activations import SINGLE_LAYER_SITES, Place
from .adapters import On, label, parts_of, switched
from .positions import Position, pieces, position_name, token_rows, token_set, tokenize
from .showing import visible

FED = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
"""What of a pass the source is given too."""

Metric = Callable[[Float[Tensor, "row vocab"]], Any]
"""A number a row from the logits of the next token after a prompt."""


class PatchedNothingWarning(UserWarning):
    """A patch was open while the model ran, and its position named no token of anything that ran."""


# ---- one patch


class Patch:
    """What is put in place during a pass: the source's stream at the chosen tokens of whatever the model runs.

    Args:
        bare: reads the same weights apart from the model, so that nothing that is open on the model is live in it.
        source: the variant.
        place: where; its position says which tokens, as a set.
        position: the position as it was given.
    """

    def __init__(self, bare: HooksEngine, source: On, place: Place, position: Position) -> None:
        self.bare, self.source, self.place, self.position = bare, source, place, position
        self.n_passes, self.n_tokens = 0, 0
        self.known = Known()
        self._streams: dict[int, Tensor] = {}
        self._chosen: Bool[Tensor, "prompt position"] | None = None

    def edits(self) -> dict[tuple[str, int], Edit]:
        """For the engine: at each layer the source's stream, as it was in this pass."""
        return {(self.place.site, layer): self._edit(layer) for layer in self.place.layers}

    def _edit(self, layer: int) -> Edit:
        def put(h: Tensor) -> Tensor:
            if layer not in self._streams:
                raise RuntimeError("a patch is open and the blocks ran without the decoder they belong to: there is no source to put in place")
            new = self._streams[layer].to(h)
            return new if self._chosen is None else torch.where(self._chosen.to(h.device)[..., None], new, h)

        return put

    def begin(self, given: Mapping[str, Any]) -> None:
        """Run the source on what the decoder is given."""
        past = given.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError(
                "a patch is open, and this pass goes on from a cache that the target filled; the source needs whole sequences. model.generate, "
                "log_likelihood and record see to it; transformers' own calls need use_cache=False"
            )
        fed = {name: given[name] for name in FED if given.get(name) is not None}
        self._chosen = None if self.position == "all" else self._tokens(fed)
        with switched(self.bare.hf, self.source):
            self._streams = self.bare.read(self.place, lambda h: h, **fed)
        self.n_passes += 1
        self.n_tokens += int(self._chosen.sum()) if self._chosen is not None else 1

    def end(self) -> None:
        """Forget the pass."""
        self._streams, self._chosen = {}, None

    def _tokens(self, fed: Mapping[str, Any]) -> Bool[Tensor, "prompt position"]:
        ids, seen = tokens_of(fed)
        chosen = torch.zeros_like(ids, dtype=torch.bool)
        for row, (every, there) in enumerate(zip(ids.tolist(), seen.tolist(), strict=True)):
            at = [k for k, on in enumerate(there) if on]
            real = [every[k] for k in at]
            chosen[row, [at[k] for k in token_set(self.known.prompt(real), self.position, real)]] = True
        return chosen


@contextmanager
def patched(model: Core, adapter: On, layers: int | Iterable[int] | str, site: str, position: Position) -> Iterator[Patch]:
    """:meth:`emlens.models.HookedModel.patch`."""
    model.adapters.check(adapter, model.n_layers)
    position = "mean_response" if isinstance(position, str) and position == "response" else position
    chosen = (0,) if site in SINGLE_LAYER_SITES and layers == "all" else tuple(model.layer_list(layers))
    place = Place(site, chosen, position_name(position))
    check_here(model)
    _ = model.engine.sites  # measures now what is measured once: no probing pass meets the patch
    name, part = parts_of(adapter)
    said = {
        "patch": name,
        "adapter_sha256": model.adapters[name] if name else None,
        **({"adapter_layers": list(part)} if part is not None else {}),
        "site": site,
        "layers": list(place.layers),
        "position": place.position,
    }
    patch = Patch(bare_engine(model), adapter, place, position)
    with ExitStack() as stack:
        stack.enter_context(model._editing(patch.edits(), said))
        stack.enter_context(beside(decoder_of(model.engine.hf), patch.begin, patch.end, type(patch.bare.decoder).forward))
        stack.enter_context(model._hearing(patch.known.meet, caching=False))
        yield patch
        if patch.n_passes and not patch.n_tokens:
            text = f"{patch.n_passes} passes ran under a patch at {place.position!r}, and none held such a token: nothing was patched"
            warnings.warn(text, PatchedNothingWarning, stacklevel=4)


def check_here(model: Core) -> None:
    """ValueError for a model whose passes run elsewhere."""
    if not isinstance(model.engine.hf, PreTrainedModel):
        raise ValueError(f"{model.name} runs elsewhere; patches, and edits at some positions, follow each pass here: load it without remote=")


def bare_engine(model: Any) -> HooksEngine:
    """The model's weights and adapters in modules of their own, with nothing open on them; made anew when the model's tensors are others."""
    kept = model._bare
    if kept is None or _tensors(kept.hf) != _tensors(model.hf):
        kept = model._bare = HooksEngine(twin(model.hf).eval(), model._parts)
    return kept


def bare_model(model: Any) -> Any:
    """The model with nothing open on it, while something is open on the model itself."""
    bare = copy.copy(model)
    bare.engine, bare.edits, bare.caching, bare.sharing, bare._listening = bare_engine(model), [], True, True, ()
    return bare


def _tensors(hf: nn.Module) -> list[int]:
    return [id(tensor) for tensor in (*hf.parameters(), *hf.buffers())]


# ---- the map


def patch_map(
    model: Any,
    prompts: Any,
    adapter: On,
    target: On = None,
    layers: int | Iterable[int] | str = "all",
    site: str = "resid_post",
    position: Position = "all",
    metric: str | Metric = "margin",
    budget: int = TOKEN_BUDGET // 2,
) -> pd.DataFrame:
    """:meth:`emlens.models.HookedModel.patch_map`; ``budget``: tokens in one pass."""
    check_here(model)
    if model._listening:
        raise ValueError("a patch is open on the model, and the map opens one for every cell; close it first")
    for variant in (adapter, target):
        model.adapters.check(variant, model.n_layers)
    table, place = as_table(prompts), model.place(site, model.layer_list(layers), "all")
    cells = [_Cells(model, row, place, position, metric, budget) for row in table.to_dict("records")]
    frames, values = [], {}
    with bar(f"patch {label(adapter)} into {label(target)}", "cell", total=sum(len(cell.at) for cell in cells) * len(place.layers)) as shown:
        for cell in cells:
            with model.using(adapter):
                streams, source = cell.streams(), cell.plain()
            with model.using(target):
                plain = cell.plain()
                effect = np.stack([cell.effects(layer, streams[layer], shown) for layer in place.layers]) - plain
            values[cell.identity] = {"source": source, "target": plain}
            frames.append(cell.frame(effect, source - plain))
    out = pd.concat(frames, ignore_index=True)
    out.attrs = {
        "what": f"effect on the {cells[0].metric_name} of putting {label(adapter)} in place of {label(target)} at one layer and token",
        "site": site, "source": label(adapter), "target": label(target), "metric": cells[0].metric_name, "values": values,
    }  # fmt: skip
    return out


class _Cells:
    """One prompt, its tokens × layers, and the number that is read off each patched pass."""

    def __init__(self, model: Core, row: Mapping[str, Any], place: Place, position: Position, metric: str | Metric, budget: int) -> None:
        self.model, self.place, self.metric, self.identity = model, place, metric, str(row["id"])
        self.metric_name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
        texts, self.weights = _contrast(row, metric) if isinstance(metric, str) else ([""], [1.0])
        coded = [tokenize(row["messages"], model.tokenizer, text) for text in texts]
        for tokens in coded:
            model._meet(tokens, self.identity)
        self.prompt, self.n_prompt = coded[0], coded[0].n_prompt
        self.at = token_rows(self.prompt, position, self.identity)
        self.answers = [tokens.ids[self.n_prompt :] for tokens in coded]
        self.width = max(1, budget // max(self.n_prompt, sum(len(answer) for answer in self.answers)))

    def streams(self) -> dict[int, Float[Tensor, "position d_model"]]:
        """The prompt's stream at every layer of the place, of the variant that is on."""
        ids = torch.tensor([self.prompt.ids[: self.n_prompt]], device=self.model.device)
        return self.model.engine.read(self.place, lambda h: h[0], input_ids=ids, attention_mask=torch.ones_like(ids))

    def plain(self) -> float:
        """The number of the variant that is on."""
        return float(self._numbers(1, {})[0])

    def effects(self, layer: int, stream: Float[Tensor, "position d_model"], shown: Any) -> Float[np.ndarray, " position"]:
        """The number with one token patched, for each of the tokens."""
        found = []
        for start in range(0, len(self.at), self.width):
            at = torch.tensor(self.at[start : start + self.width])
            found.append(self._numbers(len(at), {(self.place.site, layer): _one_token_each(at, stream)}))
            shown.update(len(at))
        return np.concatenate(found)

    def _numbers(self, n: int, edits: Mapping[tuple[str, int], Edit]) -> Float[np.ndarray, " cell"]:
        """The number for each of ``n`` copies of the prompt, which pass under the edits; the answers follow in a second pass."""
        hf, device = self.model.engine.hf, self.model.device
        ids = torch.tensor([self.prompt.ids[: self.n_prompt]] * n, device=device)
        scored = isinstance(self.metric, str)
        how = {"use_cache": True, "past_key_values": DynamicCache(config=hf.config)} if scored else {"use_cache": False}
        with torch.no_grad():
            with self.model.engine.editing(edits):
                first = hf(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **how)
            if not scored:
                return np.asarray(torch.as_tensor(self.metric(first.logits[:, -1].float())).double().cpu()).reshape(n)  # type: ignore[operator]
            return self._likelihoods(first.logits, first.past_key_values).reshape(n, -1) @ np.array(self.weights)

    def _likelihoods(self, logits: Tensor, cache: Any) -> Float[np.ndarray, " row"]:
        """Nats per token of every answer, copy after copy, from the logits and the cache of the prompts."""
        answers, mask = padded(self.answers * len(logits), self.model.pad, self.model.device)
        logits = logits.repeat_interleave(len(self.answers), dim=0)
        cache.batch_repeat_interleave(len(self.answers))
        if answers.shape[1] > 1:
            whole = torch.cat([mask.new_ones(len(mask), self.n_prompt), mask[:, :-1]], dim=1)
            positions = torch.arange(self.n_prompt, whole.shape[1], device=mask.device).expand(len(mask), -1)
            rest = self.model.engine.hf(
                input_ids=answers[:, :-1], attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits = torch.cat([logits, rest.logits], dim=1)
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), answers.flatten(), reduction="none").view_as(mask)
        return (-(losses.double() * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()

    def frame(self, effect: Float[np.ndarray, "layer position"], total: float) -> pd.DataFrame:
        words = [visible(text) for text in pieces(self.prompt, self.model.tokenizer)]
        layer, token = (grid.ravel() for grid in np.meshgrid(self.place.layers, self.at, indexing="ij"))
        return pd.DataFrame(
            {
                "id": self.identity,
                "layer": layer,
                "token_index": token,
                "token": [words[k] for k in token],
                "label": [f"{k} {words[k]}" for k in token],
                "effect": effect.ravel(),
                "recovered": effect.ravel() / total if total else np.nan,
            }
        )


def _contrast(row: Mapping[str, Any], metric: str) -> tuple[list[str], list[float]]:
    """The contrast answers of a prompt, and their weights in its margin."""
    if metric != "margin":
        raise ValueError(f"metric {metric!r}: 'margin', or a function of the next token's logits [row, vocab] that gives a number a row")
    sides = [list(row.get(column, [])) for column in ("aligned_answers", "misaligned_answers")]
    if not all(sides):
        raise ValueError(
            f"prompt {row['id']!r} lacks contrast answers (columns aligned_answers, misaligned_answers), which metric='margin' needs; "
            "give such prompts, or a function of the next token's logits as metric="
        )
    return [*sides[0], *sides[1]], [sign / len(side) for sign, side in zip((1.0, -1.0), sides, strict=True) for _ in side]


def _one_token_each(at: Tensor, stream: Float[Tensor, "position d_model"]) -> Edit:
    """In every row one token of its own from the source."""

    def put(h: Tensor) -> Tensor:
        out, rows = h.clone(), torch.arange(len(at), device=h.device)
        out[rows, at.to(h.device)] = stream.to(h)[at.to(h.device)]
        return out

    return put
