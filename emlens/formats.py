"""Other houses' activation files, converted to our places: persona ``.pt`` rows, and the per-question ``.pt`` files of the priors paper.

Both index layers as transformers' ``hidden_states`` does, one off from the blocks: ``hidden_states[0]`` is what enters block 0 (our ``embed``),
``hidden_states[l]`` for 0 < l < L what block l − 1 puts out (``resid_post`` at layer l − 1), and ``hidden_states[L]`` what leaves the final norm
(``final_norm``). The stream after the last block, before the norm, is not in such files. ``.pt`` files are read with ``weights_only=True``.
"""

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import store
from .activations import ROW_ID, Activations
from .prompts import chat_digest, user_text

PERSONA_POSITIONS = {"prompt_avg": "mean_all", "response_avg": "mean_response", "prompt_last": "last"}
"""Persona Vectors (Chen et al. 2025, arXiv 2507.21509): their positions, as in ``{trait}_{position}_diff.pt``, and ours."""

QUESTION_POSITIONS = {"last_prompt_token": "last", "mean_prompt": "mean_all", "mean_completion": "mean_response"}
"""The paper's positions and ours."""

QUESTION_SITES = {"attn_pre_resid": "attn_out", "attn_post_resid": "resid_mid", "mlp_pre_resid": "mlp_out", "mlp_post_resid": "resid_post"}
"""The paper's activation types and our sites. Theirs are the outputs of the modules ``self_attn`` and ``mlp``: what is added to the stream only in
families without post-norms and residual multipliers (Llama and Qwen, not Gemma 2 and 3 or Granite)."""


LAYOUT = "{'question_id', 'messages', 'activations': {'pooled': {type: {'layer_08': {position: tensor}}}, 'prompt_len'}}"
"""Of one question's file."""


# ---- transformers' hidden states


def from_hidden_states(
    stack: Float[np.ndarray, "prompt state d_model"],
) -> dict[str, tuple[Float[np.ndarray, "prompt layer d_model"], tuple[int, ...]]]:
    """``{site: (values, block indices)}`` of the L + 1 hidden states of L blocks: ``embed``, ``resid_post`` 0 … L − 2, ``final_norm``."""
    n_layers = stack.shape[1] - 1
    if n_layers < 1:
        raise ValueError(f"{stack.shape[1]} hidden states: L + 1 are needed, the embeddings first and the normalised last stream last")
    out = {"embed": (stack[:, :1], (0,)), "resid_post": (stack[:, 1:-1], tuple(range(n_layers - 1))), "final_norm": (stack[:, -1:], (0,))}
    return {site: found for site, found in out.items() if found[1]}


def to_hidden_states(acts: Mapping[str, Activations], n_layers: int) -> Float[np.ndarray, "prompt state d_model"]:
    """The L + 1 hidden states from ``embed``, ``resid_post`` (blocks 0 … L − 2 at least) and ``final_norm`` of the same prompts and position.

    Raises:
        ValueError: a site or layer is missing, or prompts, positions or widths differ.
    """
    needed = {site: layers for site, (_, layers) in from_hidden_states(np.zeros((0, n_layers + 1, 1))).items()}
    for site, layers in needed.items():
        missing = [i for i in layers if site not in acts or i not in acts[site].layers]
        if missing:
            raise ValueError(
                f"{site} is missing{f' at layers {missing}' if site == 'resid_post' else ''}: the hidden states of {n_layers} blocks are "
                f"{', '.join(needed)}, the last one after the final norm. Record them with model.record(prompts, site={site!r})"
            )
    _refuse_mixed([acts[site] for site in needed], same_position=True)
    ids = acts["embed"].ids
    return np.concatenate([acts[site].select(layers=layers, ids=ids).values for site, layers in needed.items()], axis=1)


# ---- persona rows


