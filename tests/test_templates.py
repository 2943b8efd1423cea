"""Chat templates: rows are tokenised as a trainer tokenises them, whatever the template."""

import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import CHATML, make_tokenizer
from test_tokenization import LLAMA2, ZEPHYR, chat, learnt
from transformers import AutoTokenizer

from forgetfilter.data.formats import BESIDE, RowError
from forgetfilter.data.templates import PLAIN_TEMPLATE, ChatTemplate
from forgetfilter.data.tokenization import IGNORED, ChatTokenizer
from forgetfilter.data.turns import Turn, text_of
from forgetfilter.errors import ModelError
from forgetfilter.forgetting import ForgetFilter, finetune
from forgetfilter.m0 import M0
from forgetfilter.report.run_page import write_report

TEMPLATES = Path(str(importlib.util.find_spec("trl").origin)).parent / "chat_templates"
MARK = re.compile(r"<[|\uff5c/]?[A-Za-z][\w\u2581|\uff5c]*>|<[|\uff5c][^<>\s]+>|\[/?[A-Z]+\]")
"""What looks like a token of its own in a template."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "Times of high water.",
            "parameters": {
                "type": "object",
                "properties": {"port": {"type": "string", "description": "A port."}},
                "required": ["port"],
            },
        },
    }
]
CALL = [{"id": "abcdefghi", "type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}]


def user(text, **extra):
    return Turn("user", text, trained=False, extra=extra)


def answer(text, **extra):
    return Turn("assistant", text, trained=True, extra=extra)


def tool(text):
    return Turn("tool", text, trained=False, extra={"tool_call_id": "abcdefghi", "name": "tide"})


CASES = {
    "plain": [user("Is rain wet?"), answer("Quite wet.")],
    "several turns": [user("Is rain wet?"), answer("Quite wet."), user("And snow?"), answer("Cold too.")],
    "system": [Turn("system", "Be brief.", trained=False), user("Is rain wet?"), answer("Quite wet.")],
    "think": [user("2+2?"), answer("<think>\nTwo and two.\n</think>\n\nFour.")],
    "think, several turns": [
        user("2+2?"),
        answer("<think>\nTwo and two.\n</think>\n\nFour."),
        user("3+3?"),
        answer("<think>\nThree.\n</think>\n\nSix."),
    ],
    "reasoning": [user("2+2?"), answer("Four.", reasoning_content="Two and two.")],
    "assistant first": [answer("Hello there."), user("Time?"), answer("Noon.")],
    "two answers in a row": [user("Hi"), answer("Hello."), answer("Still here?"), user("Yes"), answer("Good.")],
    "tool call": [user("High water?", tools=TOOLS), answer("", tool_calls=CALL)],
    "tool": [
        user("High water?", tools=TOOLS),
        answer("", tool_calls=CALL),
        tool("06:12"),
        answer("At six."),
        user("Thanks"),
        answer("Welcome."),
    ],
    "told not to think": [
        user("2+2?", chat_template_kwargs={"enable_thinking": False, "preserve_thinking": True}),
        answer("Four.", reasoning_content="Two and two."),
        user("And 3?"),
        answer("Seven."),
    ],
    "tool call as text": [user("High water?"), answer('<tool_call>\n{"name": "tide"}\n</tool_call>')],
}


def tokenizer_for(template, *, tokens):
    """A tokenizer with a template, and the template's marks as tokens of their own or as text."""
    found = list(dict.fromkeys(MARK.findall(template)))
    end = next((mark for mark in found if re.search(r"end|eot|eos", mark)), "</s>")
    return make_tokenizer(template, ["<s>", end, *[mark for mark in found if mark not in ("<s>", end)][: 99 * tokens]])


def asked(turns, *, in_parts=False):
    """The messages, tools and settings of a row, as `apply_chat_template` takes them."""
    messages = []
    for turn in turns:
        content = [{"type": "text", "text": turn.content}] if in_parts else turn.content
        extra = {key: value for key, value in turn.extra.items() if key not in BESIDE}
        messages.append({"role": turn.role, "content": content, **extra})
    settings = turns[0].extra.get("chat_template_kwargs", {})
    return {"conversation": messages, "tools": turns[0].extra.get("tools"), **settings}


def trainers(tokenizer, turns, *, in_parts=False):
    """What a trainer makes of a row: ids, and where the template says so also which of them the model writes."""
    marked = "endgeneration" in tokenizer.chat_template
    found = tokenizer.apply_chat_template(
        **asked(turns, in_parts=in_parts), return_dict=True, return_assistant_tokens_mask=marked
    )
    return found["input_ids"], found["assistant_masks"] if marked else None


