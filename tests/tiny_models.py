"""Tiny random models of every causal class of transformers, made from one generic set of sizes."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

PLACES = 64
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 300),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size", "attention_chunk_size", "state_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), PLACES),
    **{"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"shared_expert_intermediate_size": 16, "hidden_size_per_layer_input": 4, "rotary_dim": 4},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "is_decoder": True},
}
LOUD = 6
"""Factor on random weights: what a row sees of another one then shows."""


def tiny_config(kind, **changed):
    """The config of a tiny model of some kind, and of the models in it; a layer of each kind that it has."""
    known = CONFIG_MAPPING[kind]() if isinstance(kind, str) else kind()
    values = known.to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in values or name in known.attribute_map}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if values.get("layer_types"):
        layers = sorted({*values["layer_types"]}, reverse=True)
        sizes |= {"layer_types": layers * (2 // len(layers) or 1), "num_hidden_layers": max(2, len(layers))}
    parts = {name: getattr(known, name, None) for name in known.sub_configs}
    nested = {name: tiny_config(type(part)).to_dict() for name, part in parts.items() if part is not None}
    return type(known)(**{**sizes, **nested, **changed})


def tiny_model(config):
    """A random model with weights large enough for a sharp opinion."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config).float().eval()
    except ValueError:  # of images and text alone
        model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(LOUD)
    return model