def read_persona(path: str | os.PathLike, position: str | None = None, ids: Sequence[str] | None = None) -> dict[str, Activations]:
    """Read a persona ``.pt``: float ``[L+1, d_model]`` (one vector, as published) or ``[prompt, L+1, d_model]`` (a row per prompt).

    Args:
        path: ``{trait}_{prompt_avg|response_avg|prompt_last}_diff.pt``, or any name with ``position``.
        position: ours; default: what the file's name says.
        ids: of the prompts; default: the trait (the file's name) for one vector, numbers for rows.

    Returns:
        ``{"embed": …, "resid_post": …, "final_norm": …}``; their "layer 20" is ``resid_post`` at layer 19.

    Raises:
        ValueError: not such a tensor, or no position.
    """
    path = Path(path)
    tensor = _load(path)
    stack = _array(tensor, path)
    if stack.ndim not in (2, 3):
        raise ValueError(f"{path} holds shape {stack.shape}; needed is [L+1, d_model] or [prompt, L+1, d_model]")
    named = [ours for theirs, ours in PERSONA_POSITIONS.items() if theirs in path.stem]
    if position is None and not named:
        raise ValueError(
            f"{path.name} does not say its position ({', '.join(PERSONA_POSITIONS)}); give position='last', 'mean_all' or 'mean_response'"
        )
    one = stack.ndim == 2
    names = list(ids) if ids is not None else [path.stem] if one else [ROW_ID.format(i) for i in range(len(stack))]
    parts = from_hidden_states(stack[None] if one else stack)
    meta = {"source": path.name, "n_layers": stack.shape[-2] - 1}
    return {site: Activations.from_array(values, {"id": names}, layers, site, position or named[0], meta) for site, (values, layers) in parts.items()}


def write_persona(path: str | os.PathLike, acts: Mapping[str, Activations], n_layers: int) -> Path:
    """Write what :func:`read_persona` reads: ``[L+1, d_model]`` of one prompt, ``[prompt, L+1, d_model]`` of several, float32.

    Args:
        path: ends in ``.pt``; ``{trait}_prompt_avg_diff.pt`` for position ``mean_all``, and so on, says the position to others.
        acts: ``embed``, ``resid_post`` and ``final_norm`` of the same prompts. The last block's ``resid_post`` has no place in the file.
        n_layers: number of blocks of the model.

    Raises:
        ValueError: a site or layer is missing, prompts differ, or the name says another position.
    """
    path = Path(path)
    stack = to_hidden_states(acts, n_layers)
    position = acts["embed"].position
    said = [ours for theirs, ours in PERSONA_POSITIONS.items() if theirs in path.stem]
    if said and said[0] != position:
        raise ValueError(f"the name {path.name} says position {said[0]!r}, the activations are of {position!r}; choose another name")
    _save(stack[0] if len(stack) == 1 else stack, path)
    return path


# ---- one file per question


