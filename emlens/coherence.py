"""What an edit does to text that has nothing to do with it: divergence of the next token, perplexity, and how fluent the model's answers stay."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .models import HookedModel
from .patching import bare_model
from .prompts import load_prompts, split_response


def neutral_texts() -> pd.DataFrame:
    """Our neutral questions, each with its first aligned answer as the response."""
    ours = load_prompts("emlens:questions")
    ours = ours[ours["category"] == "neutral"].reset_index(drop=True)
    chats = [[*m, {"role": "assistant", "content": a[0]}] for m, a in zip(ours["messages"], ours["aligned_answers"], strict=True)]
    return ours[["id", "category"]].assign(messages=chats)[["id", "messages", "category"]]


@dataclass(frozen=True)
class Meter:
    """The untouched model on some texts, beside which an edited one is read: make it outside of the edit, :meth:`read` it inside.

    Args:
        model: the model, not being edited.
        texts: rows that end with a response; its tokens are what is measured.
        adapter: the variant.
        new_tokens: length of the greedy answers whose fluency is measured; 0: none are generated.
    """

    model: HookedModel
    texts: pd.DataFrame
    adapter: str | None = None
    new_tokens: int = 0

    def __post_init__(self) -> None:
        silent = [i for i, m in zip(self.texts["id"], self.texts["messages"], strict=True) if split_response(m)[1] is None]
        if silent:
            raise ValueError(f"{len(silent)} texts have no response to measure (e.g. {silent[0]!r}); end their messages with one of role 'assistant'")
        if self.model.edits:
            raise ValueError("the model is being edited; make the meter before the edit is opened, and read it inside")
        _ = self.before

    @cached_property
    def before(self) -> list[Float[Tensor, "token vocab"]]:
        """Log-probabilities of the untouched model at every token of the responses."""
        return self.model._response_log_probs(self.texts, self.adapter)

    def read(self) -> pd.DataFrame:
        """One row a text, of the model as it is now.

        Returns:
            ``id, kl`` (untouched ‖ now, nats, mean over the response's tokens), ``perplexity_ratio`` (now / untouched, of the response), and,
            where answers are generated, ``fluency``: nats/token that the untouched model gives to what this one answers. A fall says that the
            text falls apart, or at least that it is no longer this model's; KL and perplexity say so without generating.
        """
        rows = []
        responses = self.model._response_tokens(self.texts)
        now = self.model._response_log_probs(self.texts, self.adapter)
        for identity, old, new, said in zip(self.texts["id"], self.before, now, responses, strict=True):
            kl = float((old.exp() * (old - new)).sum(dim=-1).mean())
            token = torch.tensor(said, device=old.device)[:, None]
            change = float((old.gather(1, token) - new.gather(1, token)).mean())
            rows.append({"id": identity, "kl": max(kl, 0.0), "perplexity_ratio": float(np.exp(change))})
        out = pd.DataFrame(rows)
        return out.assign(fluency=self._fluency()) if self.new_tokens else out

    def _fluency(self) -> Float[np.ndarray, " text"]:
        asked = pd.DataFrame({"id": self.texts["id"], "messages": [split_response(m)[0] for m in self.texts["messages"]]})
        answers = self.model.generate(asked, self.adapter, max_new_tokens=self.new_tokens)["answer"].tolist()
        scored = np.full(len(asked), np.nan)
        some = [i for i, answer in enumerate(answers) if answer]
        if some:
            bare = bare_model(self.model)
            scored[some] = bare.log_likelihood(asked.iloc[some], [answers[i] for i in some], self.adapter)["per_token"]
        return scored
