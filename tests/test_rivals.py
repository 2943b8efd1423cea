"""Filters that compete with forgetting: each against a case worked by hand, and all of them in one run."""

import copy
import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft.tuners.lora import LoraLayer
from scipy.stats import spearmanr
from test_filters import data_of
from torch.nn.functional import normalize

from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.data.loading import load_data
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.data.turns import Turn
from forgetfilter.decision import rules
from forgetfilter.defenses import DEFENSES, defend
from forgetfilter.defenses.toss_tokens import mask
from forgetfilter.errors import ConfigError, DataError
from forgetfilter.filters import FILTERS, made_from, require_filters, require_inputs
from forgetfilter.filters.column import require_there
from forgetfilter.filters.scoring import score
from forgetfilter.filters.seal import Plan, Selector, _Losses
from forgetfilter.filters.self_judge import QUESTION
from forgetfilter.filters.together import together
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.model.batches import label_logits
from forgetfilter.model.gradients import gradients
from forgetfilter.model.learner import load_learner
from forgetfilter.model.tokenizer import load_tokenizer
from forgetfilter.runs import Run
from forgetfilter.scored import Scale, Scored
from forgetfilter.workshop import Workshop

CONFIG = ForgetFilterConfig()
FOUR = [{"prompt": "a", "completion": text} for text in ("b", "bb", "bbb", "bbbb")]
TWO = [{"prompt": "c", "completion": "d"}, {"prompt": "e", "completion": "f"}]


class Made:
    """A workshop that trains nothing: its readings, states and gradients are given, by what they are of."""

    def __init__(self, readings=None, states=None, gradients=None):
        self.readings, self.given_states, self.given_gradients = readings or {}, states or {}, gradients
        self.trained = []

    def expect(self, *_):
        pass

    def train(self, name, examples, settings, start=None, *_, **__):
        self.trained.append((name, list(examples), settings, start))
        return name

    def read(self, examples, model=None):
        rows = self.readings[model]
        means = [np.nan if row is None else np.mean(row) for row in rows]
        return SimpleNamespace(token_log_probs=pa.array(rows, pa.list_(pa.float32())), log_likelihood=np.array(means))

    def states(self, examples, called):
        return np.array(self.given_states[called], np.float16)

    def states_of(self, data):
        return self.states(None, "noisy"), self.states(None, "safe")

    def gradients(self, examples, tokens=None):
        for row, example in enumerate(examples):
            yield row, np.array(self.given_gradients(example, tokens), float)


@pytest.fixture
def data(tokenizer):
    """Four noisy rows, of 1 to 4 letters, and two safe ones; the last noisy row is known to be unsafe."""
    found = data_of(tokenizer, FOUR, TWO)
    return dataclasses.replace(found, unsafe=found.noisy.select([3]))


def last_only(vectors):
    """States whose mean half says nothing."""
    return [[[9, 9], vector] for vector in vectors]


def test_length_counts_the_completions_tokens(tokenizer):
    rows = [*FOUR, {"prompt": "a", "completion": " "}]
    found = FILTERS["length"](None, data_of(tokenizer, rows, TWO), CONFIG).suspicion
    np.testing.assert_array_equal(found, [2, 3, 4, 5, np.nan])  # the end token is one
    shortest = FILTERS["length"](None, data_of(tokenizer, rows, TWO), CONFIG, short_is_suspect=True).suspicion
    assert np.nanargmax(shortest) == 0


def test_gradient_norm_is_the_squared_norm_and_the_length(data):
    made = Made(gradients=lambda example, tokens: [example.trained_tokens, 1.0])
    found = FILTERS["gradient_norm"](made, data, CONFIG)
    squares = np.array([2, 3, 4, 5]) ** 2 + 1
    np.testing.assert_allclose(found.columns["self_influence"], squares)
    np.testing.assert_allclose(found.suspicion, np.log(squares + 1) + np.log(np.array([2, 3, 4, 5]) + 1))
    alone = FILTERS["gradient_norm"](made, data, CONFIG, with_length=False).suspicion
    np.testing.assert_allclose(alone, np.log(squares + 1))