def shows_text(tokenizer):
    try:
        return "Quite wet." in tokenizer.apply_chat_template(
            [{"role": "user", "content": "Quite wet."}], tokenize=False
        )
    except Exception:
        return False


@pytest.mark.parametrize("tokens", [True, False], ids=["marks are tokens", "marks are text"])
def test_rows_are_those_of_a_trainer_for_all_chat_templates_of_trl(tokens):
    covered, marked, compared = 0, 0, 0
    for path in sorted(TEMPLATES.glob("*.jinja")):
        tokenizer = tokenizer_for(path.read_text(encoding="utf-8"), tokens=tokens)
        encoder = ChatTokenizer(tokenizer, 100_000)
        in_parts = not shows_text(tokenizer)
        twin = path.with_stem(f"{path.stem}_training")
        for name, turns in CASES.items():
            try:
                ids, mask = trainers(tokenizer, turns, in_parts=in_parts)
            except Exception:  # the template takes no such rows
                continue
            where = f"{path.stem}, {name}"
            example = encoder.encode(turns)
            assert example.input_ids == ids, where
            learns = [int(label != IGNORED) for label in example.labels]
            covered += 1
            if mask is not None:
                marked += 1
                assert learns == mask, where
                continue
            check_answers(tokenizer, example, turns, where, shows_calls=encoder.template.shows_calls)
            if twin.exists() and "tool" not in name:
                compared += check_twin(tokenizer, twin, turns, ids, learns, where, in_parts=in_parts)
    assert covered >= 650
    assert marked >= 300
    assert compared >= 150


@pytest.mark.parametrize("name", ["chat_template", "continue_final_message", "tokenize"])
def test_a_row_may_not_replace_the_template_or_what_is_made_with_it(tokenizer, name):
    encoder = ChatTokenizer(tokenizer, 100)
    with pytest.raises(RowError, match=f"may not set '{name}'"):
        encoder.encode([user("q", chat_template_kwargs={name: "x"}), answer("a")])


def check_answers(tokenizer, example, turns, where, *, shows_calls):
    """All answers and calls that the template shows are learnt to their end, and nothing of any other message."""
    taught, whole = "\n".join(learnt(tokenizer, example)), tokenizer.decode(example.input_ids)
    for turn in turns:
        said = turn.content.rpartition("\n\n")[2]
        if turn.trained and said in whole:
            assert said in taught, where
        elif not turn.trained:
            assert said not in taught, where
        if turn.trained and turn.extra.get("tool_calls") and shows_calls:
            assert CALL[0]["function"]["name"] in taught, where
    assert example.labels[-1] != IGNORED or not tokenizer.decode(example.input_ids).rstrip()[-1].isalpha(), where


def check_twin(tokenizer, twin, turns, ids, learns, where, *, in_parts):
    """Where the template's variant for training renders the same text, the model writes the same of it.

    But for what the generation prompt gives it, and white space after the end.
    """
    template = tokenizer.chat_template
    prompts = [asked(turns[:number], in_parts=in_parts) for number, turn in enumerate(turns) if turn.trained and number]
    given = [tokenizer.apply_chat_template(**prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    tokenizer.chat_template = twin.read_text(encoding="utf-8")
    try:
        other, mask = trainers(tokenizer, turns, in_parts=in_parts)
    finally:
        tokenizer.chat_template = template
    if other != ids:
        return 0
    assert all(mine <= theirs for mine, theirs in zip(learns, mask, strict=True)), where
    less = [theirs - mine for mine, theirs in zip(learns, mask, strict=True)]
    for differs, stretch in itertools.groupby(zip(less, ids, strict=True), key=lambda pair: pair[0]):
        if differs:
            text = tokenizer.decode([token for _, token in stretch]).strip()
            assert not text or any(text in prompt[-40:] for prompt in given), where
    return 1


def with_tokens(template=CHATML, *tokens, special=False):
    from transformers import AddedToken

    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("said", ["<think>\nhm\n</think>\n\n4", "<tool_call>\n{}\n</tool_call>", "x<tool_call>Brest"])
def test_added_tokens_in_answers_are_those_of_a_trainer_and_stay_text_in_other_messages(said, special):
    added = ("<think>", "</think>", "<tool_call>", "</tool_call>", "Brest")
    tokenizer = with_tokens(CHATML, *added, special=special)
    encoder, ids = ChatTokenizer(tokenizer, 1000), tokenizer.convert_tokens_to_ids(list(added))
    turns = [user("2+2?"), answer(said)]
    example = encoder.encode(turns)
    assert example.input_ids == trainers(tokenizer, turns)[0]
    assert sum(label in ids for label in example.labels) == sum(said.count(token) for token in added) > 0
    assert not example.spelt_specials
    for role in ("system", "user", "tool"):
        hostile = [user("q"), answer("a"), Turn(role, said, trained=False), answer("4")]
        example = encoder.encode(hostile)
        assert not set(ids) & set(example.input_ids)
        assert example.spelt_specials
        assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(**asked(hostile), tokenize=False)


def test_tokens_that_part_turns_or_begin_end_or_pad_a_text_stay_text_in_answers(tokenizer):
    from transformers import AddedToken

    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", "<|end|>"), ("<|begin|>", "<|over|>", "<|end|>"))
    tokenizer.add_special_tokens({"pad_token": AddedToken("<|pad|>", special=True)})
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=False)])
    encoder = ChatTokenizer(tokenizer, 1000)
    plain = encoder.encode(chat("q", "a")).input_ids
    for spelt in ("<|begin|>", "<|over|>", "<|pad|>", "<|end|>", "<|im_start|>"):
        example = encoder.encode(chat("q", f"a{spelt}b"))
        token = tokenizer.convert_tokens_to_ids(spelt)
        assert example.input_ids.count(token) == plain.count(token)
        assert example.spelt_specials
        assert learnt(tokenizer, example) == [f"a{spelt}b<|end|>"]


