"""PEFT adapters on one set of weights: put on, switched, kept, merged, taken off. What does not fit is refused before anything is changed."""

import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import CHAT_TEMPLATE_FILE, cached_file

from . import store
from .loading import UNREADABLE, LoadError, near_path
from .names import meant

On = str | tuple[str, Collection[int]] | None
"""Which adapter is on: a name; ``(name, layers)``, its part in these blocks alone; None for the loaded weights."""


class UntrainedAdapterWarning(UserWarning):
    """Every LoRA B of an adapter is zero: it changes nothing."""


def parts_of(adapter: On) -> tuple[str | None, tuple[int, ...] | None]:
    """``(name, layers)``; layers None: all of it."""
    if adapter is None or isinstance(adapter, str):
        return adapter, None
    name, layers = adapter
    return name, tuple(sorted({int(i) for i in layers}))


def label(adapter: On) -> str:
    """``before``, ``bad``, ``bad in layers 3,4``: how a variant is called in tables and progress."""
    name, layers = parts_of(adapter)
    return "before" if name is None else name if layers is None else f"{name} in layers {','.join(map(str, layers))}"


class Adapters(Mapping[str, str]):
    """The adapters on one model: ``{name: SHA-256}``.

    Attributes:
        templates: ``{name: chat template}`` of those whose folder holds one. The model's own stays the one in use; whether it renders chats
            as they do is for :func:`emlens.doctor` to say.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        self.hf = hf
        self.templates: dict[str, str] = {}
        self._peft: PeftModel | None = None
        self._digests: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        return self._digests[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"Adapters {', '.join(self._digests) or 'none'}"

    def check(self, adapter: On, n_layers: int) -> None:
        """KeyError for a name that is not loaded, ValueError for blocks that are not there."""
        name, layers = parts_of(adapter)
        if name is not None and name not in self:
            said = f"no adapter {name!r} is loaded; loaded are {sorted(self) or 'none'}."
            raise KeyError(f"{said}{meant(name, self)} model.add_adapter(name, folder) adds one.")
        outside = [i for i in layers or () if not 0 <= i < n_layers]
        if outside or layers == ():
            raise ValueError(f"adapter {name!r} limited to layers {outside or 'none'}: blocks are 0 … {n_layers - 1}")

    # ---- putting on and taking off

    def add(self, name: str, source: str | os.PathLike) -> None:
        """Put the adapter at ``source`` (folder, hub id, or ``hub-id/subfolder``) on the weights; its keys must match one to one.

        Raises:
            LoadError: nothing to open there, another kind of adapter, another architecture, keys that do not match; the model is as it was.
        """
        config, state, digest, template = _opened(name, str(source))
        with self._all_or_nothing(name):
            try:
                self._grow(name, config)
            except ValueError as error:
                raise LoadError(f"adapter {name!r} is for another architecture: {error} (model: {type(self.hf).__name__})") from error
            self._fill(name, state)
        self._digests[name] = digest
        if template is not None:
            self.templates[name] = template
        ups = [v for k, v in state.items() if "lora_B" in k or "lora_embedding_A" in k]  # of embeddings A begins at zero
        if ups and not any(bool(v.any()) for v in ups):
            warnings.warn(f"every LoRA B of adapter {name!r} is zero: it changes nothing. Was it trained?", UntrainedAdapterWarning, stacklevel=3)

    def new(self, name: str, config: PeftConfig) -> None:
        """Put an untrained adapter on, alone trainable (:meth:`train_only`)."""
        with self._all_or_nothing(name):
            self._grow(name, config)
        self._digests[name] = "untrained"
        self.train_only(name)

    def drop(self, name: str) -> None:
        """Take an adapter off; modules without any adapter left are the model's own again."""
        assert self._peft is not None
        del self._digests[name]
        self.templates.pop(name, None)
        others = [n for n in self._peft.peft_config if n != name]
        if others:
            self._peft.base_model.set_adapter(others[0])  # type: ignore[operator]
        self._peft.delete_adapter(name)
        if others:
            _unwrap_empty(self.hf)
        else:
            self._peft.unload()
            self._peft = None
        self.hf.requires_grad_(False)

    def merge(self, name: str) -> None:
        """Add the adapter into the weights for good. It is no adapter any more: ``W + scale · B A`` is the loaded weight now."""
        assert self._peft is not None
        if len(self) > 1:
            raise ValueError(f"one adapter can be merged into the weights; loaded are {sorted(self)}. Load the model with that one alone.")
        self._peft.merge_and_unload(adapter_names=[name])
        self._peft = None
        self._digests.clear()
        self.templates.clear()
        self.hf.requires_grad_(False)

    def save(self, name: str, folder: Path, base: str) -> None:
        """Write a PEFT folder; the adapter's digest is that of the folder from then on."""
        assert self._peft is not None
        config: Any = copy.copy(self._peft.peft_config[name])
        config.inference_mode, config.base_model_name_or_path = True, base
        config.target_modules = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
        folder.mkdir()
        config.save_pretrained(str(folder))
        state = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self._digests[name] = digest(folder)

    def train_only(self, name: str) -> None:
        """The parameters of this adapter, and no others, get gradients; it is on."""
        assert self._peft is not None
        self._peft.requires_grad_(False)
        self._peft.base_model.set_adapter(name)  # type: ignore[operator]

    def _grow(self, name: str, config: PeftConfig) -> None:
        if self._peft is None:
            with warnings.catch_warnings():  # PEFT asks transformers for a property by its old name, at every adapter anew
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                self._peft = get_peft_model(self.hf, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        self.hf.requires_grad_(False)
        self.hf.eval()  # PEFT makes its modules, dropout among them, in training mode

    def _fill(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        expected = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        own = {f"base_model.model.{path}": p for path, p in self.hf.named_parameters(remove_duplicate=False)}
        copies = {k for k in set(own) & set(state) if torch.equal(own[k].cpu(), state[k].to(own[k].dtype))}
        state = {k: v for k, v in state.items() if k not in copies}  # the embeddings that PEFT saves beside a LoRA on them
        missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        shapes = [k for k in set(expected) & set(state) if expected[k].shape != state[k].shape]
        if missing or unexpected or shapes:
            what = "is for another architecture" if shapes or not set(expected) & set(state) else "has keys that do not match"
            example = (
                f"{shapes[0]} is {tuple(state[shapes[0]].shape)}, needed {tuple(expected[shapes[0]].shape)}" if shapes else (missing or unexpected)[0]
            )
            raise LoadError(
                f"adapter {name!r} {what}: {len(missing)} keys missing, {len(unexpected)} unexpected, {len(shapes)} of another shape "
                f"(e.g. {example}). Was it trained on {type(self.hf).__name__} with {self.hf.config.get_text_config().num_hidden_layers} layers?"
            )
        set_peft_model_state_dict(self._peft, state, adapter_name=name)

    @contextmanager
    def _all_or_nothing(self, name: str) -> Iterator[None]:
        """On any error, also one in the midst of PEFT's injection, the adapter's modules are gone again."""
        peft = self._peft
        before = [(module, dict(module._modules)) for module in self.hf.modules()]
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                for module in list(self.hf.modules()):
                    if isinstance(module, BaseTunerLayer):
                        module.delete_adapter(name)
                for module, children in before:
                    module._modules.clear()
                    module._modules.update(children)
                if peft is None:
                    vars(self.hf).pop("peft_config", None)
                else:
                    peft.peft_config.pop(name, None)
                self._peft = peft
                self.hf.requires_grad_(False)


@contextmanager
def switched(root: nn.Module, adapter: On) -> Iterator[None]:
    """The adapter alone is on below ``root`` (None: bitwise the loaded weights) for the length of the block; then all is as it was before it."""
    name, layers = parts_of(adapter)
    found = [(path, module) for path, module in root.named_modules() if isinstance(module, BaseTunerLayer)]
    before = [(module, module._disable_adapters, module._active_adapter) for _, module in found]
    try:
        for path, module in found:
            on = name is not None and (layers is None or _block(path) in layers)
            module._disable_adapters = not on
            if on:
                module._active_adapter = [str(name)]
        yield
    finally:
        for module, disabled, active in before:
            module._disable_adapters, module._active_adapter = disabled, active


def _block(path: str) -> int | None:
    """The block a module stands in: the first number in its path (``model.layers.3.mlp.up_proj``)."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(number[1]) if number else None


def _unwrap_empty(hf: nn.Module) -> None:
    """Put the model's own modules back where PEFT's wrappers hold no adapter any more."""
    for parent in list(hf.modules()):
        for child, module in list(parent._modules.items()):
            if isinstance(module, BaseTunerLayer) and not any(len(getattr(module, part, ())) for part in module.adapter_layer_names):
                parent._modules[child] = module.get_base_layer()


# ---- opening


def digest(folder: str | Path) -> str:
    """SHA-256 over an adapter's config and weights."""
    found = sorted(p for p in Path(folder).glob("adapter_*") if p.suffix in (".json", ".safetensors", ".bin"))
    return hashlib.sha256("".join(store.digest_file(p) for p in found).encode()).hexdigest()


def find_adapter(name: str, source: str | os.PathLike) -> tuple[str, Any]:
    """Folder on this machine and config of an adapter, its weights unread (one of the hub is fetched).

    Raises:
        ValueError: a name that PEFT cannot have.
        LoadError: nothing to open there; what is beside it is named.
    """
    if "." in name or not name:
        raise ValueError(f"adapter name {name!r}: PEFT allows no dots and no empty name")
    with _readable(name, str(source)):
        folder = _folder(*_place(str(source)))
        return folder, PeftConfig.from_pretrained(folder)


@contextmanager
def _readable(name: str, source: str) -> Iterator[None]:
    """What PEFT and transformers say of a source that cannot be read, in one line with the way out."""
    try:
        yield
    except UNREADABLE as error:
        raise LoadError(
            f"cannot open the adapter {name!r} at {source!r}: {str(error).strip().splitlines()[0][:300]} — a PEFT folder with adapter_config.json "
            f"and adapter_model.safetensors, or a hub id, is needed.{_beside(Path(_place(source)[0]))}{near_path(source)}"
        ) from error


def _opened(name: str, source: str) -> tuple[PeftConfig, dict[str, torch.Tensor], str, str | None]:
    """Config, tensors, digest and chat template of an adapter; refuses kinds that are more than an adapter on shared weights can carry."""
    folder, config = find_adapter(name, source)
    with _readable(name, source):
        state = load_peft_weights(folder, device="cpu")
        template = _template(*_place(source))
    if bool(getattr(config, "modules_to_save", None)):
        raise LoadError(f"adapter {name!r} replaces whole modules {config.modules_to_save}: that is more than an adapter on shared weights can carry")
    if getattr(config, "bias", "none") != "none":
        raise LoadError(f"adapter {name!r} trains the weights' own biases (bias={config.bias!r}): more than an adapter on shared weights can carry")
    if config.is_prompt_learning:
        raise LoadError(f"adapter {name!r} ({config.peft_type}) adds tokens to the prompt; an adapter in the layers (LoRA and its kin) is needed")
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT fills it in; what fits is decided by keys and shapes, not by a path
    return config, state, digest(folder), template


def _folder(path: str, sub: str | None) -> str:
    """Where an adapter is on this machine; one of the hub is in the hub's cache, fetched first where the hub may be asked.

    PEFT itself looks for ``sub/sub/…`` when it is offline.
    """
    local = Path(path, sub or "")
    if Path(path).exists():  # then it is not looked for on the hub
        if not (local / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{local} holds no {CONFIG_NAME}")
        if not any((local / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise FileNotFoundError(f"{local} holds no {SAFETENSORS_WEIGHTS_NAME}")
        return str(local)
    config = str(cached_file(path, CONFIG_NAME, subfolder=sub))
    if _found(path, sub, SAFETENSORS_WEIGHTS_NAME) is None:
        cached_file(path, WEIGHTS_NAME, subfolder=sub)
    return str(Path(config).parent)


def _template(path: str, sub: str | None) -> str | None:
    """The chat template that was saved beside an adapter, found where transformers would look for it: ``chat_template.jinja``, or else in
    ``tokenizer_config.json`` (of several there, the one named ``default``). None where there is none."""
    own, config = (_text(path, sub, file) for file in (CHAT_TEMPLATE_FILE, "tokenizer_config.json"))
    if own is not None or config is None:
        return own
    found = json.loads(config).get("chat_template")
    return {one["name"]: one["template"] for one in found}.get("default") if isinstance(found, list) else found


def _text(path: str, sub: str | None, file: str) -> str | None:
    """What a file in a folder or on the hub says; None where it is not there, or cannot be reached."""
    found = _found(path, sub, file)
    return None if found is None else Path(found).read_text(encoding="utf-8")


def _found(path: str, sub: str | None, file: str) -> str | None:
    return cached_file(path, file, subfolder=sub, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)


def _place(source: str) -> tuple[str, str | None]:
    """``(folder or hub id, subfolder)``; the folder of an :func:`emlens.finetune` run stands for its last adapter."""
    if Path(source).exists():
        run = Path(source) / "adapter"
        return str(run) if (run / "adapter_config.json").exists() and not (Path(source) / "adapter_config.json").exists() else source, None
    parts = source.split("/")
    return ("/".join(parts[:2]), "/".join(parts[2:])) if len(parts) > 2 and not source.startswith((".", "/")) else (source, None)


def _beside(folder: Path) -> str:
    inside = sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("adapter_config.json")) if folder.is_dir() else []
    more = f" and {len(inside) - 8} more" if len(inside) > 8 else ""
    return f" Inside it are {', '.join(inside[:8])}{more}: name one of them." if inside else ""