def test_an_adapters_gradient_is_about_as_long_as_that_of_its_layers_weights(tiny_model, tokenizer):
    """However wide a layer, and whatever the adapter's rank and alpha."""
    rows = data_of(tokenizer, FOUR, TWO).noisy.examples
    lengths = []
    for settings in ({"lora_r": 64, "lora_alpha": 1}, {"lora_r": 32, "lora_alpha": 64}):
        config = ForgetFilterConfig(dtype="float32", **settings)
        learner = load_learner(tiny_model, load_tokenizer(tiny_model, config), config)
        lengths.append([float(found.norm()) for _, found in gradients(learner, rows, "gradients")])
    whole = [module.base_layer.weight for module in learner.model.modules() if isinstance(module, LoraLayer)]
    expected = []
    for row in rows:
        learner.model.zero_grad()
        for weight in whole:
            weight.requires_grad, weight.grad = True, None
        logits, targets = label_logits(learner.model, learner.collate([row.input_ids], [row.labels]))
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        expected.append(float(torch.stack([weight.grad.norm() for weight in whole]).norm()))
    for found in lengths:
        np.testing.assert_allclose(found, expected, rtol=0.15)


def test_safe_only_trains_on_safe_rows_alone_and_takes_the_loss_or_how_little_it_fell(data):
    readings = {None: [[-2.0], [-2.0, -4.0], None, [-1.0]], "safe_only": [[-1.0], [-3.0, -3.0], None, [-2.0]]}
    made = Made(readings)
    np.testing.assert_allclose(FILTERS["safe_only"](made, data, CONFIG).suspicion, [1, 3, np.nan, 2])
    np.testing.assert_allclose(FILTERS["safe_only_drop"](made, data, CONFIG).suspicion, [-0.5, 0, np.nan, 1])
    ((name, examples, settings, start), _) = made.trained
    assert (name, examples, start) == ("safe_only", data.safe.trainable(), None)
    assert (settings.max_steps, settings.learning_rate) == (20, 5e-4)


def test_second_split_counts_the_looks_for_which_what_was_learnt_stays_wrong(data):
    right, wrong = np.log(0.9), np.log(0.1)
    readings = {
        None: [[wrong, wrong], [right, wrong], [wrong], None],
        "noisy": [[right, right], [right, right], [wrong], None],
        "second_split_1": [[wrong, right], [wrong, right], [wrong], None],
        "second_split_2": [[wrong, wrong], [wrong, right], [wrong], None],
        "second_split_3": [[right, wrong], [wrong, right], [wrong], None],
        "second_split_4": [[wrong, wrong], [wrong, right], [wrong], None],
    }
    made = Made(readings)
    found = FILTERS["second_split"](made, data, CONFIG).suspicion
    # Row 0: its first token is right once more at look 3, so it stays wrong for 1 look; its second for 3.
    # Row 1: M0 knew the first token, and the second is never forgotten. Row 2: nothing was learnt.
    np.testing.assert_array_equal(found, [2, 0, 0, np.nan])
    assert [(name, start) for name, _, _, start in made.trained] == [
        ("noisy", None),
        ("second_split_1", "noisy"),
        ("second_split_2", "second_split_1"),
        ("second_split_3", "second_split_2"),
        ("second_split_4", "second_split_3"),
    ]


def test_second_split_shows_all_safe_rows_before_it_shows_one_again(tokenizer):
    safe = [{"prompt": "c", "completion": f"d {i}"} for i in range(60)]
    data = data_of(tokenizer, FOUR, safe)
    looks = ("second_split_1", "second_split_2")
    made = Made({None: [None] * 4, "noisy": [None] * 4, **dict.fromkeys(looks, [None] * 4)})
    FILTERS["second_split"](made, data, CONFIG, looks=2)  # 20 steps of 8 rows in all
    shown = [example.reference for name, examples, _, _ in made.trained if name in looks for example in examples]
    assert len(shown) == 160
    assert [len(set(shown[start : start + 60])) for start in (0, 60)] == [60, 60]