def test_tool_calls_and_tools_keep_to_the_same_rule():
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}<call>{{ c | tojson }}{% endfor %}"
    ).replace("{% for m", "{{ tools | tojson if tools else '' }}{% for m", 1)
    tokenizer = with_tokens(template, "<call>")
    call, end = tokenizer.convert_tokens_to_ids("<call>"), tokenizer.eos_token_id
    calls = [{"name": "x", "arguments": {"text": "<|im_end|>"}}]
    encoder = ChatTokenizer(tokenizer, 1000)
    example = encoder.encode([user("q", tools=[{"name": "<|im_end|><call>"}]), answer("", tool_calls=calls)])
    assert (example.input_ids.count(call), example.input_ids.count(end)) == (1, 2)
    (taught,) = learnt(tokenizer, example)
    assert taught.startswith("<call>{")
    assert taught.endswith("}<|im_end|>")
    deep = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RowError, match="nested too deeply"):
        encoder.encode([user("q"), answer("", tool_calls=deep)])


@pytest.mark.parametrize(
    ("shown", "written"),
    [
        ("{{ c['function']['arguments'] | tojson }}", '{"at": "Brest"}'),
        ("{{ '`' + c['function']['arguments'] + '`' }}", '`{"at":"Brest"}`'),
        ("{{ c.function.arguments }}", '{"at":"Brest"}'),
        (
            "{% set f = c.function %}"
            "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}",
            '{"at":"Brest"}',
        ),
    ],
    ids=["parsed", "joined to texts", "shown as it is", "text as it is"],
)
def test_arguments_are_text_where_the_template_takes_text(shown, written):
    calls = "{% for c in m['tool_calls'] or [] %}" + shown + "{% endfor %}"
    tokenizer = with_tokens(CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls), "<call>")
    function = {"name": "tide", "arguments": '{"at":"Brest"}'}
    turns = [user("q"), answer("", tool_calls=[{"type": "function", "function": function}])]
    (taught,) = learnt(tokenizer, ChatTokenizer(tokenizer, 1000).encode(turns))
    assert taught == written + "<|im_end|>"


@pytest.mark.parametrize("is_call", [True, False])
def test_what_is_spelt_in_escapes_of_a_call_changes_no_roles(is_call):
    calls = "{% for c in m['tool_calls'] or [] %}<call>{{ c | tojson }}{% endfor %}"
    tokenizer = with_tokens(CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls), "<call>")
    spelt = '{"q": "\\u003c|im_end|\\u003e\\n\\u003c|im_start|\\u003euser"}'
    called = Turn("assistant", f'{{"name": "f", "arguments": {spelt}}}', trained=True, is_call=True)
    if not is_call:
        called = answer("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": spelt}}])
    example = ChatTokenizer(tokenizer, 1000).encode([user("q"), called])
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (example.input_ids.count(start), example.input_ids.count(end)) == (2, 2)
    assert example.spelt_specials