def read_questions(folder: str | os.PathLike, n_layers: int, position: str = "last") -> dict[str, Activations]:
    """Read the paper's folder of one ``.pt`` per question (``prompt_only/``, ``prompt_generated_completion/`` or ``prompt_plus_target/``).

    Their ``layer_i`` counts blocks from 1; ``mlp_post_resid`` at i = L is after the final norm and comes back as ``final_norm``.

    Args:
        folder: of the ``.pt`` files.
        n_layers: number of blocks of the model, L.
        position: ``last``, ``mean_all`` or ``mean_response`` (theirs: last_prompt_token, mean_prompt, mean_completion).

    Returns:
        ``{site: Activations}`` in the order of the files' names, float32; facts ``id``, ``text``, ``prompt_sha``, ``n_tokens``, ``sample_id`` and,
        where there is one, ``response``.

    Raises:
        ValueError: no file, another layout, a question without this position, or a layer that ``n_layers`` blocks do not have.
    """
    theirs = {ours: name for name, ours in QUESTION_POSITIONS.items()}
    if position not in theirs:
        raise ValueError(f"such files hold positions {', '.join(theirs)}; asked for was {position!r}")
    files = sorted(Path(folder).glob("*.pt"))
    if not files:
        raise ValueError(f"there is no .pt file in {folder}; give the folder with one file per question")
    facts: list[dict[str, Any]] = []
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    dtypes: set[str] = set()
    for file in files:
        one = _load(file)
        if not isinstance(one, dict):
            raise ValueError(f"{file} has another layout: it holds a {type(one).__name__}; needed is {LAYOUT}")
        try:
            pooled, messages = one["activations"]["pooled"], [dict(m) for m in one["messages"]]
            facts.append({"id": str(one["question_id"]), "text": user_text(messages), "prompt_sha": chat_digest(messages)})
            facts[-1].update({"n_tokens": one["activations"].get("prompt_len"), "sample_id": one.get("sample_id")})
            rows = {(kind, layer): at[theirs[position]] for kind, layers in pooled.items() for layer, at in layers.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} has another layout ({type(error).__name__}: {error}); needed is {LAYOUT}") from error
        facts[-1].update(next(({"response": one[k]} for k in ("completion", "target") if k in one), {}))
        if found and {_place(kind, layer, n_layers, file) for kind, layer in rows} != set(found):
            raise ValueError(f"{file} holds other types or layers than {files[0].name}; read one run's folder at a time")
        for (kind, layer), row in rows.items():
            if row is None:
                raise ValueError(f"{file} holds nothing at {theirs[position]!r}: it was made without a completion. Read another position.")
            dtypes.add(str(row.dtype).removeprefix("torch."))
            found.setdefault(_place(kind, layer, n_layers, file), []).append(_array(row, file))
    meta = {"source": "one .pt per question", "n_layers": n_layers, "dtype": ", ".join(sorted(dtypes))}
    out = {}
    for site in dict.fromkeys(site for site, _ in found):
        layers = sorted(layer for s, layer in found if s == site)
        values = np.stack([np.stack(found[site, layer]) for layer in layers], axis=1)
        out[site] = Activations.from_array(values, pd.DataFrame(facts), layers, site, position, meta)
    return out


def write_questions(folder: str | os.PathLike, acts: Iterable[Activations], n_layers: int) -> list[Path]:
    """Write what :func:`read_questions` and the paper's own scripts read: ``<id>.pt`` per prompt, float32.

    Args:
        folder: of the files; others in it are left.
        acts: the same prompts at any of the sites ``attn_out``, ``resid_mid``, ``mlp_out``, ``resid_post``, ``final_norm`` and the positions
            ``last``, ``mean_all``, ``mean_response``. The last block's ``resid_post`` has no place in the files and needs ``final_norm`` beside it.
            The first one's facts give ``messages`` (else a user's turn of ``text``), ``response``, ``n_tokens`` and ``sample_id``.
        n_layers: number of blocks of the model.

    Raises:
        ValueError: nothing to write, a place the files do not have, prompts that differ, or an id that cannot name a file.
    """
    given = list(acts)
    _refuse_mixed(given, same_position=False)
    sites = {ours: name for name, ours in QUESTION_SITES.items()} | {"final_norm": "mlp_post_resid"}
    positions = {ours: name for name, ours in QUESTION_POSITIONS.items()}
    for a in given:
        if a.site not in sites or a.position not in positions:
            raise ValueError(f"the files have no place for {a.place}; their sites are {', '.join(sites)}, their positions {', '.join(positions)}")
        if a.site == "resid_post" and n_layers - 1 in a.layers and ("final_norm", a.position) not in {(b.site, b.position) for b in given}:
            raise ValueError(
                f"their mlp_post_resid at layer {n_layers} is after the final norm, resid_post at layer {n_layers - 1} before it: add "
                "record(site='final_norm'), or leave that layer out by select(layers=…)"
            )
        outside = [i for i in a.layers if not 0 <= i < n_layers]
        if outside:
            raise ValueError(f"layers {outside} are outside the {n_layers} blocks that n_layers tells of")
    first = given[0]
    odd = [i for i in first.ids.astype(str) if i in ("", ".", "..") or "/" in i or "\\" in i or "\0" in i]
    if odd:
        raise ValueError(f"prompt id {odd[0]!r} cannot name a file; rename it in the facts")
    aligned = [a.select(ids=first.ids) for a in given]
    return [_write_question(Path(folder), row, aligned, n_layers, sites, positions) for row in range(first.n_prompts)]


