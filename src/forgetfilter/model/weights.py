"""Weights: loaded whole or in 4 bits, adapters merged in; a model's outline without them; dtype and device."""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)
from transformers.quantizers import AutoQuantizationConfig

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.model.folders import ADAPTER, ADAPTER_CONFIG, adapter_chain, cached, model_hash, tokenizer_folder
from forgetfilter.model.selfcheck import EXACT, ROUNDED
from forgetfilter.model.tokenizer import load_tokenizer

TRIED = 16
"""Tokens on which a merged adapter is held against the adapter itself."""


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
        raise ConfigError("--load_in_4bit needs the package bitsandbytes: `pip install bitsandbytes`.")


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


def require_targets(model: Any, config: ForgetFilterConfig) -> None:
    """Raise ModelError, before any work, if a model has none of the modules or blocks that an adapter is to sit on.

    Args:
        model: Its outline.
        config: Names the modules.
    """
    wanted = config.lora_target_modules
    if not config.use_peft or wanted == "all-linear":
        return
    ends = tuple(f".{name}" for name in wanted.replace(",", " ").split())
    if not any(f".{name}".endswith(ends) for name, _ in model.named_modules()):
        raise ModelError(f"--lora_target_modules {wanted}: {config.model_name_or_path} has no such module.")
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    blocks = config.lora_layers_to_transform
    if blocks and count is not None and not any(0 <= block < count for block in blocks):
        raise ModelError(f"--lora_layers_to_transform: no block {blocks[0]}; there are 0 to {count - 1}.")


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


def pick_device() -> torch.device:
    """The first accelerator, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, *, frozen: bool) -> torch.dtype:
    """The weights' dtype: as named; for "auto" bfloat16 if the base is frozen and the device computes in it."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if not frozen:
        return torch.float32
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if on_gpu or torch.cpu._is_avx512_bf16_supported() else torch.float32