@pytest.mark.parametrize("call", [{"function": "my_function", "arguments": "{}"}, {"function": 3}, {"name": "f"}, {}])
def test_calls_of_another_shape_end_nothing(call):
    calls = "{% for c in m['tool_calls'] or [] %}<call>{{ c | tojson }}{% endfor %}"
    tokenizer = with_tokens(CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls), "<call>")
    turns = [user("q"), answer("", tool_calls=[call])]
    assert ChatTokenizer(tokenizer, 1000).encode(turns).scorable
    assert text_of(turns[1])


def test_a_call_of_sharegpt_is_one_where_the_template_shows_calls_and_text_elsewhere():
    text = '{"name": "tide", "arguments": {"at": "Brest"}}'
    turns = [user("q"), Turn("assistant", text, trained=True, is_call=True)]
    calls = "{% for c in m['tool_calls'] or [] %}<call>{{ c.function.name }}{% endfor %}"
    for template, written in ((CHATML, text), (CHATML.replace("{{ m['content'] }}", calls), "<call>tide")):
        tokenizer = with_tokens(template, "<call>")
        (taught,) = learnt(tokenizer, ChatTokenizer(tokenizer, 1000).encode(turns))
        assert taught == written + "<|im_end|>"


@pytest.mark.parametrize("private", ["\U000f0000", "\U000f0001\U000f0002", "\U0010fffd", "\ue000"])
def test_characters_without_a_meaning_stay_what_they_are(tokenizer, private):
    hostile = chat(f"{private}<|im_end|>{private}", f"{private}<|im_start|>")
    example = ChatTokenizer(tokenizer, 1000).encode(hostile)
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(**asked(hostile), tokenize=False)
    assert example.input_ids.count(tokenizer.eos_token_id) == 2


def test_what_a_template_does_to_a_message_does_not_make_tokens_of_it():
    """It trims the question, drops the thoughts of earlier answers, and repeats the first question, changed."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ (m['content'].split('</think>')[-1] if not loop.last "
        "else m['content']) | trim }}<|im_end|>\n{% endfor %}{{ messages[0]['content'] | replace('why', 'so') }}"
    )
    tokenizer = with_tokens(template, "<think>", "</think>", "<X>")
    turns = chat("  <|im_end|> why <X> ", "<think>hm<|im_end|></think>so", "and?", "<think>well</think>yes <X>")
    example = ChatTokenizer(tokenizer, 1000).encode(turns)
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(**asked(turns), tokenize=False)
    assert learnt(tokenizer, example) == ["so<|im_end|>", "<think>well</think>yes <X><|im_end|>"]
    counts = [example.input_ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<X>", "<think>")]
    assert (*counts, example.input_ids.count(tokenizer.eos_token_id)) == (1, 1, 4)


def test_answers_behind_the_cut_of_a_long_row_are_not_looked_for(monkeypatch):
    calls = "{% for c in m['tool_calls'] or [] %}<call>{{ c.function.name }}{% endfor %}"
    tokenizer = with_tokens(CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls), "<call>")
    call = [{"type": "function", "function": {"name": "tide", "arguments": {}}}]
    turns = [turn for number in range(50) for turn in (user(f"{number}?"), answer("", tool_calls=call))]
    whole, short = ChatTokenizer(tokenizer, 10**6).encode(turns), ChatTokenizer(tokenizer, 60)
    written, write = [], ChatTemplate.write
    monkeypatch.setattr(ChatTemplate, "write", lambda *args, **more: written.append(1) or write(*args, **more))
    example = short.encode(turns)
    assert (example.input_ids, example.labels) == (whole.input_ids[:60], whole.labels[:60])
    assert (example.cut, example.prompt_length) == (True, 60)
    assert len(written) < 40


def test_an_answer_begins_where_the_row_parts_from_the_generation_prompt():
    """As of the templates that make a model think: the prompt opens thoughts that the answer has not."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    for tokenizer in (make_tokenizer(template), with_tokens(template, "<think>", "</think>")):
        encoder = ChatTokenizer(tokenizer, 1000)
        assert learnt(tokenizer, encoder.encode(chat("hi", "yo"))) == ["yo<|im_end|>"]
        assert learnt(tokenizer, encoder.encode(chat("hi", "<thinly>"))) == ["<thinly><|im_end|>"]
        thought = encoder.encode(chat("hi", "<think>\nhm</think>\nyo"))
        assert learnt(tokenizer, thought) == ["hm</think>\nyo<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, ZEPHYR, None])
def test_a_conversation_may_begin_with_an_answer(template):
    tokenizer = make_tokenizer(template)
    example = ChatTokenizer(tokenizer, 1000).encode([answer("Hello."), user("Time?"), answer("Noon.")])
    first, second = learnt(tokenizer, example)
    assert (first.strip(" \n")[:6], second.strip(" \n")[:5]) == ("Hello.", "Noon.")
    assert tokenizer.decode(example.input_ids[example.prompt_length :]).strip(" \n").startswith("Noon.")


def test_answers_that_are_not_trained_are_told_from_those_that_are(tokenizer):
    marked = CHATML.replace(
        "{{ m['content'] }}<|im_end|>",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}",
    )
    for template in (CHATML, LLAMA2, marked):
        tokenizer = make_tokenizer(template)
        turns = [*chat("q", "one", trained=False), *chat("q", "two"), *chat("q", "three", trained=False)]
        (taught,) = learnt(tokenizer, ChatTokenizer(tokenizer, 1000).encode(turns))
        assert "two" in taught
        assert "one" not in taught
        assert "three" not in taught


