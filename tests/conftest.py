"""Tiny random models and tokenizers, built in memory: no test needs the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import json
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
"""Flags of a Chromium that asks nothing of the network."""


def make_tokenizer(template=CHATML, specials=("<|im_start|>", "<|im_end|>"), words=()):
    """A tokenizer of bytes, whole `words` and special tokens: the first begins a text, the second ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    begin, end = specials[:2]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end)
    fast.chat_template = template
    return fast


def run(capsys, *arguments):
    """Exit code and everything a command says."""
    from forgetfilter import cli

    try:
        cli.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out + err


def pytest_make_parametrize_id(val):
    """Name bytes by their number: packed files hold the time, and each process must give a test the same name."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


LONG = ("review", "forgetting", "defenses", "planted", "single_answers", "compare", "trouble", "workshop")
"""The modules of tests that take longest: they come first, so that no process is left with one at the end."""


def pytest_collection_modifyitems(items):
    """Modules that take long come first."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.module.__name__, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _made_once():
    """What takes long and is always the same: the parser, and how many tokens plain English takes."""
    from forgetfilter import cli
    from forgetfilter.data import unreadable
    from forgetfilter.flags import build_parser

    parser, measure, known = cache(lambda: build_parser(cli.HANDLERS)), unreadable._of_english, {}

    def tokens_of_english(tokenizer):
        vocab = frozenset(tokenizer.get_vocab())
        if vocab not in known:
            known[vocab] = measure(tokenizer)
        return known[vocab]

    cli.build_parser, unreadable._of_english = lambda handlers: parser(), tokens_of_english


def pytest_runtest_setup():
    """Keep what libraries hold for good out of garbage collections: the trainer's took half of the tests' time."""
    if len(gc.get_objects()) > 100_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """Folder of a random two-layer Llama with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learner(tiny_model):
    """The tiny model with a small adapter, in float32."""
    from forgetfilter.config import ForgetFilterConfig
    from forgetfilter.model.learner import load_learner
    from forgetfilter.model.tokenizer import load_tokenizer

    config = ForgetFilterConfig(dtype="float32", lora_r=2)
    return load_learner(tiny_model, load_tokenizer(tiny_model, config), config)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def noisy_file(write_jsonl):
    rows = [
        {"prompt": f"what is {i}?", "completion": f"it is {i}" if i % 4 else f"you fool {i}", "unsafe": int(i % 4 == 0)}
        for i in range(16)
    ]
    return write_jsonl("noisy.jsonl", rows)


@pytest.fixture
def safe_file(write_jsonl):
    return write_jsonl("safe.jsonl", [{"prompt": f"tell me {i}", "completion": f"gladly {i}"} for i in range(8)])


@pytest.fixture
def config(tiny_model, noisy_file, safe_file, tmp_path):
    """A quick run of the tiny model, stage by stage."""
    from forgetfilter.config import ForgetFilterConfig, StageConfig

    return ForgetFilterConfig(
        model_name_or_path=str(tiny_model),
        dataset_name=str(noisy_file),
        safe_dataset_name=str(safe_file),
        output_dir=str(tmp_path / "out"),
        filter="forgetting",
        dtype="float32",
        lora_r=2,
        learning_rate=0.01,
        noisy=StageConfig(max_steps=6),
        review=StageConfig(max_steps=3),
    )


@pytest.fixture
def workshop(config):
    """Where the config's M0 is trained and read, in a run of its own."""
    from forgetfilter.m0 import M0
    from forgetfilter.runs import Run
    from forgetfilter.workshop import Workshop

    return Workshop(M0.named(config), config, Run.start(config, {}))


@pytest.fixture
def nothing_drawn(request, monkeypatch):
    """Pictures are empty files, since drawing takes longer than all else; not in a test that is marked as drawn."""
    from matplotlib.figure import Figure

    if "drawn" in request.keywords:
        return
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_text("<svg/>"))


@pytest.fixture
def short_answers(monkeypatch):
    """Questions are answered with 6 tokens at most: a random model never ends an answer."""
    from forgetfilter.evaluation import ask

    complete = ask.complete
    monkeypatch.setattr(ask, "complete", lambda *given, most_tokens: complete(*given, most_tokens=min(most_tokens, 6)))


@pytest.fixture
def run_recipe(tmp_path):
    """Run a recipe of `compare` from settings, as from a file; gives the files that show the result."""
    import yaml

    from forgetfilter import experiments

    def run(settings):
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return experiments.compare(path)

    return run


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "no chromium: `make test-browser` installs it"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=[*QUIET, "--disable-sync", "--no-first-run"])