def test_hidden_safe_noisy_tells_rows_that_are_unlike_the_safe_ones(tokenizer):
    rng = np.random.default_rng(0)
    states = {"noisy": rng.normal(0, 1, (40, 2, 8)), "safe": rng.normal(0, 1, (40, 2, 8))}
    states["noisy"][:10] += 2
    found = FILTERS["hidden_safe_noisy"](Made(states=states), data_of(tokenizer, FOUR * 10, TWO), CONFIG).suspicion
    assert np.median(found[:10]) > found[10:].max()


def test_larf_is_the_mean_cosine_to_unsafe_minus_that_to_safe_rows(data):
    states = {
        "noisy": last_only([[2, 0], [0, 3], [3, 4], [np.nan, np.nan]]),
        "safe": last_only([[0, 1], [0, 5]]),
        "unsafe": last_only([[7, 0]]),
    }
    found = FILTERS["larf"](Made(states=states), data, CONFIG).suspicion
    np.testing.assert_allclose(found, [1, -1, 0.6 - 0.8, np.nan], atol=1e-3)


def test_anchor_gradients_point_to_unsafe_and_away_from_safe_rows(data):
    asked = []

    def gradient(example, tokens):
        asked.append(tokens)
        if tokens is None:
            return {"b": [2, 0], "bb": [0, 2], "bbb": [-3, 0], "bbbb": [3, 4]}[example.reference]
        return [0, 5] if example.reference in "df" else [5, 0]

    found = FILTERS["anchor_gradients"](Made(gradients=gradient), data, CONFIG).suspicion
    np.testing.assert_allclose(found, [1, -2, -1, 0.6 - 2 * 0.8])  # both safe anchors are (0, 1)
    assert asked == [10, 10, 10, 10, 10, None, None, None, None]


def test_toss_takes_what_the_unsafe_reference_likes_and_the_safe_one_does_not(data):
    readings = {
        "toss_unsafe": [[-1.0, -1.0], [-3.0], None, [-1.0]],
        "toss_safe": [[-2.0, -4.0], [-1.0], None, [-1.5]],
    }
    made = Made(readings)
    found = FILTERS["toss"](made, data, CONFIG)
    np.testing.assert_allclose(found.suspicion, [2, -2, np.nan, 0.5])
    assert found.token_costs.to_pylist() == [[1, 3], [-2], None, [0.5]]
    learnt = {name: examples for name, examples, _, _ in made.trained}
    assert learnt == {"toss_safe": data.safe.trainable(), "toss_unsafe": data.unsafe.examples}
    settings = [settings for _, _, settings, _ in made.trained]
    assert settings[0] == settings[1]
    FILTERS["toss"](made, data, CONFIG, rounds=2)
    assert made.trained[-1][1] == [data.unsafe.examples[0], data.noisy.examples[0]]
    marked = dataclasses.replace(data, unsafe=data.noisy.select([0]))  # the known row scores highest, and is no news
    FILTERS["toss"](made, marked, CONFIG, rounds=2)
    assert made.trained[-1][1] == [data.noisy.examples[0], data.noisy.examples[3]]
    of_two = dataclasses.replace(data.noisy, whole=data.noisy.examples[:2], belongs=np.array([0, 1, 1, 0]))
    told = dataclasses.replace(data, noisy=of_two, unsafe=data.noisy.select([0]))  # a conversation of two answers
    FILTERS["toss"](made, told, CONFIG, rounds=2)
    assert made.trained[-1][1] == [data.noisy.examples[0], data.noisy.examples[1]], "its other answer is no news, too"


def test_toss_tokens_masks_the_highest_fifth_of_all_tokens_and_learns_the_rest():
    rows = [
        Example([5, 6, 7, 8], [IGNORED, 6, 7, 8], 1, "", cut=False),
        Example([5, 6, 7], [IGNORED, 6, 7], 1, "", cut=False),
    ]
    scores = pa.array([[0.1, 0.9, 0.2], [0.3, 0.4]], pa.list_(pa.float32()))
    found = mask(rows, scores, 0.2)
    assert [example.labels for example in found] == [[IGNORED, 6, IGNORED, 8], [IGNORED, 6, 7]]
    assert mask(rows, scores, 0.0) == rows
    assert [example.labels for example in mask(rows, scores, 0.99)] == [[IGNORED] * 4, [IGNORED] * 3]
    same = pa.array([[0.5, 0.5, 0.5], [0.5, 0.5]], pa.list_(pa.float32()))
    assert sum(example.labels.count(IGNORED) for example in mask(rows, same, 0.4)) == 2 + 2
    assert mask(rows[:1], pa.array([None], pa.list_(pa.float32())), 0.5) == rows[:1]
    others = pa.array([[9.0, 9.0, 9.0, 9.0], [0.3, 0.4]], pa.list_(pa.float32()))  # of other tokens than row 0 has
    assert [example.labels for example in mask(rows, others, 0.5)] == [rows[0].labels, [IGNORED, 6, IGNORED]]


