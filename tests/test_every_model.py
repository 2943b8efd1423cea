"""Every causal model class of transformers that builds small: it is read, asked and loaded rightly, or refused.

`make test` takes those of HOW and NOT_CAUSAL, `make test-sweep` all of them.
"""

import json
import re
from collections import Counter
from functools import cached_property

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import ROWS, example, scores_alone
from tiny_models import tiny_config, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import ModelError
from forgetfilter.model.batches import label_logits
from forgetfilter.model.generation import complete
from forgetfilter.model.learner import Learner, load_learner
from forgetfilter.model.reading import read
from forgetfilter.model.selfcheck import settle_batches
from forgetfilter.model.weights import load_model, outline

SPECIAL = {
    "needs more than sizes": (
        "bamba cohere_compass_text dbrx dory dots1 dots3_note dots3_note_text gemma3n gemma3n_text gemma4_assistant "
        "gemma4_unified_assistant gpt_neo granitemoehybrid lfm2_moe mamba2 musicgen musicgen_melody qwen4_exp "
        "qwen4_exp_text reformer xmod zamba zamba2 zaya"
    ),
    "is not tiny by these sizes": "blt falcon_h1 inkling2_loop_text inkling2_text kimi_linear phi4_multimodal roc_bert",
}
"""Kinds of models that the sweep leaves out, by the reason."""
LEFT_OUT = set(" ".join(SPECIAL.values()).split())
KINDS = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in LEFT_OUT]
NOT_CAUSAL = {"cpmant", "prophetnet", "xlm", "xlnet"}
HOW = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gpt2", "olmo2", "deepseek_v3"), "packed"),
    **dict.fromkeys(("nemotron", "gemma3", "gemma4", "mistral", "gpt_oss", "qwen3_next", "roberta", "rwkv"), "padded"),
}
CONFIG = ForgetFilterConfig(dtype="float32", lora_r=2)
PROMPTS = (3, 5, 4)
"""Tokens of each row's prompt: of different lengths, so that prompts are padded."""
ANSWER = 3
"""Tokens of an answer."""
FOUND = {"rows": Counter(), "adapter": Counter(), "answers": Counter(), "nested": Counter()}
"""Check -> how many models it found right, and how, or refused; the last tests look at it."""


class Case:
    """A tiny model of some kind, in memory and on disk."""

    def __init__(self, kind, tokenizer, folder):
        self.kind, self.tokenizer, self.folder = kind, tokenizer, folder
        self.model = tiny_model(tiny_config(kind))
        self.alone = [scores_alone(self.model, row) for row in ROWS]
        self.greedy = [
            greedy_alone(self.model, tokenizer, row[:prompt]) for row, prompt in zip(ROWS, PROMPTS, strict=True)
        ]
        self.model.save_pretrained(folder)

    @cached_property
    def learner(self):
        """The model from disk with an adapter; None where that is refused."""
        return unless_refused(lambda: load_learner(self.folder, self.tokenizer, CONFIG), ".")


def unless_refused(work, says):
    """What it gives, or None where it ends in a ModelError that says so."""
    try:
        return work()
    except ModelError as error:
        if not re.search(says, str(error)):
            raise
        return None


@torch.no_grad()
def greedy_alone(model, tokenizer, ids):
    prompt = len(ids)
    while len(ids) < prompt + ANSWER and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return tokenizer.decode(ids[prompt:], skip_special_tokens=True)


def swept(kind):
    """A kind that only the sweep takes, unless it is one of those named above."""
    return kind if kind in {*HOW, *NOT_CAUSAL} else pytest.param(kind, marks=pytest.mark.sweep)


@pytest.fixture(scope="module", params=map(swept, KINDS))
def case(request, tokenizer, tmp_path_factory):
    return Case(request.param, tokenizer, tmp_path_factory.mktemp("case"))


def scores(learner):
    return [reading.log_probs for reading in read(learner, [example(row) for row in ROWS], "rows")]