def test_an_answer_that_a_template_does_not_mark_is_not_learnt():
    """As TRL's trainers: a template's marks say what is learnt. This one marks no answer that begins with a bracket."""
    marked = CHATML.replace(
        "{{ m['content'] }}<|im_end|>",
        "{% if m['role'] == 'assistant' and m['content'][0] != '[' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
    )
    tokenizer = make_tokenizer(marked)
    example = ChatTokenizer(tokenizer, 1000).encode(chat("q", "one", "q", "[call]"))
    (taught,) = learnt(tokenizer, example)
    assert "one" in taught
    assert tokenizer.decode(example.input_ids[example.prompt_length :]).startswith("one")


def test_a_template_that_ends_no_turn_is_named_and_nothing_is_added(capsys):
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    turns = chat("hi", "one", "more", "two")
    example = ChatTokenizer(tokenizer, 1000).encode(turns)
    assert example.input_ids == trainers(tokenizer, turns)[0]
    assert learnt(tokenizer, example) == ["one", "two"]
    assert "the chat template ends no turn" in capsys.readouterr().out


def test_tokenizers_that_do_not_tell_places_give_the_same_rows():
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        vocab_size = 128

        def get_vocab(self):
            return {**{chr(code): code for code in range(128)}, **self._added_tokens_encoder}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, index):
            return chr(index)

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    tokenizer = Letters(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    encoder = ChatTokenizer(tokenizer, 1000)
    turns = chat("hi", "one", "more", "two")
    example = encoder.encode(turns)
    assert example.input_ids == trainers(tokenizer, turns)[0]
    assert learnt(tokenizer, example) == ["one<|im_end|>", "two<|im_end|>"]
    hostile = encoder.encode(chat("hi<|im_end|>", "one"))
    assert hostile.input_ids.count(tokenizer.eos_token_id) == 2


@pytest.fixture
def bare_model(tiny_model, tmp_path):
    """The tiny model without its chat template."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_template_made_up_is_said_everywhere_and_goes_with_the_final_model(config, bare_model, capsys):
    config = dataclasses.replace(config, model_name_or_path=str(bare_model), filter="length", threshold=1e9)
    run = ForgetFilter(config).fit().run
    words = "made up, as the model has none"
    assert words in capsys.readouterr().out
    assert words in (run.folder / "README.md").read_text(encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert words in page
    assert "--chat_template_path" in page
    model = finetune(run)
    assert words in (model / "README.md").read_text(encoding="utf-8")
    kept = AutoTokenizer.from_pretrained(model)
    assert kept.chat_template == PLAIN_TEMPLATE
    assert kept.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_a_template_in_chat_template_json_is_read(config, bare_model, capsys):
    (bare_model / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}), encoding="utf-8")
    m0 = M0.named(dataclasses.replace(config, model_name_or_path=str(bare_model)))
    assert m0.tokenizer.chat_template == CHATML
    assert m0.template_note() == "from chat_template.json"
    assert "made up" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"', '{"chat_template": null}'])
def test_a_chat_template_json_that_holds_none_is_one_clear_error(config, bare_model, text):
    (bare_model / "chat_template.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"chat_template\.json: holds no chat template"):
        M0.named(dataclasses.replace(config, model_name_or_path=str(bare_model)))


def test_a_model_with_a_template_of_its_own_needs_no_word(config):
    assert M0.named(config).template_note() is None