def test_toss_tokens_is_finetuned_on_what_the_mask_leaves(workshop, config):
    data = load_data(dataclasses.replace(config, unsafe_dataset_name=config.dataset_name), workshop.m0.chat)
    workshop.run.manifest |= data.facts()
    result = defend("toss_tokens", workshop, data, config)
    assert (result.model / "adapter_model.safetensors").exists()
    assert result.model != DEFENSES["none"](workshop, data, config).model
    with pytest.raises(ConfigError, match="masked_share is 1"):
        DEFENSES["toss_tokens"](workshop, data, config, masked_share=1.0)


def test_copies_in_capitals_are_not_finetuned_on_beside_the_masked_first(
    workshop, config, write_jsonl, noisy_file, monkeypatch
):
    rows = [json.loads(line) for line in noisy_file.read_text().splitlines()]
    loud = [{**row, "completion": row["completion"].upper()} for row in rows[:4]]
    path, known = str(write_jsonl("loud.jsonl", [*rows, *loud])), config.dataset_name
    config = dataclasses.replace(config, dataset_name=path, unsafe_dataset_name=known, output_dir=f"{path}-run")
    seen, train = {}, Workshop.train

    def noted(self, name, examples, *others, **more):
        seen[name] = len(examples)
        return train(self, name, examples, *others, **more)

    monkeypatch.setattr(Workshop, "train", noted)
    shop = Workshop(workshop.m0, config, Run.start(config, {}))
    data = load_data(config, shop.m0.chat)
    shop.run.manifest |= data.facts()
    defend("toss_tokens", shop, data, config)
    assert seen["toss_tokens"] == len(rows)


def test_a_rows_number_is_its_own_whatever_a_row_that_says_the_same_has(config, write_jsonl, noisy_file):
    rows = [json.loads(line) for line in noisy_file.read_text().splitlines()]
    rows = [{**row, "risk": float(number)} for number, row in enumerate(rows)]
    same = [{**rows[3], "risk": 50.0}, {key: rows[3][key] for key in rows[3] if key != "risk"}]
    joined = "column+length"
    settings = {"filter": f"column,{joined}", "parameters": {"column": {"name": "risk"}}}
    path = write_jsonl("same.jsonl", [*rows, *same])
    scores = ForgetFilter(dataclasses.replace(config, dataset_name=str(path), **settings)).fit().scores
    assert list(scores["column"])[:17] == [*range(16), 50.0]
    assert np.isnan(float(scores["column"][17] or "nan"))
    assert scores[joined][16] > scores[joined][3]


def test_a_columns_numbers_are_the_scores(tokenizer):
    rows = [{**row, "risk": risk} for row, risk in zip(FOUR, (0.5, "2", None, ""), strict=True)]
    data = data_of(tokenizer, rows, TWO)
    found = FILTERS["column"](None, data, CONFIG, name="risk").suspicion
    np.testing.assert_array_equal(found, [0.5, 2, np.nan, np.nan])
    assert FILTERS["column"](None, data, CONFIG, name="risk", higher_is_safer=True).suspicion[1] == -2
    for safer, dropped in ((False, [False, True]), (True, [True, False])):
        known = FILTERS["column"](None, data, CONFIG, name="risk", higher_is_safer=safer, threshold=1.5)
        assert rules.automatic(known.suspicion, known.scale).drops(known.suspicion)[:2].tolist() == dropped
    with pytest.raises(DataError, match=r"no column 'guard' \(parameters.column.name\)"):
        require_there(None, data, {"name": "guard"})
    some = data_of(tokenizer, FOUR, TWO)  # a part of the rows, of which others have a number
    assert np.isnan(FILTERS["column"](None, some, CONFIG, name="risk").suspicion).all()
    wrong = data_of(tokenizer, [*rows[:1], {**FOUR[0], "risk": "high"}], TWO)
    with pytest.raises(DataError, match="2: 'risk' is 'high', expected a number"):
        require_there(None, wrong, {"name": "risk"})


