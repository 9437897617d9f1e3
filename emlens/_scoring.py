"""What a model says, and how likely it finds what is said: log_likelihood, margin, generate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from . import loading
from ._core import Core, as_table
from ._passes import autocast, padded, plan, progress, response_log_probs, score_responses, score_whole, shared_prompt_batches
from .adapters import On, label
from .positions import Tokens, tokenize
from .prompts import user_text


class Scoring(Core):
    """The verbs that end in text or in a likelihood."""

    def log_likelihood(self, prompts: Any, responses: Sequence[str] | None = None, adapter: On = None, precision: str | None = None) -> pd.DataFrame:
        """How likely the model finds each response after its prompt.

        Args:
            prompts: rows whose last message is the response, or rows without one and ``responses`` beside them.
            responses: one text per prompt.
            adapter: which adapter is on.
            precision: None for the dtype of the weights, or ``"bfloat16"`` (autocast: faster, noisier).

        Returns:
            DataFrame ``id, log_likelihood`` (nats, summed over the response's tokens), ``n_tokens, per_token``.
        """
        table = as_table(prompts)
        if responses is not None and len(responses) != len(table):
            raise ValueError(f"{len(table)} prompts but {len(responses)} responses; one response per prompt is needed")
        given: Sequence[str | None] = [None] * len(table) if responses is None else list(responses)
        tokens = []
        for identity, messages, response in zip(table["id"], table["messages"], given, strict=True):
            coded = tokenize(messages, self.tokenizer, response)
            self._meet(coded, str(identity))
            if len(coded.ids) == coded.n_prompt:
                raise ValueError(f"prompt {identity!r} has no response; end its messages with one of role 'assistant', or pass responses=")
            tokens.append(coded)
        total = self._score(tokens, adapter, precision)
        n = np.array([len(t.ids) - t.n_prompt for t in tokens])
        return pd.DataFrame({"id": table["id"].to_numpy(), "log_likelihood": total, "n_tokens": n, "per_token": total / n})

    def _score(self, tokens: Sequence[Tokens], adapter: On, precision: str | None) -> Float[np.ndarray, " prompt"]:
        total = np.zeros(len(tokens))
        window = getattr(self.hf.config.get_text_config(), "sliding_window", None)
        batches = shared_prompt_batches(tokens, window) if self.caching else plan([len(t.ids) for t in tokens])
        score = score_responses if self.caching else score_whole
        with self.using(adapter) as hf, torch.no_grad(), autocast(self.device, precision):
            for batch in progress(batches, f"score {label(adapter)}"):
                total[batch] = score(hf, [tokens[i] for i in batch], self.pad, self.device)
        return total

    def _response_tokens(self, prompts: pd.DataFrame) -> list[tuple[int, ...]]:
        """Ids of each row's response."""
        return [t.ids[t.n_prompt :] for t in self._tokens(prompts, response=True)]

    def _response_log_probs(self, prompts: pd.DataFrame, adapter: On) -> list[Float[Tensor, "token vocab"]]:
        """Log-probabilities of the whole vocabulary at every token of each row's response."""
        tokens = self._tokens(prompts, response=True)
        out: list[Tensor] = [torch.empty(0)] * len(tokens)
        with self.using(adapter) as hf, torch.no_grad():
            for batch in plan([len(t.ids) for t in tokens]):
                for i, found in zip(batch, response_log_probs(hf, [tokens[i] for i in batch], self.pad, self.device), strict=True):
                    out[i] = found
        return out

    def margin(self, prompts: Any, adapter: On = None, precision: str | None = None) -> pd.DataFrame:
        """Preference for aligned over misaligned contrast answers, without sampling or a judge.

        margin = mean over aligned answers of (log-likelihood / tokens) − the same over misaligned answers, in nats per token; positive
        when the model prefers the aligned ones.

        Args:
            prompts: rows with list columns ``aligned_answers`` and ``misaligned_answers`` (ours have two of each).
            adapter, precision: as in :meth:`log_likelihood`.

        Returns:
            DataFrame, one row per prompt: ``id, margin, aligned_ll, misaligned_ll`` (nats/token) and ``category`` where there is one.
        """
        table = as_table(prompts)
        sides = ("aligned_answers", "misaligned_answers")
        lacking = [c for c in sides if c not in table.columns]
        if lacking:
            raise ValueError(f"margin needs the columns {sides}; {lacking} are missing. em.load_prompts('emlens:questions') has them.")
        flat = [(i, side, text) for i in range(len(table)) for side in sides for text in table[side].iloc[i]]
        none = [(i, side) for i in range(len(table)) for side in sides if len(table[side].iloc[i]) == 0]
        if none:
            at, side = none[0]
            raise ValueError(f"prompt {str(table['id'].iloc[at])!r} has an empty list of {side}; at least one answer on each side is needed")
        one = self.log_likelihood(table.iloc[[i for i, _, _ in flat]], [text for _, _, text in flat], adapter, precision)
        long = pd.DataFrame({"row": [i for i, _, _ in flat], "side": [s for _, s, _ in flat], "per_token": one["per_token"]})
        mean = long.groupby(["row", "side"])["per_token"].mean().unstack().reindex(range(len(table)))
        out = pd.DataFrame({"id": table["id"].to_numpy(), "margin": (mean[sides[0]] - mean[sides[1]]).to_numpy()})
        out["aligned_ll"], out["misaligned_ll"] = mean[sides[0]].to_numpy(), mean[sides[1]].to_numpy()
        return out.assign(category=table["category"].to_numpy()) if "category" in table.columns else out

    def generate(
        self,
        prompts: Any,
        adapter: On = None,
        n: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        top_p: float = 1.0,
    ) -> pd.DataFrame:
        """Answer each prompt ``n`` times (temperature 0: greedy).

        Sampling is as the arguments say; a model's own ``generation_config`` (repetition penalty, say) counts only for its end tokens.

        Returns:
            DataFrame, one row per answer: ``id, question, sample, answer, n_tokens, finished, variant``.
        """
        table = as_table(prompts)
        if n > 1 and temperature == 0:
            raise ValueError(f"{n} greedy answers to one prompt are the same answer; give temperature=1.0, or n=1")
        tokens = self._tokens(table, response=False)
        for t, identity in zip(tokens, table["id"], strict=True):
            self._meet(t, str(identity), max_new_tokens)
        ends = {self.tokenizer.eos_token_id, *_as_list(getattr(self.hf.generation_config, "eos_token_id", None))} - {None}
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=sorted(ends), use_cache=self.caching, **sampling
        )
        flat = [(i, s) for i in range(len(table)) for s in range(n)]
        rows: list[dict[str, Any]] = [{} for _ in flat]
        with self.using(adapter) as hf, torch.no_grad(), torch.random.fork_rng(), loading.quiet(), _no_habits(hf):
            torch.manual_seed(seed)
            for batch in progress(plan([len(tokens[i].ids) + max_new_tokens for i, _ in flat]), f"generate {label(adapter)}"):
                ids, mask = padded([tokens[flat[j][0]].ids for j in batch], self.pad, self.device, side="left")
                out = hf.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
                for j, answer in zip(batch, out.tolist(), strict=True):
                    i, sample = flat[j]
                    stop = next((k for k, token in enumerate(answer) if token in ends), len(answer))
                    rows[j] = {
                        "id": table["id"].iloc[i],
                        "question": user_text(table["messages"].iloc[i]),
                        "sample": sample,
                        "answer": self.tokenizer.decode(answer[:stop], skip_special_tokens=True).strip(),
                        "n_tokens": stop,
                        "finished": stop < len(answer),
                        "variant": label(adapter),
                    }
        return pd.DataFrame(rows)


@contextmanager
def _no_habits(hf: PreTrainedModel) -> Iterator[None]:
    """transformers fills what a call leaves open from the model's ``generation_config``; put it aside for the length of the block."""
    own = hf.generation_config
    hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = own


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