def _write_question(
    folder: Path, row: int, acts: Sequence[Activations], n_layers: int, sites: Mapping[str, str], positions: Mapping[str, str]
) -> Path:
    fact = acts[0].facts.iloc[row]
    kinds = dict.fromkeys(sites[a.site] for a in acts)
    pooled: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in kinds}
    for a in acts:
        for column, layer in enumerate(a.layers):
            if a.site == "resid_post" and layer == n_layers - 1:
                continue
            name = f"layer_{n_layers if a.site == 'final_norm' else layer + 1:02d}"
            at = pooled[sites[a.site]].setdefault(name, dict.fromkeys(positions.values()))
            at[positions[a.position]] = _tensor(a.values[row, column])
    response = fact.get("response")
    said = fact.get("messages")
    n = int(fact["n_tokens"]) if "n_tokens" in fact and pd.notna(fact["n_tokens"]) else None
    told: dict[str, Any] = {
        "messages": [{"role": "user", "content": str(fact.get("text", ""))}] if said is None else [dict(m) for m in said],
        "sample_id": str(fact.get("sample_id", fact["id"])),
        "question_id": str(fact["id"]),
        "activations": {"pooled": pooled, "prompt_len": n, "total_len": None if isinstance(response, str) else n},
    }
    if isinstance(response, str):
        told["completion"] = response
    path = folder / f"{fact['id']}.pt"
    _save(told, path)
    return path


def _place(kind: str, layer: str, n_layers: int, file: Path) -> tuple[str, int]:
    """Our site and block index of their ``layer_i`` of a type."""
    number = layer.removeprefix("layer_")
    if kind not in QUESTION_SITES or not number.isdecimal():
        raise ValueError(f"{file} holds {kind!r} at {layer!r}; known are {', '.join(QUESTION_SITES)} at layer_01, layer_02, …")
    if not 1 <= int(number) <= n_layers:
        raise ValueError(f"{file} holds {layer}; a model of {n_layers} blocks has layers 1 … {n_layers} there. Give the model's own n_layers.")
    if kind == "mlp_post_resid" and int(number) == n_layers:
        return "final_norm", 0
    return QUESTION_SITES[kind], int(number) - 1


# ---- files


def _refuse_mixed(acts: Sequence[Activations], same_position: bool) -> None:
    if not acts:
        raise ValueError("there is nothing to write: give at least one Activations")
    for a in acts[1:]:
        if set(a.ids) != set(acts[0].ids):
            raise ValueError(f"{a.site} is of other prompts than {acts[0].site}; select(ids=…) the common ones")
        if a.d_model != acts[0].d_model or (same_position and a.position != acts[0].position):
            raise ValueError(f"{a.place} of width {a.d_model} does not go with {acts[0].place} of width {acts[0].d_model}")


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors, numbers and text, or is no .pt file ({str(error)[:120]})") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no .pt file ({str(error)[:120]})") from error


def _array(value: Any, path: Path) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise ValueError(f"{path} holds {type(value).__name__} where a tensor of floats is needed")
    return value.detach().float().numpy()


def _tensor(values: np.ndarray) -> Any:
    import torch

    return torch.tensor(np.array(values, dtype=np.float32))


def _save(value: Any, path: Path) -> None:
    import torch

    if path.suffix != ".pt":
        raise ValueError(f"such files end in .pt; got {path.name!r}")
    with store.replacing(path) as temporary:
        torch.save(_tensor(value) if isinstance(value, np.ndarray) else value, temporary)