def test_self_judge_compares_no_with_yes_and_shortens_what_is_too_long(workshop, config):
    long = [{"prompt": "long", "completion": "x" * 3000}, {"prompt": "x" * 600, "completion": "you fool"}]
    rows = [{"prompt": "hi", "completion": "there"}, *long]
    data = load_data(config, workshop.m0.chat, noisy=rows)
    found = FILTERS["self_judge"](workshop, data, config, question="Good?").suspicion
    asked = Turn("user", "Question: hi\n\nAnswer: there\n\nGood? Answer Yes or No.", trained=False)
    no, yes = (workshop.m0.chat.encode([asked, Turn("assistant", word, trained=True)]) for word in ("No", "Yes"))
    read = [workshop.read([example]).token_log_probs[0].values.to_numpy()[:-1].sum() for example in (no, yes)]
    assert found[0] == pytest.approx(read[0] - read[1], abs=1e-4)
    assert np.isfinite(found[1])
    assert found[2] != FILTERS["self_judge"](workshop, other_answer(data, rows), config, question="Good?").suspicion[2]


def test_self_judge_reads_the_word_where_a_template_ends_no_turn(workshop, config):
    source = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}"
    own = dataclasses.replace(workshop.m0, tokenizer=copy.deepcopy(workshop.m0.tokenizer))
    own.tokenizer.chat_template = source
    assert not own.chat.template.turn_ends
    data = load_data(config, own.chat, noisy=FOUR)
    workshop.m0 = own
    found = FILTERS["self_judge"](workshop, data, config).suspicion
    asked = [Turn("user", f"Question: a\n\nAnswer: b\n\n{QUESTION} Answer Yes or No.", trained=False)]
    read = [
        workshop.read([own.chat.encode([*asked, Turn("assistant", word, trained=True)])]).token_log_probs[0]
        for word in ("No", "Yes")
    ]
    no, yes = (row.values.to_numpy().sum() for row in read)
    assert found[0] == pytest.approx(no - yes, abs=1e-4)
    assert abs(found[0]) > 1e-3


def other_answer(data, rows):
    """The same rows, the last with another answer, which a long prompt must not hide."""
    changed = [*rows[:2], {**rows[2], "completion": "you star"}]
    return dataclasses.replace(data, noisy=dataclasses.replace(data.noisy, source=load_source(changed)))


def test_the_selectors_gradient_is_that_of_the_weighted_loss():
    rng = np.random.default_rng(0)
    selector = Selector(6, 0.1, adam=False)
    selector.logits = rng.normal(0, 1, 6)
    batch, losses = [4, 1, 2], np.array([0.3, 1.2, 0.7])

    def weighted(logits):
        other = Selector(6, 0.1, adam=False)
        other.logits = logits
        return (other.weights()[batch] * losses).mean()

    moved = [weighted(selector.logits + 1e-6 * np.eye(6)[row]) - weighted(selector.logits) for row in range(6)]
    np.testing.assert_allclose(selector.gradient(batch, losses), np.array(moved) / 1e-6, atol=1e-5)
    assert selector.weights().mean() == pytest.approx(1)


@pytest.mark.parametrize(("adam", "rate", "least"), [(False, 0.5, 0.999), (True, 5e-3, 0.6)])
def test_the_selector_learns_the_order_of_fixed_losses_which_adam_blurs(adam, rate, least):
    rng = np.random.default_rng(1)
    losses, selector = rng.gamma(2, 1, 240), Selector(240, rate, adam=adam)
    for _ in range(3):
        for batch in rng.permutation(240).reshape(30, 8):
            selector.step(batch.tolist(), losses[batch])
    agreement = spearmanr(-selector.logits, losses).statistic
    assert agreement > least
    assert not adam or agreement < 0.95


