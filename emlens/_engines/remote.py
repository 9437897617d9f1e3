"""nnsight's traces run on NDIF, for models that outgrow the machine: the model's structure is here, its weights are there.

One pass of a batch is one request. It carries the interventions as source code, the tensors of prompts and edits, and the model by name;
back come the selected rows and nothing else. What travels (:func:`there_edit`, :func:`there_read`, ``select`` and the edits) may name torch,
numpy and einops, and nothing that the server does not have.
"""

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import SITES, Place
from .base import Engine, Select
from .hooks import INSIDE
from .structure import find_blocks, stream_in, stream_key, stream_of
from .twin import path_of

FIELDS = ("input_ids", "attention_mask", "position_ids")
"""Inputs that travel."""


@dataclass(frozen=True, repr=False)
class Request:
    """What is sent to NDIF for one pass: ``envelope`` as form field ``data`` and ``blob`` as file ``blob``, in a POST to ``url``.

    Attributes:
        url: of NDIF: nnsight's ``CONFIG.API.HOST``, or the environment variable ``NDIF_HOST``.
        headers: of the POST; the key's place is marked, the key is not in it.
        envelope: JSON: the model's key, environment (adapter, attention implementation), compression.
        blob: the interventions, as nnsight serialises and compresses them.
    """

    url: str
    headers: Mapping[str, str]
    envelope: str
    blob: bytes

    def __repr__(self) -> str:
        return f"Request POST {self.url} · {self.envelope} · {len(self.blob):,} bytes"


class RemoteEngine(Engine):
    """Reads and edits a model that runs on NDIF.

    Args:
        name: hub id, as NDIF deploys it; for ``where="local"`` a local folder too.
        tokenizer: of the model.
        where: True for NDIF; the URL of another server; ``"local"`` to run each request here after it was serialised and read back with all
            but the server's own packages hidden (needs the weights: for small models).
        revision: of the hub repository.
        adapter: hub id of a PEFT adapter that the server puts on; one engine an adapter.
        trust_remote_code: passed to transformers.

    Attributes:
        nn: nnsight's ``TransformersModel``, on the meta device until a pass is run here.
        hf: what scoring and generation call; each call is a request of its own. No key-value cache crosses the network.
    """

    name = "nnsight"
    shares_prefix = False
    caches = False

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        *,
        where: bool | str = True,
        revision: str | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        import nnsight

        nnsight.register("emlens")  # our functions travel as source: the server does not have them
        code = {"trust_remote_code": True} if trust_remote_code else {}
        self.nn: Any = nnsight.TransformersModel(
            name, tokenizer=copy.deepcopy(tokenizer), task="text-generation", revision=revision, peft=adapter, dispatch=False, **code
        )
        self.where = where
        module = self.nn._module
        blocks, norm = find_blocks(module)
        self.n_layers = len(blocks)
        self._blocks = [self.nn.get(path_of(module, block)) for block in blocks]
        self._norm = self.nn.get(path_of(module, norm))
        self.hf = RemoteModel(self)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site in SITES if site not in INSIDE)

    def refresh(self) -> None:
        """Nothing here depends on adapters that are loaded on this machine."""

    def read(self, place: Place, select: Select, **inputs: Any) -> dict[int, Tensor]:
        return self._read(place, select, inputs, self.how())

    def request(self, place: Place, select: Select, **inputs: Any) -> Request:
        """What :meth:`read` would send. Nothing is sent; no key and no network are needed."""
        found: list[Request] = []
        self._read(place, select, inputs, {"backend": partial(_build, self.nn, found)})
        return found[0]

    def how(self) -> dict[str, Any]:
        """Where a trace runs; ValueError if it is to be sent and there is no key."""
        if self.where is True:
            check_key()
        return {"remote": self.where}

    def _read(self, place: Place, select: Select, inputs: dict[str, Any], how: dict[str, Any]) -> dict[int, Tensor]:
        import nnsight

        spots = [(place.site, layer, self._module(place.site, layer)) for layer in sorted(place.layers)]
        given = {k: v for k, v in inputs.items() if k in FIELDS}
        early = not self._open  # an edit further up waits for its place
        kept = {}
        with self.travelling(), torch.no_grad(), self.nn.trace(**given, **how) as tracer:
            kept = nnsight.save(there_read(spots, select))
            if early:
                tracer.stop()
        return kept

    @contextmanager
    def travelling(self, steps: bool = False) -> Iterator[None]:
        """The open edits are part of what is traced (in every step of a generation), for the length of the block."""
        try:
            for site, layer, edits in self._edits():
                module, act = self._module(site, layer), there_edit_steps if steps else there_edit
                with self.nn.edit(inplace=True):
                    act(site, module, edits)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*tracer.iter.*")  # an open loop over steps ends by outrunning the generation
                yield
        finally:
            self.nn.clear_edits()

    def _module(self, site: str, layer: int) -> Any:
        self._check(site, layer)
        return self._norm if site == "final_norm" else self._blocks[layer]

    def _check(self, site: str, layer: int) -> None:
        super()._check(site, layer)
        if site in INSIDE:
            raise ValueError(f"{site} of a remote model: its modules are found by a pass over the weights, which are not here. Sites: {self.sites}")

    def _hang(self) -> None:
        """Edits travel with each request."""