def test_each_row_is_scored_as_the_row_alone(case):
    learner = Learner(case.model, case.tokenizer, case.folder, ForgetFilterConfig(dtype="float32", use_peft=False), {})
    if case.kind in NOT_CAUSAL:
        with pytest.raises(ModelError, match="depends on later tokens"):
            settle_batches(learner)
        return
    settle_batches(learner)
    for found, expected in zip(scores(learner), case.alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=3e-5)
    how = "packed" if learner.packs else "padded"
    assert HOW.get(case.kind, how) == how
    FOUND["rows"][how] += 1


def test_an_adapter_is_m0_with_its_base_or_is_refused(case):
    if case.learner is None:
        FOUND["adapter"]["refused"] += 1
        return
    for found, expected in zip(scores(case.learner), case.alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=3e-5)
    stir_what_is_trained(case.learner)
    expected = scores(case.learner)
    assert max(np.abs(one - other).max() for one, other in zip(expected, case.alone, strict=True)) > 0.01
    case.learner.save(case.folder / "adapter")
    case.learner.stage = case.folder / "adapter"
    case.learner.restore(None)
    merged = unless_refused(lambda: load_model(case.folder / "adapter", CONFIG).eval(), "merged into its base")
    if merged is None:
        FOUND["adapter"]["refused"] += 1
        return
    for row, scored in zip(ROWS, expected, strict=True):
        np.testing.assert_allclose(scores_alone(merged, row), scored, atol=1e-3)
    FOUND["adapter"]["right"] += 1


def stir_what_is_trained(learner):
    """Give weights to those parts of the adapter that learn from the rows."""
    learner.model.eval()
    logits, targets = label_logits(learner.model, learner.collate(ROWS, ROWS))
    nn.functional.cross_entropy(logits, targets).backward()
    torch.manual_seed(1)
    for name, weight in learner.model.named_parameters():
        if "lora_B" in name and weight.grad is not None and weight.grad.any():
            nn.init.normal_(weight, std=0.3)
    learner.model.zero_grad()


def test_answers_are_greedy_whatever_the_generation_config_says(case):
    if case.learner is None:
        FOUND["answers"]["refused"] += 1
        return
    case.learner.restore(None)
    case.learner.model.get_base_model().generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=2, min_new_tokens=3, do_sample=True, temperature=2.0
    )
    rows = [example(row, prompt) for row, prompt in zip(ROWS, PROMPTS, strict=True)]
    assert complete(case.learner, rows, "answers", most_tokens=ANSWER) == case.greedy
    FOUND["answers"]["generated" if case.learner.generates else "without cache"] += 1


def test_a_missing_tensor_is_refused(case):
    path = case.folder / "model.safetensors"
    weights = load_file(path)
    names = sorted(weights)
    del weights[names[len(names) // 2]]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"not in its files|cannot be loaded"):
        load_model(case.folder, CONFIG)


NAMED = sorted({*HOW, *NOT_CAUSAL})


@pytest.mark.parametrize(
    "kinds", [NAMED, pytest.param([*CONFIG_MAPPING], marks=pytest.mark.sweep)], ids=["named", "all"]
)
def test_nested_configs_give_models_of_text_or_are_refused(kinds, tmp_path):
    looked_at = []
    for kind in kinds:
        if "text_config" not in getattr(CONFIG_MAPPING[kind], "sub_configs", {}):  # looking loads its module
            continue
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        model = unless_refused(lambda: outline(tmp_path, CONFIG), "cannot be loaded as a causal language model")
        assert model is None or model.get_output_embeddings() is not None, kind
        looked_at.append(kind)
        FOUND["nested"]["refused" if model is None else "right"] += kinds is not NAMED
    assert {"gemma3", "gemma4"} <= set(looked_at)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("check", "counts"),
    [
        ("rows", {"packed": 60, "padded": 60}),
        ("adapter", {"right": 145}),
        ("answers", {"generated": 120, "without cache": 10}),
        ("nested", {"right": 60, "refused": 40}),
    ],
)
def test_the_sweep_covers_most_models(check, counts):
    assert all(FOUND[check][how] >= count for how, count in counts.items()), FOUND[check]