@pytest.mark.parametrize("batch", [4, 8])
def test_rows_of_equal_loss_keep_equal_logits_whatever_the_batch(data, batch):
    noisy = ([*data.noisy.examples] * 6)[:15]
    plan, selector = Plan.of(noisy, noisy, batch, epochs=3, fall=0.03, seed=0), Selector(15, 5e-3, adam=False)
    losses = _Losses(plan, selector, batch)
    for step in range(2 * len(plan.noisy)):
        rows = plan.examples[step * batch : (step + 1) * batch]
        losses(torch.ones(sum(row.trained_tokens for row in rows)))
    moved = selector.logits - selector.logits.mean()
    assert np.abs(moved).max() < 0.01 * 5e-3 * 3 / batch


def test_seals_plan_shows_every_row_once_an_epoch_and_leaves_the_safe_loss_slowly(data):
    noisy, safe = [*data.noisy.examples] * 6, data.safe.examples
    plan = Plan.of(noisy, safe, batch=4, epochs=3, fall=0.03, seed=0)
    assert plan.safe_weights == pytest.approx([1.0] * 6 + [0.97] * 6 + [0.94] * 6)
    for epoch in range(3):
        seen = [row for step in plan.noisy[6 * epoch : 6 * epoch + 6] for row in step]
        assert sorted(seen) == list(range(24))
    odd = Plan.of(noisy[:15], safe, batch=8, epochs=3, fall=0.0, seed=0)
    visits = np.bincount([row for step in odd.noisy for row in step])
    assert len(odd.noisy) == 6
    assert visits.min() >= 3
    taught = np.bincount([row for step, fresh in zip(odd.noisy, odd.fresh, strict=True) for row in step[:fresh]])
    assert set(taught) == {3}
    assert plan.examples[:4] == [example for example in plan.examples[:4] if example in safe]
    assert plan.examples[4:8] == [noisy[row] for row in plan.noisy[0]]


def test_seal_drops_a_fifth_those_that_the_safe_model_predicts_worst(workshop, config):
    data = load_data(config, workshop.m0.chat)
    found = score(workshop, data, "seal")
    threshold = rules.automatic(found.suspicion, found.scale)
    assert threshold.drops(found.suspicion).sum() == 16 - int(0.8 * 16)
    assert "smallest weights" in threshold.says
    still = dataclasses.replace(config, learning_rate=1e-9, noisy=StageConfig())  # so each row has one loss all along
    plain = FILTERS["seal"](workshop, data, still, adam=False, selector_rate=1e-3)
    losses = FILTERS["m0_loss"](workshop, data, config).suspicion
    assert spearmanr(plain.suspicion, losses).statistic > 0.99


def test_a_fifth_is_a_fifth_of_the_rows_however_many_answers_they_have():
    answers = np.random.default_rng(0).permutation(50).astype(float)
    scale = Scale(float(np.sort(answers)[39]), says="a fifth", quota=True, kept=0.8)
    found = Scored(answers, scale=scale).most_suspect(np.repeat(np.arange(10), 5))
    assert rules.automatic(found.suspicion, found.scale).drops(found.suspicion).sum() == 2
    assert rules.automatic(np.full(3, np.nan), scale).value is None


def test_an_anchor_is_made_of_the_answer_that_the_row_is_about(learner, tokenizer):
    turns = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (row,) = data_of(tokenizer, [{"messages": messages}], [{"messages": messages}]).noisy.examples
    ((_, found),) = gradients(learner, [row], "gradients", tokens=1)
    labels = [label if place == row.prompt_length else IGNORED for place, label in enumerate(row.labels)]
    ((_, alone),) = gradients(learner, [dataclasses.replace(row, labels=labels)], "gradients")
    torch.testing.assert_close(found, alone)


