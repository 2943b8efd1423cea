"""Each defense against a case worked by hand: what it trains on, in which order, from where, with which term."""

import dataclasses
import importlib
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model

from forgetfilter import defenses
from forgetfilter import workshop as workshops
from forgetfilter.config import StageConfig
from forgetfilter.data.loading import load_data, load_rows
from forgetfilter.defenses import (
    DEFENSES,
    JOIN,
    PREPARATIONS,
    REPAIRS,
    changes_m0,
    constants_of,
    defend,
    exists,
    filter_of,
    names,
    parameters_of,
    require_order,
)
from forgetfilter.defenses.lisa import Proximal
from forgetfilter.defenses.result import budget, draw, safe_budget
from forgetfilter.defenses.rounding import round_layers, rounded
from forgetfilter.defenses.self_correction import REASONING, SENTENCES
from forgetfilter.errors import ConfigError, DataError, ModelError, TrainingError
from forgetfilter.filters import FILTERS
from forgetfilter.hooks import Hooks
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

SHARED = {"__init__", "result", "adapters", "pairs"}
"""Files of the room that hold no defense."""


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config,
        threshold=0.04,
        final=StageConfig(max_steps=3),
        noisy=StageConfig(max_steps=3),
        review=StageConfig(max_steps=2),
    )


@pytest.fixture
def data(config, workshop):
    return dataclasses.replace(load_data(config, workshop.m0.chat), notions=["bias", "toxicity"])


@pytest.fixture
def trained(monkeypatch):
    """What was trained, in order: stage, examples, settings, hooks and the other arguments."""
    calls = []
    real = workshops.train

    def note(learner, examples, settings, checkpoints, what, hooks=None, **more):
        calls.append((what.removesuffix(" stage"), list(examples), settings, {"hooks": hooks, **more}))
        return real(learner, examples, settings, checkpoints, what, hooks, **more)

    monkeypatch.setattr(workshops, "train", note)
    return calls


def stages(trained):
    return [what for what, *_ in trained]


def test_base_trains_nothing_and_none_trains_on_everything(workshop, data, config, trained):
    assert DEFENSES["base"](workshop, data, config).model is None
    assert trained == []
    model = DEFENSES["none"](workshop, data, config).model
    ((_, examples, settings, _),) = trained
    assert examples == data.noisy.examples
    assert settings.max_steps == 3
    assert (model / "adapter_model.safetensors").exists()


def test_safety_finetuning_goes_on_from_nones_model_which_is_trained_once(workshop, data, config, trained, monkeypatch):
    starts = []
    real = workshop.learner.restore
    monkeypatch.setattr(workshop.learner, "restore", lambda stage: (starts.append(stage), real(stage)))
    none = DEFENSES["none"](workshop, data, config).model
    model = defend("safety_finetuning", workshop, data, config).model
    assert stages(trained) == ["none", "safety_finetuning"]
    assert starts == [None, none]
    assert trained[1][1] == data.safe.examples
    assert model != none


def test_replay_mixes_as_many_safe_rows_and_safeinstr_a_tenth(workshop, data, config, trained):
    DEFENSES["replay"](workshop, data, config)
    DEFENSES["safeinstr"](workshop, data, config)
    replay, safeinstr = (examples for _, examples, *_ in trained)
    assert replay[:16] == data.noisy.examples
    assert sorted(replay[16:], key=repr) == sorted([*data.safe.examples] * 2, key=repr)
    assert len(safeinstr) == 16 + 2
    assert all(example in data.safe.examples for example in safeinstr[16:])
    assert [settings.max_steps for _, _, settings, _ in trained] == [3, 3]  # the same budget for all


def test_few_rows_get_as_many_epochs_as_all_and_many_rows_no_more_steps(data, config):
    config = dataclasses.replace(config, final=StageConfig(num_train_epochs=2, per_device_train_batch_size=4))
    noisy = list(data.noisy.trainable())
    steps = [budget(data, config, examples).max_steps for examples in (noisy[:8], noisy, noisy * 2)]
    assert steps == [4, 8, 8]
    assert safe_budget(data, config).max_steps == 4
    config = dataclasses.replace(config, final=StageConfig(max_steps=6))  # meant for the whole noisy data
    steps = [budget(data, config, examples).max_steps for examples in (noisy[:8], noisy[:9], noisy, noisy * 2)]
    assert steps == [3, 4, 6, 6]
    assert safe_budget(data, config).max_steps == 3