class RemoteModel(nn.Module):
    """What scoring and generation take for a transformers model; every call is a request."""

    device = torch.device("cpu")
    """Where inputs are made and outputs arrive."""

    def __init__(self, engine: RemoteEngine) -> None:
        super().__init__()
        self._engine = (engine,)  # in a tuple: no submodule
        there = engine.nn._module
        self.config, self.generation_config, self.dtype = there.config, there.generation_config, there.dtype

    def forward(self, logits_to_keep: int | Tensor = 0, past_key_values: Any = None, **inputs: Any) -> Any:
        """``.logits`` of the whole batch, or of the positions of ``logits_to_keep``: they are what the download costs."""
        if past_key_values is not None:
            raise ValueError("a key-value cache cannot be sent to a remote model; pass whole sequences")
        import nnsight

        engine, given = self._engine[0], {k: v for k, v in inputs.items() if k in FIELDS}
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None
        with engine.travelling(), torch.no_grad(), engine.nn.trace(**given, **engine.how()):
            logits = nnsight.save(engine.nn.output.logits[:, kept].detach().cpu())
        return SimpleNamespace(logits=logits, past_key_values=None)

    def generate(self, generation_config: Any = None, **inputs: Any) -> Tensor:
        """Prompt and answer, token ids; edits act in every step."""
        engine, given = self._engine[0], {k: v for k, v in inputs.items() if k in FIELDS}
        ids = torch.empty(0)
        with engine.travelling(steps=True), engine.nn.generate(**given, generation_config=generation_config, **engine.how()) as tracer:
            ids = tracer.result.cpu().save()
        return ids


def check_key() -> None:
    """ValueError without a key for NDIF."""
    from nnsight.schema.config import CONFIG

    if not CONFIG.API.APIKEY:
        raise ValueError(
            "a remote pass is sent to NDIF, which needs an API key, and there is none: set the environment variable NDIF_API_KEY before Python "
            "starts, or once and for all `import nnsight; nnsight.CONFIG.set_default_api_key('…')`. Keys: https://login.ndif.us. "
            "RemoteEngine.request(…) builds what would be sent without one."
        )


def _build(model: Any, found: list[Request], tracer: Any) -> None:
    """Takes the place of nnsight's remote backend: serialises the trace as it does, and keeps the request instead of sending it."""
    from nnsight import __version__
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.schema.request import RequestModel

    backend = RemoteBackend(key_of(model), env=model._remoteable_get_env())
    envelope = RequestModel(model_key=backend.model_key, compress=backend.compress, env=backend.env)
    headers = {"nnsight-version": __version__, "python-version": sys.version, "ndif-api-key": "your key"}
    found.append(Request(f"{backend.host}/request", headers, envelope.metadata(), backend._serialize(tracer)))


def key_of(model: Any) -> str:
    """The model's key as NDIF knows it, with the id as it was given (sending asks the hub for its canonical spelling)."""
    from nnsight.modeling import huggingface

    known = huggingface._ID_CACHE.get(model.repo_id)
    huggingface._ID_CACHE[model.repo_id] = known or model.repo_id
    try:
        return model.to_model_key()
    finally:
        if known is None:
            del huggingface._ID_CACHE[model.repo_id]


# ---- what travels: no types in signatures but Any, since annotations travel too


def there_edit(site: Any, module: Any, edits: Any) -> None:
    """Beside a forward pass: the edits at one place, in their order."""
    if site in ("embed", "resid_pre"):
        args, kwargs = module.inputs
        stream = stream_in(args, kwargs)
        for edit in edits:
            stream = edit(stream).to(stream.dtype)  # type: ignore[union-attr]
        module.inputs = ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, stream_key(kwargs): stream})
    else:
        out = module.output
        stream = stream_of(out)
        for edit in edits:
            stream = edit(stream).to(stream.dtype)
        module.output = (stream, *out[1:]) if isinstance(out, tuple) else stream


def there_edit_steps(site: Any, module: Any, edits: Any) -> None:
    """The same in every step of a generation."""
    from nnsight.intervention.iterator import Iterations  # what `tracer.iter` makes; a tracer itself cannot travel

    for _ in Iterations()[:]:
        there_edit(site, module, edits)


def there_read(spots: Any, select: Any) -> Any:
    """Beside a forward pass: the selected rows at each place, as the pass comes by."""
    kept = {}
    for site, layer, module in spots:
        stream = stream_in(*module.inputs) if site in ("embed", "resid_pre") else stream_of(module.output)
        kept[layer] = select(stream).detach().clone().cpu()
    return kept