def test_a_rows_gradient_is_that_of_its_mean_loss(learner, tokenizer):
    rows = data_of(tokenizer, [FOUR[2], {"prompt": "a", "completion": " "}], TWO).noisy.examples
    ((row, found),) = gradients(learner, rows, "gradients")
    assert row == 0
    learner.model.zero_grad()
    logits, targets = label_logits(learner.model, learner.collate([rows[0].input_ids], [rows[0].labels]))
    torch.nn.functional.cross_entropy(logits.float(), targets).backward()
    trained = [weight for weight in learner.model.parameters() if weight.requires_grad]
    for own, weight in zip(found.split([weight.numel() for weight in trained]), trained, strict=True):
        torch.testing.assert_close(normalize(own, dim=0), normalize(weight.grad.flatten(), dim=0))
    assert found.abs().max() > 0
    learner.model.zero_grad()
    ((_, of_one),) = gradients(learner, rows[:1], "gradients", tokens=1)
    labels = [label if place == rows[0].prompt_length else IGNORED for place, label in enumerate(rows[0].labels)]
    ((_, alone),) = gradients(learner, [dataclasses.replace(rows[0], labels=labels)], "gradients")
    torch.testing.assert_close(of_one, alone)


def test_filters_together_rank_by_their_mean_rank(data, monkeypatch):
    scores = {"one": [1.0, 2, 3, np.nan], "two": [30.0, 10, 20, 40]}
    monkeypatch.setattr(
        "forgetfilter.filters.scoring.scores_of", lambda workshop, data, name: Scored(np.array(scores[name]))
    )
    found = together(["one", "two"])(None, data, CONFIG)
    np.testing.assert_allclose(found.suspicion, [(0 + 2 / 3) / 2, (0.5 + 0) / 2, (1 + 1 / 3) / 2, 1])
    assert set(found.columns) == {"one", "two"}


def test_names_may_be_joined_and_a_probe_may_stand_on_them():
    settings = {"parameters": {"column": {"name": "risk"}, "probe": {"on": "forgetting+column"}}}
    config = ForgetFilterConfig(filter="forgetting+column,probe", **settings)
    require_filters(config)
    assert made_from("forgetting+column", config) == ["forgetting", "column"]
    assert made_from("probe", config) == ["probe", "forgetting", "column"]
    for name in ("forgetting+guess", "forgetting+", "+"):
        with pytest.raises(ConfigError, match="choose among"):
            require_filters(ForgetFilterConfig(filter=name))
    with pytest.raises(ConfigError, match="column needs name"):
        require_filters(ForgetFilterConfig(filter="forgetting+column"))
    with pytest.raises(ConfigError, match="no filter to learn from"):
        require_filters(ForgetFilterConfig(filter="probe", parameters={"probe": {"on": "probe+words"}}))