def test_draw_takes_each_as_often_as_it_goes_in():
    assert sorted(draw("abc", 7, 1)) in (list("aaabbcc"), list("aabbbcc"), list("aabbccc"))
    assert len(set(draw("abcdef", 4, 1))) == 4
    assert draw("abcdef", 4, 1) == draw("abcdef", 4, 1) != draw("abcdef", 4, 2)


@pytest.mark.parametrize("notions", [["bias"], ["bias", "toxicity"]])
def test_self_correction_puts_a_sentence_before_safe_prompts_and_for_bias_a_reasoning(
    workshop, data, config, trained, notions
):
    result = DEFENSES["self_correction"](workshop, dataclasses.replace(data, notions=notions), config)
    ((_, examples, *_),) = trained
    assert examples[:16] == data.noisy.examples
    assert len(examples) == 16 + 4
    sentence = " ".join(SENTENCES[notion] for notion in notions)
    reasoning = REASONING if notions == ["bias"] else ""
    assert (result.sentence, result.reasoning) == (sentence, reasoning)
    text = workshop.m0.tokenizer.decode(examples[16].input_ids)
    number = text.rpartition("gladly ")[2].partition("<")[0]
    assert f"user\n{sentence} tell me {number}<|im_end|>" in text
    assert examples[16].reference == f"{reasoning} gladly {number}".strip()


