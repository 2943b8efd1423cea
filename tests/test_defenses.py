"""Each defense against a case worked by hand: what it trains on, in which order, from where, with which term."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from forgetfilter import defenses
from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.defenses import DEFENSES, inputs, lisa, self_correction
from forgetfilter.defenses.inputs import Inputs, draw
from forgetfilter.errors import DataError
from forgetfilter.runs import Run


@pytest.fixture
def config(tiny_model, tmp_path):
    return ForgetFilterConfig(
        model_name_or_path=str(tiny_model),
        output_dir=str(tmp_path / "out"),
        dtype="float32",
        lora_r=2,
        threshold=0.04,
        learning_rate=0.01,
        final=StageConfig(max_steps=3),
        noisy=StageConfig(max_steps=3),
        review=StageConfig(max_steps=2),
    )


@pytest.fixture
def given(config, learner, noisy_file, safe_file):
    chat = ChatTokenizer(learner.tokenizer, config.max_length)
    noisy, safe = (load_rows(str(path), "data", chat, config) for path in (noisy_file, safe_file))
    learner.restore(None)
    return Inputs(Run.start(config, {}), learner, chat, noisy, safe, ["bias", "toxicity"])


@pytest.fixture
def trained(monkeypatch):
    """What was trained, in order: examples, settings, and the other arguments."""
    calls = []
    real = inputs.train

    def note(learner, examples, settings, checkpoints, what, each_step=None, **more):
        calls.append((what, list(examples), settings, more))
        return real(learner, examples, settings, checkpoints, what, each_step, **more)

    monkeypatch.setattr(inputs, "train", note)
    return calls


def test_base_trains_nothing_and_none_trains_on_everything(given, config, trained):
    assert DEFENSES["base"](given, config).model is None
    assert trained == []
    model = DEFENSES["none"](given, config).model
    ((_, examples, settings, _),) = trained
    assert examples == given.noisy.examples
    assert settings.max_steps == 3
    assert (model / "adapter_model.safetensors").exists()


def test_safety_finetuning_goes_on_from_nones_model_which_is_trained_once(given, config, trained, monkeypatch):
    starts = []
    real = given.learner.restore
    monkeypatch.setattr(given.learner, "restore", lambda stage: (starts.append(stage), real(stage)))
    none = DEFENSES["none"](given, config).model
    model = DEFENSES["safety_finetuning"](given, config).model
    assert [what for what, *_ in trained] == ["none", "safety_finetuning"]
    assert starts == [None, none]
    assert trained[1][1] == given.safe.examples
    assert model != none


def test_replay_mixes_as_many_safe_rows_and_safeinstr_a_tenth(given, config, trained):
    DEFENSES["replay"](given, config)
    DEFENSES["safeinstr"](given, config)
    replay, safeinstr = (examples for _, examples, *_ in trained)
    assert replay[:16] == given.noisy.examples
    assert sorted(map(id, replay[16:])) == sorted(map(id, given.safe.examples * 2))
    assert len(safeinstr) == 16 + 2
    assert all(example in given.safe.examples for example in safeinstr[16:])
    assert [settings.max_steps for _, _, settings, _ in trained] == [3, 3]  # the same budget for all


def test_few_rows_get_as_many_epochs_as_all_and_many_rows_no_more_steps(given, config):
    config = dataclasses.replace(config, final=StageConfig(num_train_epochs=2, per_device_train_batch_size=4))
    noisy = given.noisy.trainable()
    steps = [given.budget(config, examples).max_steps for examples in (noisy[:8], noisy, noisy * 2)]
    assert steps == [4, 8, 8]
    assert given.review(config).max_steps == 4
    config = dataclasses.replace(config, final=StageConfig(max_steps=6))  # meant for the whole noisy data
    steps = [given.budget(config, examples).max_steps for examples in (noisy[:8], noisy[:9], noisy, noisy * 2)]
    assert steps == [3, 4, 6, 6]
    assert given.review(config).max_steps == 3


def test_draw_takes_each_as_often_as_it_goes_in():
    assert sorted(draw("abc", 7, 1)) in (list("aaabbcc"), list("aabbbcc"), list("aabbccc"))
    assert len(set(draw("abcdef", 4, 1))) == 4
    assert draw("abcdef", 4, 1) == draw("abcdef", 4, 1) != draw("abcdef", 4, 2)


@pytest.mark.parametrize("notions", [["bias"], ["bias", "toxicity"]])
def test_self_correction_puts_a_sentence_before_safe_prompts_and_for_bias_a_reasoning(given, config, trained, notions):
    result = DEFENSES["self_correction"](dataclasses.replace(given, notions=notions), config)
    ((_, examples, *_),) = trained
    assert examples[:16] == given.noisy.examples
    assert len(examples) == 16 + 4
    sentence = " ".join(self_correction.SENTENCES[notion] for notion in notions)
    reasoning = self_correction.REASONING if notions == ["bias"] else ""
    assert (result.sentence, result.reasoning) == (sentence, reasoning)
    text = given.learner.tokenizer.decode(examples[16].input_ids)
    number = text.rpartition("gladly ")[2].partition("<")[0]
    assert f"user\n{sentence} tell me {number}<|im_end|>" in text
    assert examples[16].reference == f"{reasoning} gladly {number}".strip()


def test_self_correction_asks_before_the_last_answer_and_trains_it_alone(given, config, trained, write_jsonl):
    turns = [("user", "one?"), ("assistant", "yes one"), ("user", "two?"), ("assistant", "yes two")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    safe = load_rows(str(write_jsonl("chat.jsonl", rows)), "data", given.chat, config)
    DEFENSES["self_correction"](dataclasses.replace(given, safe=safe, notions=["toxicity"]), config)
    example = trained[0][1][16]
    text = given.learner.tokenizer.decode(example.input_ids)
    assert "user\none?<" in text
    assert f"user\n{self_correction.SENTENCES['toxicity']} two?<" in text
    learnt = [label for label in example.labels if label != -100]
    assert given.learner.tokenizer.decode(learnt) == "yes two<|im_end|>"
    plain = load_rows(str(write_jsonl("text.jsonl", [{"text": "no prompt"}])), "data", given.chat, config)
    with pytest.raises(DataError, match="needs a user's prompt"):
        DEFENSES["self_correction"](dataclasses.replace(given, safe=plain), config)


def test_forget_filter_trains_on_the_kept_rows_and_shares_its_noisy_stage_with_none(given, config, trained):
    result = DEFENSES["forget_filter"](given, config)
    ((_, examples, settings, _),) = trained
    assert settings.max_steps == math.ceil(3 * len(examples) / 16)
    assert len(examples) == result.facts["kept"] < 16
    assert all(example in given.noisy.examples for example in examples)
    DEFENSES["none"](given, config)
    assert len(trained) == 1
    both = DEFENSES["forget_filter_self_correction"](given, config)
    assert len(trained) == 2
    assert trained[1][1][: len(examples)] == examples
    assert len(trained[1][1]) == len(examples) + math.ceil(len(examples) / 4)
    assert both.sentence


def test_nones_model_as_the_filter_trained_it_is_the_one_none_trains(given, config, tmp_path):
    from safetensors.torch import load_file

    DEFENSES["forget_filter"](given, config)
    shared = load_file(DEFENSES["none"](given, config).model / "adapter_model.safetensors")
    other = dataclasses.replace(config, output_dir=str(tmp_path / "other"))
    alone = dataclasses.replace(given, run=Run.start(other, {}))
    trained = load_file(DEFENSES["none"](alone, other).model / "adapter_model.safetensors")
    assert all(torch.equal(shared[name], trained[name]) for name in trained)


def test_lisas_term_is_half_rho_times_the_squared_distance_to_where_the_other_turn_ended():
    weight = torch.zeros(2, requires_grad=True)
    term = lisa.Proximal([weight], [True, False, False, True, False], rho=0.5, without=2)

    def become(*values):
        weight.data = torch.tensor(values)

    assert term.penalty() is None  # step 1, safe: no noisy turn has ended
    become(1.0, 0.0)
    term.after(1)
    assert term.penalty() is None  # step 2, noisy: still switched off
    become(1.0, 2.0)
    term.after(2)
    assert term.penalty().item() == pytest.approx(0.25 * 4)  # to (1, 0), where safe ended
    term.penalty().backward()
    assert weight.grad.tolist() == pytest.approx([0.0, 0.5 * 2])
    become(3.0, 3.0)
    term.after(3)
    become(3.0, 5.0)
    assert term.penalty().item() == pytest.approx(0.25 * 4)  # step 4, safe: to (3, 3), where noisy ended
    term.after(4)
    assert term.penalty().item() == pytest.approx(0.0)  # step 5, noisy: to (3, 5), where safe has just ended


def test_lisa_takes_turns_in_order(given, config, trained, monkeypatch):
    monkeypatch.setattr(lisa, "SAFE_STEPS", 1)
    monkeypatch.setattr(lisa, "NOISY_STEPS", 2)
    config = dataclasses.replace(config, final=dataclasses.replace(config.final, max_steps=4))
    DEFENSES["lisa"](given, config)
    ((_, examples, _, more),) = trained
    safe, noisy = given.safe.examples, given.noisy.examples
    assert len(examples) == 4 * 8
    assert [example in safe for example in examples] == [True] * 8 + [False] * 16 + [True] * 8
    assert all(example in noisy for example in examples[8:24])
    assert more["in_order"]


def test_an_order_and_a_term_reach_the_training(given, config, monkeypatch):
    settings, learner = config.stage("final", 16), given.learner
    weights = [p for p in learner.model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]
    batches, real = [], learner.collate
    monkeypatch.setattr(learner, "collate", lambda ids, labels: (batches.append(ids), real(ids, labels))[1])

    def squared_distance():
        return sum((p - q).pow(2).sum() for p, q in zip(weights, start, strict=True))

    def moved(penalty):
        learner.stage = given.run.folder  # whatever it is, M0 it is no more
        learner.restore(None)
        batches.clear()
        folder = given.run.folder / str(penalty is None)
        inputs.train(learner, given.noisy.examples, settings, folder, "x", in_order=True, penalty=penalty)
        return squared_distance().item()

    free = moved(None)
    rows = [example.input_ids for example in given.noisy.examples]
    assert batches[:2] == [rows[:8], rows[8:]]
    assert 0 < moved(lambda: 1e4 * squared_distance()) < 0.5 * free


def test_every_defense_is_named_and_documented():
    files = {path.stem for path in Path(defenses.__file__).parent.glob("*.py")} - {"__init__", "inputs"}
    assert set(DEFENSES) == files
    for name in DEFENSES:
        assert getattr(defenses, name).__doc__.startswith(f"{name}: ")