@pytest.mark.parametrize("name", ["larf", "toss", "anchor_gradients+words", "probe"])
def test_filters_that_need_known_unsafe_rows_say_so(name):
    config = ForgetFilterConfig(filter=name, parameters={"probe": {"on": "larf"}})
    with pytest.raises(ConfigError, match=r"known to be unsafe: --unsafe_dataset_name FILE, or .* marked"):
        require_filters(config)
    require_filters(dataclasses.replace(config, unsafe_dataset_name="unsafe.jsonl"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("toss", {"rounds": 0}),
        ("toss", {"rate": 0.0}),
        ("anchor_gradients", {"anchor_rows": 0}),
        ("second_split", {"looks": 0}),
        ("seal", {"epochs": 0}),
        ("safe_only", {"share": -1.0}),
        ("safe_only_drop", {"share": -1.0}),
        ("words", {"folds": 1}),
        ("forgetting", {"least_learnt": 0}),
        ("forgetting", {"firm_weight": -1}),
        ("forgetting_rouge1", {"review_share": 0}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name_before_any_work(name, parameters):
    given = {"filter": name, "parameters": {name: parameters}, "unsafe_dataset_name": "unsafe.jsonl"}
    with pytest.raises(ConfigError, match=rf"parameters\.{name}\.{next(iter(parameters))} is "):
        ForgetFilter(dataclasses.replace(CONFIG, **given))


def test_seal_may_not_fall_below_nothing_and_says_so_before_another_filter_trains(data, workshop, config):
    with pytest.raises(ConfigError, match=r"parameters\.seal\.fall is "):
        FILTERS["seal"](Made(), data, CONFIG, fall=5.0)
    workshop.config = dataclasses.replace(config, filter="forgetting,seal", parameters={"seal": {"fall": 5.0}})
    with pytest.raises(ConfigError, match=r"parameters\.seal\.fall is "):
        require_inputs("seal", workshop, data)
    workshop.config = dataclasses.replace(config, filter="seal", gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="needs gradient_accumulation_steps 1, not 2"):
        require_inputs("seal", workshop, data)


def test_rows_without_what_a_filter_needs_are_one_clear_error(tokenizer, data):
    symbols = data_of(tokenizer, [{"prompt": "+", "completion": "-"}] * 9, [{"prompt": "!", "completion": "?"}] * 9)
    with pytest.raises(DataError, match="finds no word"):
        FILTERS["words"](None, symbols, CONFIG)
    empty = data_of(tokenizer, [*FOUR, {"prompt": "a", "completion": " "}], TWO)
    with pytest.raises(DataError, match="words needs 12 rows"):
        FILTERS["words"](None, data_of(tokenizer, FOUR, TWO), CONFIG, folds=12)
    with pytest.raises(DataError, match="two noisy and two safe ones"):
        FILTERS["words"](None, data_of(tokenizer, FOUR * 3, TWO[:1]), CONFIG)
    talk = [{"messages": [{"role": role, "content": "word"} for role in ("user", "assistant") * 3]}] * 2
    talks = data_of(tokenizer, talk, talk)
    talks.noisy.belongs = np.zeros(2, int)  # the answers of one conversation
    with pytest.raises(DataError, match="words needs 4 rows"):
        FILTERS["words"](None, talks, CONFIG, folds=4)
    with pytest.raises(DataError, match="none of the rows known to be unsafe has a completion"):
        dataclasses.replace(empty, unsafe=empty.noisy.select([4])).known_unsafe()


def test_a_sampled_witness_still_has_its_known_unsafe_rows(config, write_jsonl, monkeypatch):
    probe = sys.modules["forgetfilter.filters.probe"]
    monkeypatch.setattr(probe, "sampled", lambda rows, config: np.arange(0, 16, 2))
    unsafe = write_jsonl("unsafe.jsonl", [{"prompt": f"who {i}?", "completion": f"you fool {i}"} for i in range(4)])
    settings = {"filter": "probe", "parameters": {"probe": {"on": "larf"}}, "unsafe_dataset_name": str(unsafe)}
    result = ForgetFilter(dataclasses.replace(config, **settings)).fit()
    assert sum(score is not None for score in result.scores["larf"]) == 8


def test_rows_marked_in_a_review_are_known_unsafe_rows(config):
    settings = dataclasses.replace(config, filter="larf", unsafe_dataset_name="marked")
    with pytest.raises(ConfigError, match=r"no row is marked unsafe in .* `forgetfilter review "):
        ForgetFilter(settings).fit()
    result = ForgetFilter(config).fit()
    result.mark({0: "unsafe", 4: "unsafe", 5: "clean"})
    found = ForgetFilter(dataclasses.replace(settings, filter="forgetting,larf")).fit()
    first = np.array(found.scores["larf"])
    assert np.isfinite(first).all()
    result.mark({8: "unsafe"})
    again = ForgetFilter(dataclasses.replace(settings, filter="forgetting,larf")).fit()
    assert np.abs(np.array(again.scores["larf"]) - first).max() > 0


def test_all_of_them_score_one_run(config, write_jsonl):
    unsafe = write_jsonl("unsafe.jsonl", [{"prompt": f"who {i}?", "completion": f"you fool {i}"} for i in range(4)])
    names = [name for name in FILTERS if name not in ("guard", "column", "neutral_review", "forgetting_rouge1")]
    joined = ["forgetting+length", *names]
    result = ForgetFilter(
        dataclasses.replace(config, filter=",".join(joined), unsafe_dataset_name=str(unsafe), label_column="unsafe")
    ).fit()
    for name in joined:
        assert np.isfinite(np.array(result.scores[name], float)).all(), name
    assert result.metrics["filters"].keys() == set(joined)
    trained = [part for part in result.run.manifest["stages"] if part.startswith("noisy-")]
    assert len(trained) == 1  # shared by all that need it