def test_self_correction_asks_before_the_last_answer_and_trains_it_alone(workshop, data, config, trained, write_jsonl):
    turns = [("user", "one?"), ("assistant", "yes one"), ("user", "two?"), ("assistant", "yes two")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    safe = load_rows(str(write_jsonl("chat.jsonl", rows)), "data", workshop.m0.chat, config)
    DEFENSES["self_correction"](workshop, dataclasses.replace(data, safe=safe, notions=["toxicity"]), config)
    example = trained[0][1][16]
    text = workshop.m0.tokenizer.decode(example.input_ids)
    assert "user\none?<" in text
    assert f"user\n{SENTENCES['toxicity']} two?<" in text
    learnt = [label for label in example.labels if label != -100]
    assert workshop.m0.tokenizer.decode(learnt) == "yes two<|im_end|>"
    plain = load_rows(str(write_jsonl("text.jsonl", [{"text": "no prompt"}])), "data", workshop.m0.chat, config)
    with pytest.raises(DataError, match="needs a user's prompt"):
        DEFENSES["self_correction"](workshop, dataclasses.replace(data, safe=plain), config)


def test_forget_filter_trains_on_the_kept_rows_and_shares_its_noisy_stage_with_none(workshop, data, config, trained):
    result = DEFENSES["forget_filter"](workshop, data, config)
    assert stages(trained) == ["noisy", "review", "firm", "kept_by_forgetting"]
    *_, (_, examples, settings, _) = trained
    assert settings.max_steps == math.ceil(3 * len(examples) / 16)
    assert len(examples) == (~result.kept.decision.dropped).sum() < 16
    assert examples == [data.noisy.examples[row] for row in np.flatnonzero(~result.kept.decision.dropped)]
    assert (result.kept.decision.dropped == (result.kept.scored.suspicion > 0.04)).all()
    assert DEFENSES["none"](workshop, data, config).model == workshop.run.model("noisy")
    assert len(trained) == 4
    both = DEFENSES["forget_filter_self_correction"](workshop, data, config)
    assert stages(trained)[4:] == ["forget_filter_self_correction"]
    assert trained[4][1][: len(examples)] == examples
    assert len(trained[4][1]) == len(examples) + math.ceil(len(examples) / 4)
    assert both.sentence
    assert (both.kept.decision.dropped == result.kept.decision.dropped).all()


def test_rows_that_are_hardly_readable_are_left_out_where_that_is_asked_for(workshop, data, config, monkeypatch):
    hard = np.arange(16) == 5
    monkeypatch.setattr(sys.modules["forgetfilter.defenses.keeping"], "unreadable", lambda *_: hard)
    config = dataclasses.replace(config, threshold=1e9)
    for what, lost in (("keep", []), ("drop", [5])):
        kept = DEFENSES["forget_filter"](workshop, data, dataclasses.replace(config, unreadable=what)).kept
        assert np.flatnonzero(kept.decision.dropped).tolist() == lost


def test_none_shares_its_model_with_the_filters_noisy_stage_in_either_order(workshop, data, config, trained):
    none = DEFENSES["none"](workshop, data, config).model
    DEFENSES["forget_filter"](workshop, data, config)
    assert stages(trained) == ["none", "review", "firm", "kept_by_forgetting"]
    longer = dataclasses.replace(config, final=StageConfig(max_steps=4))
    assert DEFENSES["none"](workshop, data, longer).model != none  # where its settings are others, it is its own
    assert stages(trained)[4:] == ["none"]


def test_nones_model_as_the_filter_trained_it_is_the_one_none_trains(workshop, data, config, tmp_path):
    DEFENSES["forget_filter"](workshop, data, config)
    shared = load_file(DEFENSES["none"](workshop, data, config).model / "adapter_model.safetensors")
    other = dataclasses.replace(config, output_dir=str(tmp_path / "other"))
    alone = Workshop(workshop.m0, other, Run.start(other, {}))
    trained = load_file(DEFENSES["none"](alone, data, other).model / "adapter_model.safetensors")
    assert all(torch.equal(shared[name], trained[name]) for name in trained)


def test_a_filter_that_keeps_everything_gives_nones_model(workshop, data, config, trained):
    config = dataclasses.replace(config, threshold=1e9)
    kept = DEFENSES["forget_filter"](workshop, data, config)
    assert stages(trained) == ["noisy", "review", "firm"]  # and the noisy stage is as long as the final one
    assert DEFENSES["none"](workshop, data, config).model == kept.model
    assert not kept.kept.decision.dropped.any()


def test_every_filter_is_a_defense_that_finetunes_on_what_it_keeps(workshop, data, config, trained):
    assert set(names()) == PREPARATIONS.keys() | DEFENSES.keys() | REPAIRS.keys() | FILTERS.keys()
    result = defend("random", workshop, data, dataclasses.replace(config, threshold=0.5))
    ((what, examples, settings, _),) = trained
    dropped = result.kept.scored.suspicion > 0.5
    assert 0 < dropped.sum() < 16
    assert (what, examples) == ("kept_by_random", [data.noisy.examples[row] for row in np.flatnonzero(~dropped)])
    assert settings.max_steps == math.ceil(3 * len(examples) / 16)
    with pytest.raises(TrainingError, match="random kept no row"):
        defend("random", workshop, data, dataclasses.replace(config, threshold=-1.0))


def test_the_filter_starts_from_m0_wherever_the_finetuning_does(workshop, data, config, trained, monkeypatch):
    workshop.start = workshop.train("before", data.safe.trainable(), safe_budget(data, config))
    starts = []
    real = workshop.learner.restore
    monkeypatch.setattr(workshop.learner, "restore", lambda stage: (starts.append(stage), real(stage)))
    assert DEFENSES["base"](workshop, data, config).model == workshop.start
    DEFENSES["forget_filter"](workshop, data, config)
    assert stages(trained) == ["before", "noisy", "review", "firm", "kept_by_forgetting"]
    noisy, review = (workshop.run.model(name) for name in ("noisy", "review"))
    firm = workshop.run.model("firm")
    # M0 is read and trained, each of three is read and trained from the one before; then the finetuning
    assert [start for start, _ in itertools.groupby(starts)] == [None, noisy, review, firm, workshop.start]
    DEFENSES["none"](workshop, data, config)
    assert stages(trained)[5:] == ["none"]  # from another start it is another model
    assert starts[-1] == workshop.start


def test_parameters_of_a_defense_are_its_own_and_its_filters(workshop, data, config, trained):
    given = {"safeinstr": {"safe_share": "0.5"}, "forgetting": {"firm_weight": 0}}
    config = dataclasses.replace(config, parameters=given)
    assert parameters_of("safeinstr", config) == {"safe_share": 0.5}
    assert parameters_of("none", config) == {}
    assert parameters_of("forget_filter", config)["forgetting"]["firm_weight"] == 0
    assert parameters_of("forget_filter_self_correction", config) == {
        "corrected_share": 0.25,
        **parameters_of("forgetting", config),
    }
    defend("safeinstr", workshop, data, config)
    assert len(trained[0][1]) == 16 + 8
    for name, wrong in (("safeinstr", {"share": 1}), ("safeinstr", {"safe_share": "much"}), ("none", {"share": 1})):
        with pytest.raises(ConfigError, match=rf"parameters\.{name}"):
            defend(name, workshop, data, dataclasses.replace(config, parameters={name: wrong}))


def test_lisas_term_is_half_rho_times_the_squared_distance_to_where_the_other_turn_ended():
    weight = torch.zeros(2, requires_grad=True)
    term = Proximal([weight], [True, False, False, True, False], rho=0.5, without=2)

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


def test_lisas_control_is_lisa_tied_to_nothing(workshop, data, config):
    untied = {"rho": 0.0, "safe_steps": 1, "noisy_steps": 2}
    config = dataclasses.replace(config, parameters={"lisa": untied, "lisa_bso": {"safe_steps": 1, "noisy_steps": 2}})
    assert defend("lisa_bso", workshop, data, config).model == defend("lisa", workshop, data, config).model
    tied = dataclasses.replace(config, parameters={"lisa": {"safe_steps": 1, "noisy_steps": 2}})
    assert defend("lisa", workshop, data, tied).model != defend("lisa", workshop, data, config).model


def test_lisa_takes_turns_in_order(workshop, data, config, trained):
    config = dataclasses.replace(
        config,
        final=dataclasses.replace(config.final, max_steps=4),
        parameters={"lisa": {"safe_steps": 1, "noisy_steps": 2}},
    )
    defend("lisa", workshop, data, config)
    ((_, examples, _, more),) = trained
    safe, noisy = data.safe.examples, data.noisy.examples
    assert len(examples) == 4 * 8
    assert [example in safe for example in examples] == [True] * 8 + [False] * 16 + [True] * 8
    assert all(example in noisy for example in examples[8:24])
    assert more["in_order"]
    assert more["hooks"].penalty is not None
    assert more["hooks"].each_step is not None
    longer = dataclasses.replace(config, final=dataclasses.replace(config.final, max_steps=20))
    defend("lisa", workshop, data, longer)
    assert trained.pop()[-1]["hooks"].penalty.__self__.without == 2  # a tenth of the steps goes without the term
    defend("lisa", workshop, data, config)
    assert len(trained) == 1
    defend("lisa", workshop, data, dataclasses.replace(config, parameters={"lisa": {"safe_steps": 1, "rho": 2.0}}))
    assert len(trained) == 2  # with other parameters it is another model


def test_an_order_and_a_term_reach_the_training(workshop, data, config, monkeypatch):
    settings, learner = config.final_stage(16), workshop.learner
    weights = [p for p in learner.model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]
    batches, real = [], learner.collate
    monkeypatch.setattr(learner, "collate", lambda ids, labels: (batches.append(ids), real(ids, labels))[1])

    def squared_distance():
        return sum((p - q).pow(2).sum() for p, q in zip(weights, start, strict=True))

    def moved(penalty):
        batches.clear()
        hooks = None if penalty is None else Hooks(penalty=penalty)
        workshop.train(f"x-{penalty is None}", data.noisy.examples, settings, hooks=hooks, in_order=True)
        return squared_distance().item()

    free = moved(None)
    rows = [example.input_ids for example in data.noisy.examples]
    assert batches[:2] == [rows[:8], rows[8:]]
    assert 0 < moved(lambda: 1e4 * squared_distance()) < 0.5 * free
    assert batches[:2] == [rows[:8], rows[8:]]


def test_a_chain_is_its_parts_one_after_the_other(workshop, data, config, trained, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dataclasses.replace(config, threshold=0.5)
    dropped = defend("random", workshop, data, config).kept.decision.dropped
    kept = [data.noisy.examples[row] for row in np.flatnonzero(~dropped)]
    trained.clear()
    result = defend("vaccine_plain-then-random-then-lisa-then-safety_finetuning", workshop, data, config)
    assert stages(trained) == ["vaccine_plain", "lisa-1.0-3-27-0.1", "safety_finetuning"]
    prepared, lisa, reviewed = (call[1] for call in trained)
    assert prepared == reviewed == data.safe.examples
    assert all(row in data.safe.examples or row in kept for row in lisa)
    assert trained[1][2].max_steps == math.ceil(3 * len(kept) / 16)  # each row as often as in the whole data
    assert result.kept.decision.dropped.sum() == 16 - len(kept)
    assert result.m0.sha256 != workshop.m0.sha256
    again = defend("random-then-none", workshop, data, config)
    assert again.model == defend("random", workshop, data, config).model


def test_rounding_leaves_whole_multiples_of_a_scale_and_a_finetuning_can_follow(workshop, data, config, trained):
    values = rounded(torch.tensor([[0.0, 7.4, -14.0, 3.0], [0.0, 0.0, 0.0, 0.0]]), 4)
    assert values.tolist() == [[0.0, 8.0, -14.0, 4.0], [0.0] * 4]  # a scale of 2: 3.7, -7 and 1.5 of it
    results = {bits: defend(f"int{bits}", workshop, data, config) for bits in (4, 8)}
    plain = workshop.read(data.noisy.examples, defend("none", workshop, data, config).model).log_likelihood
    off = {}
    for bits, result in results.items():
        whole = load_file(result.m0.folder / "model.safetensors")
        layer = whole["model.layers.0.mlp.up_proj.weight"]
        assert all(len(row.unique()) <= 2**bits - 1 for row in layer)
        assert len(whole["model.embed_tokens.weight"].unique()) > 2**bits
        read = workshop.on(result.m0).read(data.noisy.examples).log_likelihood
        off[bits] = np.abs(read - plain).mean()
    assert 0 < off[8] < off[4]
    folder = results[4].m0.folder
    trained.clear()
    after = defend("int4-then-safety_finetuning", workshop, data, config)
    assert stages(trained) == ["safety_finetuning"]
    assert after.m0.sha256 == results[4].m0.sha256
    assert after.model is not None
    del results, result
    assert not folder.exists()  # a whole model is large: it goes with whoever uses it


def test_experts_are_not_said_to_be_rounded():
    with pytest.raises(ModelError, match="experts cannot be rounded"):
        round_layers(tiny_model(tiny_config("mixtral")), 4)


@pytest.mark.parametrize(
    "name",
    [
        "safe_lora-then-vaccine",
        "lisa-then-probe",
        "lisa-then-none",
        "probe-then-random",
        "int8-then-safe_lora",
        "int8-then-int4",
        "lisa-then-lisa",
        "probe-then-forget_filter",
        "base-then-safe_lora",
    ],
)
def test_parts_that_cannot_follow_one_another_are_an_error(workshop, data, config, name):
    assert exists(name)
    for refused in (lambda: parameters_of(name, config), lambda: defend(name, workshop, data, config)):
        with pytest.raises(ConfigError, match=f"defense {name}"):
            refused()


def test_after_a_finetuning_on_safe_rows_there_is_an_adapter_to_repair(config):
    require_order("base-then-safety_finetuning-then-safe_lora")


def test_what_a_chain_depends_on_is_what_its_parts_depend_on(config):
    name = JOIN.join(["vaccine", "probe", "lisa", "int8"])
    config = dataclasses.replace(config, parameters={"lisa": {"rho": 2}, "vaccine": {"rho": 0.5}})
    assert parameters_of(name, config) == {part: parameters_of(part, config) for part in name.split(JOIN)}
    for part in name.split(JOIN):
        assert constants_of(part, config).items() <= constants_of(name, config).items()
    assert "filters.forgetting.FIRM_WEIGHT" in constants_of("probe", config), "the probe's witness has constants, too"
    assert filter_of(name) == "probe"
    assert filter_of("vaccine-then-forget_filter") == "forgetting"
    assert (changes_m0(name), changes_m0("lisa-then-safety_finetuning"), changes_m0("int4")) == (True, False, True)
    assert not exists("lisa-then-nonsense")


def test_every_defense_is_named_and_documented():
    made_by_keeping = {"forget_filter"}
    methods = {**PREPARATIONS, **DEFENSES, **REPAIRS}
    files = {path.stem for path in Path(defenses.__file__).parent.glob("*.py")}
    assert {methods[name].__module__.rpartition(".")[2] for name in methods} == files - SHARED
    for name in methods.keys() - made_by_keeping:
        assert methods[name].__name__ == name
        file = methods[name].__module__.rpartition(".")[2]
        said = importlib.import_module(methods[name].__module__).__doc__
        assert said.startswith(f"{file}: ")
        assert name in said
    page = (Path(__file__).parents[1] / "docs" / "defenses.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in methods)
    keeping = importlib.import_module("forgetfilter.defenses.keeping").__doc__
    assert keeping.startswith("keeping: ")
    assert all(f"{name} is keeping(" in keeping for name in made_by_keeping)
    assert all(method.__doc__ for method in (*methods.values(), *FILTERS.values()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(
            ("repnoise", {key: value})
            for key, value in {"rate": 0, "alpha": -1, "epochs": 0, "pairs_a_step": 0}.items()
        ),
        *((name, {"rho": -1.0}) for name in ("vaccine", "vaccine_random", "lisa")),
        *((name, {"safe_steps": 0}) for name in ("lisa", "lisa_bso")),
        ("safeinstr", {"safe_share": -0.1}),
        ("self_correction", {"corrected_share": float("nan")}),
        ("safe_lora", {"layers": -1}),
        ("safe_lora_scaled", {"directions": 0}),
        ("somf", {"draw": -1}),
        ("somf_interpolated", {"share": -1}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name_before_any_work(config, name, parameters):
    config = dataclasses.replace(config, parameters={name: parameters}, unsafe_dataset_name="unsafe.jsonl")
    with pytest.raises(ConfigError, match=rf"parameters\.{name}\.{next(iter(parameters))} is "):
        parameters_of(name, config)
