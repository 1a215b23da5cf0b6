"""Chat templates: ids as transformers has them, loss on the assistant's turns, text of special tokens, end tokens."""

import json
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from bucket import install
from small_runs import common
from test_tokenizer import FAMILIES
from tokenizers import AddedToken

from instructgpt_jax import run_tokenizer
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import chats, encoding, packing, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.stages import reward_start

TEMPLATES = pathlib.Path(__file__).parent / "templates"  # each says which checkpoint it is of
CONTROLS = {  # tokens that each template means, and the one that ends a turn
    "chatml": (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": (("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": (("<s>", "</s>"), "</s>"),
    "zephyr": (("<s>", "</s>"), "</s>"),
    "human_assistant": ((), ""),
}
SAID = [
    ("user", "The red fox: where is it?"), ("assistant", "Near the old river.\nIt sees 3 hens."),
    ("user", "And the hen?"), ("assistant", "It sees naïve foxes, 雪 and all."),
    ("user", "  Why?  \n"), ("assistant", "Because."),
]  # fmt: skip
DIALOGUE = [{"role": role, "content": content} for role, content in SAID]
ALL = encoding.Allowed(max_prompt_tokens=0, skip_bad=0)


def checkpoint(folder, template, family="byte-level"):
    """A tokenizer that brings a template and its control tokens, as a published checkpoint does."""
    made = FAMILIES[family][0](folder).pretrained(pad=False)
    controls, end = CONTROLS[template]
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in controls])
    if "<|begin_of_text|>" in controls:
        made.bos_token = "<|begin_of_text|>"
    elif "<s>" in controls:
        made.bos_token = "<s>"
    if end:
        made.eos_token = end
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    made.save_pretrained(folder)
    return folder


def loaded(folder, template="chat", end_tokens=()):
    return tokenizers.load(folder, chats.Chat(template, end_tokens))


@pytest.fixture(scope="module", params=[(name, "byte-level") for name in CONTROLS] + [("mistral", "metaspace"),
                                        ("zephyr", "prepended"), ("chatml", "metaspace"),
                                        ("human_assistant", "metaspace")],
                ids="-".join)  # fmt: skip
def pair(request, tmp_path_factory):
    """Ours and the tokenizer of transformers, with one template."""
    template, family = request.param
    folder = checkpoint(tmp_path_factory.mktemp("chat"), template, family)
    ours = loaded(folder, "human_assistant" if template == "human_assistant" else "chat")
    return ours, transformers.AutoTokenizer.from_pretrained(folder), template


def theirs_of(theirs, messages, prompted):
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=prompted)


# Ids ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(1, 7))
def test_ids_are_those_of_apply_chat_template(pair, turns):
    ours, theirs, template = pair
    messages = DIALOGUE[:turns]
    if template == "human_assistant":  # our own strips what stands before words
        messages = [message | {"content": message["content"].lstrip()} for message in messages]
    if turns % 2:
        found = ours.encode_prompts([ours.prompt(messages)])[0]
        start = list(ours.start) if template == "human_assistant" else []
        assert found.tolist() == start + theirs_of(theirs, messages, True)
        assert found.dtype == np.int32
    else:
        rendered = ours.chat.dialogue(messages)
        (found, loss), expected = ours.encode_dialogues([rendered])[0], theirs_of(theirs, messages, False)
        assert rendered.text == theirs.apply_chat_template(messages, tokenize=False)
        if template == "human_assistant":
            expected = [*ours.start, *expected, ours.eos_id]  # the form has no end token, and a response needs one
        assert found.tolist() == expected[: len(found)] and found[-1] == ours.end_id and loss[-1]
        assert not ours.decode(np.array(expected[len(found) :], np.int32)).strip()  # a line's end at most


def test_the_loss_is_on_what_the_assistant_says_and_its_end(tmp_path):
    """Token by token, by hand."""
    ours = loaded(checkpoint(tmp_path, "chatml"))
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "cd"},
             {"role": "user", "content": "e"}, {"role": "assistant", "content": "f\n"}]  # fmt: skip
    ((ids, loss),) = ours.encode_dialogues([ours.chat.dialogue(turns)])
    assert [(ours.decode([i]), bool(on)) for i, on in zip(ids, loss, strict=True)] == [
        ("<|im_start|>", False), *((letter, False) for letter in "system\nBe brief."), ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False), *((part, False) for part in ("u", "s", "er", *"\na b")), ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False), *((letter, False) for letter in "assistant\n"),
        ("c", True), ("d", True), ("<|im_end|>", True), ("\n", False),
        ("<|im_start|>", False), *((part, False) for part in ("u", "s", "er", *"\ne")), ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False), *((letter, False) for letter in "assistant\n"),
        ("f", True), ("\n", True), ("<|im_end|>", True),
    ]  # fmt: skip


def test_the_end_of_a_last_turn_is_written_where_the_template_has_none(tmp_path):
    ours = loaded(checkpoint(tmp_path, "human_assistant"), "human_assistant")
    ((ids, loss),) = ours.encode_dialogues([ours.chat.dialogue(DIALOGUE[:4])])
    assert ours.decode(ids[loss]) == f" {SAID[1][1]} {SAID[3][1]}{tokenizers.EOS}" and ids[-1] == ours.end_id
    assert (ids == ours.end_id).sum() == 1


def records_of(kind, found, folder):
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    return sources.load((f"jsonl:{folder}/{kind}.jsonl",), kind, 0)


def encoded(ours, kind, found, folder):
    """What training reads of some records."""
    options = {
        "demonstrations": dict(row_length=900, loss_on_prompt=False),
        "comparisons": dict(row_length=900, process_rows=9, max_completions=3, shared_prompt=True),
        "prompts": dict(max_prompt_length=900),
    }[kind]
    return getattr(encoding, kind)(records_of(kind, found, folder), ours, ALL, **options).examples


def test_every_kind_of_record(pair, tmp_path):
    """A question and its answer are the same tokens in each, as prompt or as messages, and as apply_chat_template has
    them; a demonstration begins with the prompt that PPO answers, and goes on with the completion that is scored."""
    ours, theirs, template = pair
    question, said = SAID[0][1], SAID[1][1]
    asked = {"messages": DIALOGUE[:1]}
    ranked = {"completions": [said, "No."], "ranking": [1, 2]}
    (prompt, plain) = encoded(ours, "prompts", [asked, {"prompt": question}], tmp_path)
    one, two, whole = encoded(
        ours, "demonstrations",
        [asked | {"completion": said}, {"prompt": question, "completion": said}, {"messages": DIALOGUE[:2]}], tmp_path,
    )  # fmt: skip
    (first, second) = encoded(ours, "comparisons", [asked | ranked, {"prompt": question} | ranked], tmp_path)
    for other in (plain, first.prompt, second.prompt):
        np.testing.assert_array_equal(prompt, other)
    np.testing.assert_array_equal(one.tokens, np.concatenate([prompt, first.completions[0]]))
    for example in (two, whole):
        np.testing.assert_array_equal(one.tokens, example.tokens)
        np.testing.assert_array_equal(one.loss, example.loss)
    assert one.loss_from == len(prompt) and first.completions[0][-1] == first.completions[1][-1] == ours.end_id
    if template != "human_assistant":
        assert one.tokens.tolist() == theirs_of(theirs, DIALOGUE[:2], False)[: len(one.tokens)]
    text, ended = ours.text_of(first.completions[0])
    assert ended and text == said and ours.text_of(first.completions[0][:-1]) == (said, False)


def test_several_turns_are_packed_with_their_loss(tmp_path):
    ours = loaded(checkpoint(tmp_path, "zephyr"))
    (dialogue,) = encoded(ours, "demonstrations", [{"messages": DIALOGUE}], tmp_path)
    batch = packing.pack_examples([dialogue._replace(kind=2), packing.Example(np.arange(1, 6), 3)], 900, 2, 1)
    row = batch["loss_mask"][0, 0]
    np.testing.assert_array_equal(row[: len(dialogue.tokens)], dialogue.loss * 2)
    np.testing.assert_array_equal(row[len(dialogue.tokens) :][:6], [0, 0, 0, 1, 1, 0])
    learnt = [ours.decode(part) for part in np.split(dialogue.tokens, np.flatnonzero(np.diff(dialogue.loss)) + 1)[1::2]]
    assert learnt == [f"{content}</s>" for role, content in SAID if role == "assistant"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_would_merge_with_its_prompt_is_encoded_as_it_is_sampled(family, tmp_path):
    """PPO's prompt ends where it ends: an answer cannot take its last letters back."""
    folder = checkpoint(tmp_path, "human_assistant", family)
    (folder / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    ours = loaded(folder, str(folder / "bare.jinja"))
    asked, said = "The re", "d fox and </s>" if "</s>" in ours.vocabulary() else "d fox"
    (whole,) = ours.encode_prompts([ours.prompt(asked + said)])
    prompt, answer = ours.encode_prompts([ours.prompt(asked)])[0], ours.encode([ours.answer(asked, said)])[0]
    assert len(prompt) + len(answer) > len(whole)  # "red" is one token
    names = {i: token for token, i in ours.vocabulary().items()}
    assert names[int(answer[0])].startswith("d") and ours.eos_id not in answer
    assert ours.decode(np.concatenate([prompt, answer])) == asked + said


def test_the_token_that_ends_a_completion_starts_as_its_twin(tmp_path):
    ours = loaded(checkpoint(tmp_path, "llama3"), "", ("<|start_header_id|>",))
    table = np.arange(2.0 * ours.vocab_size).reshape(-1, 2)
    network = types.SimpleNamespace(load=lambda: {"embed": {"tokens": jnp.array(table)}}, grown=True)
    config = common.config("reward")
    config.reward = {"eos_init": ".", "head_examples": 0}
    config.models.model = common.network(init_from="x")
    made = reward_start.params(config, network, types.SimpleNamespace(tokenizer=ours), None)["embed"]["tokens"]
    assert ours.end_id != ours.eos_id
    table[ours.end_id] = table[ours.encode(["."])[0][0]]
    np.testing.assert_array_equal(made, table)


# Text of special tokens -----------------------------------------------------------------------------------------------


def test_a_special_token_in_a_message_is_text(pair, tmp_path):
    ours, theirs, template = pair
    controls = CONTROLS[template][0] or [theirs.eos_token]
    held = " ".join(f"The {text} is{text} here{text}{text}" for text in controls)
    turns = [{"role": "user", "content": held}, {"role": "assistant", "content": held + "."}, DIALOGUE[2]]
    count = [sum(i in {theirs.convert_tokens_to_ids(text) for text in controls} for i in ids)
             for ids in (ours.encode_prompts([ours.prompt(turns)])[0],
                         ours.encode_prompts([ours.prompt(DIALOGUE[:3])])[0])]  # fmt: skip
    assert count[0] == count[1]
    rendered = ours.prompt(turns)
    spaces = {ord(" "): None}  # some tokenizers write one behind each special token
    ids = ours.encode([rendered])[0]  # without BOS, where the form has none
    assert ours.decode(ids).translate(spaces) == rendered.text.translate(spaces)
    (example,) = encoded(ours, "demonstrations", [{"messages": turns[:2]}], tmp_path)
    assert ours.decode(example.tokens[example.loss]).strip().startswith(held) and example.tokens[-1] == ours.end_id
    assert example.tokens[example.loss].tolist().count(ours.end_id) == 1
    # What is beside it is as it was: the words before and behind are encoded as in a text of their own.
    words = ours.encode_prompts([ours.prompt(DIALOGUE[:1])])[0].tolist()
    more = [DIALOGUE[0] | {"content": SAID[0][1] + controls[0]}]
    assert ours.encode_prompts([ours.prompt(more)])[0].tolist()[:12] == words[:12]


def test_an_end_token_that_the_file_calls_ordinary_ends_no_message(tmp_path):
    made = FAMILIES["byte-level"][0](tmp_path).pretrained(pad=False)
    made.add_tokens([AddedToken(text, special=False) for text in CONTROLS["chatml"][0]])
    made.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    made.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>c"}]
    ((ids, loss),) = ours.encode_dialogues([ours.chat.dialogue(turns)])
    assert ours.decode(ids[loss]) == "b<|im_end|>c<|im_end|>" and (ids[loss] == ours.end_id).sum() == 1


# What is refused ------------------------------------------------------------------------------------------------------

QWEN3 = """{# The assistant's thoughts of earlier turns are left out, as Qwen/Qwen3-0.6B does it. #}
{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 < ns.last -%}
{{- m.content.split('</think>')[-1].lstrip('\n') -}}
{%- else -%}{{- m.content -}}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


MOOD = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.mood + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}


@pytest.mark.parametrize(
    "template, kind, messages, complaint",
    [
        ("mistral", "prompts", [{"role": "tool", "content": "x"}],
         "config.data.template refuses the messages (Conversation roles must alternate"),
        ("human_assistant", "prompts", [{"role": "tool", "content": "x"}],
         "config.data.template refuses the messages (roles must be user and assistant"),
        (MOOD, "prompts", [{"role": "user", "content": "x"}],
         "config.data.template refuses the messages ('dict object' has no attribute 'mood')"),
        (QWEN3, "demonstrations", [DIALOGUE[0], THOUGHT, *DIALOGUE[2:4]],
         "config.data.template must write a dialogue alike when later turns follow, got '"),
        ("", "prompts", DIALOGUE[:1], "messages need a chat template"),
        ("chatml", "demonstrations", DIALOGUE[:3], "messages must end with the assistant's turn"),
        ("chatml", "demonstrations", [DIALOGUE[0], THOUGHT | {"content": ""}], "messages[1] must have a role, and as"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_with_its_record(template, kind, messages, complaint, tmp_path):
    folder = checkpoint(tmp_path, template if template in CONTROLS else "chatml")
    good = {"messages": [DIALOGUE[0] | {"mood": "glad"}]} if template else {"prompt": "x"}
    if template in (MOOD, QWEN3):
        (tmp_path / "own.jinja").write_text(template)
        template = str(tmp_path / "own.jinja")
    ours = loaded(folder, "chat" if template in ("mistral", "chatml") else template)
    made = [good | ({"completion": "Yes."} if kind == "demonstrations" else {}), {"messages": messages}]
    with pytest.raises(ValueError) as error:
        encoded(ours, kind, made, tmp_path)
    summary, line = str(error.value).splitlines()
    assert summary.startswith("1 bad record, config.data.skip_bad allows 0")
    assert line.startswith(f"  {tmp_path}/{kind}.jsonl:2: {complaint}")
    if THOUGHT in messages:  # with the two renderings
        assert "<think>" in line and ", then '" in line


def test_thoughts_that_are_left_out_later_can_be_learnt_turn_by_turn(tmp_path):
    folder = checkpoint(tmp_path, "chatml")
    (folder / "own.jinja").write_text(QWEN3)
    ours = loaded(folder, str(folder / "own.jinja"))
    turns = [DIALOGUE[0], THOUGHT, DIALOGUE[2]]
    last, alone = encoded(
        ours, "demonstrations", [{"messages": turns, "completion": "No."}, {"messages": turns[:2]}], tmp_path
    )
    assert "<think>" not in ours.decode(last.tokens) and ours.decode(last.tokens[last.loss]) == "No.<|im_end|>"
    assert ours.decode(alone.tokens[alone.loss]) == THOUGHT["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("{% for m in messages %}", r"cannot write a question and its answer: .*(Unexpected end of template|endfor)"),
        ("{{ messages[0].content }}", "must write what the assistant said, got 'A question'"),
        ("{{ messages | length }}", "must write a dialogue alike when later turns follow, got '1'"),
        (None, "must be one of .* or the path of a Jinja file, got '.*none.jinja': No such file"),
    ],
)
def test_templates_that_are_none(template, complaint, tmp_path):
    checkpoint(tmp_path, "chatml")
    path = tmp_path / "none.jinja"
    if template is not None:
        path.write_text(template)
    with pytest.raises(ValueError, match=complaint) as error:
        loaded(tmp_path, str(path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_template_says_so(tmp_path):
    FAMILIES["byte-level"][0](tmp_path)
    with pytest.raises(ValueError, match="needs a tokenizer with a template of its own"):
        loaded(tmp_path)


# The form of hh-rlhf --------------------------------------------------------------------------------------------------


def test_a_prompt_in_the_form_of_hh_rlhf_stays_as_it_is(tmp_path):
    """Strings as Anthropic published them, the same as messages, and as they are read without a template."""
    folder = checkpoint(tmp_path, "human_assistant")
    ours, bare = loaded(folder, "human_assistant"), loaded(folder, "")
    system = {"role": "system", "content": "A talk."}
    prompt = "A talk.\n\nHuman: Where?\n\nAssistant: Here.\n\nHuman: When?\n\nAssistant:"
    messages = [system, *({"role": role, "content": content} for role, content in
                          (("user", "Where?"), ("assistant", "Here."), ("user", "When?")))]  # fmt: skip
    ranked = {"completions": [" Now.", " Late.", ""], "ranking": [1, 2, 3]}
    stripped = ranked | {"completions": ["Now.", "Late.", ""]}
    made = encoded(ours, "comparisons", [{"prompt": prompt} | ranked, {"prompt": prompt} | stripped,
                                         {"messages": messages} | ranked], tmp_path)  # fmt: skip
    made += encoded(bare, "comparisons", [{"prompt": prompt} | ranked], tmp_path)
    assert len({encoding.fingerprint([example]) for example in made}) == 1
    (single,) = ours.encode_prompts([ours.prompt("Where?")])
    assert ours.decode(single) == "\n\nHuman: Where?\n\nAssistant:"
    quoted = "What does \n\nHuman: mean?"
    assert ours.prompt(quoted).text == f"\n\nHuman: {quoted}\n\nAssistant:"


# Ends, and what a run keeps -------------------------------------------------------------------------------------------


def test_a_prompt_in_the_form_of_hh_rlhf_is_its_dialogue_under_another_template(tmp_path):
    ours = loaded(checkpoint(tmp_path, "chatml"))
    text = "\n\nHuman: Red?\n\nAssistant: A fox.\n\nHuman: Blue? Human: no\n\nAssistant:"
    said = [("user", "Red?"), ("assistant", "A fox."), ("user", "Blue? Human: no")]
    messages = [{"role": role, "content": content} for role, content in said]
    for prompt, answer in ((text, " A bird."), (messages, "A bird.")):
        asked = ours.encode_prompts([ours.prompt(prompt)])[0]
        found = ours.encode([ours.answer(prompt, answer)])[0]
        if prompt is text:
            expected = asked.tolist(), found.tolist()
    assert (asked.tolist(), found.tolist()) == expected
    assert ours.decode(found) == "A bird."


def test_the_end_tokens_are_those_of_the_checkpoint_the_template_and_the_user(tmp_path):
    folder = checkpoint(tmp_path, "llama3")
    plain = loaded(folder, "")
    ids = plain.vocabulary()
    eot, header = ids["<|eot_id|>"], ids["<|start_header_id|>"]
    assert plain.end_ids == (eot,) and plain.end_id == plain.eos_id == eot
    text = ids[tokenizers.EOS]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [text, eot, 10**6]}))
    several = loaded(folder, "")
    assert several.end_ids == (text, eot) and several.end_id == eot
    assert several.hash == plain.hash and several != plain  # texts are read alike, responses end otherwise
    named = loaded(folder, "", ("<|start_header_id|>",))
    assert named.end_ids == (header,) and named.end_id == header and named.hash != plain.hash
    assert named.eos_id == eot  # of a pretraining document
    two = loaded(folder, "", ("<|start_header_id|>", "<|begin_of_text|>"))
    two.save(tmp_path / "kept")
    again = tokenizers.load(tmp_path / "kept")
    assert (again.end_id, again.end_ids) == (two.end_id, two.end_ids) and again == two and two.end_id == header
    with_template = loaded(folder, "chat", (tokenizers.EOS,))
    assert with_template.end_ids == (text, eot) and with_template.end_id == eot
    assert with_template.hash not in (plain.hash, loaded(folder, "human_assistant").hash)
    with pytest.raises(ValueError, match=r"config.data.end_tokens must be tokens of the tokenizer, got \['<end>'\]"):
        loaded(folder, "", ("<end>",))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json must be a JSON object with eos_token_id"):
        loaded(folder, "")
    for ended in (text, eot):
        assert several.text_of(np.array([*several.encode(["fox"])[0], ended])) == ("fox", True)


def test_a_run_keeps_template_ends_and_day(tmp_path):
    folder = checkpoint(tmp_path / "own", "chatml")
    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m.content }}{{ '<|im_end|>' }}{% endfor %}"
    )
    config = common.config("sft")
    config.data.update({"tokenizer": str(folder), "template": str(tmp_path / "dated.jinja"),
                        "end_tokens": (tokenizers.EOS,)})  # fmt: skip
    first = run_tokenizer.settled(config, tmp_path / "sft")
    (tmp_path / "dated.jinja").unlink()  # a run that goes on does not need it
    ours = tokenizers.load(run_tokenizer.settled(config, tmp_path / "sft").data.tokenizer)
    kept = chats.kept(first.data.tokenizer)
    assert kept.template == "chat" and kept.day == chats.today()
    chats.keep(kept._replace(day="2020-02-09"), first.data.tokenizer)
    # The next stage names the template of the run that it starts from.
    config.data.update({"tokenizer": first.data.tokenizer, "template": "chat", "end_tokens": ()})
    again = tokenizers.load(run_tokenizer.settled(config, tmp_path / "ppo").data.tokenizer)
    assert again.end_ids == ours.end_ids == tuple(sorted(ours.vocabulary()[t] for t in (tokenizers.EOS, "<|im_end|>")))
    assert again.hash == ours.hash and again.prompt("Hi.").text == "09 Feb 2020: Hi.<|im_end|>"
    exported = again.pretrained(pad=False)
    assert exported.chat_template.startswith("{{ strftime_now(")
    config.data.template = ""
    assert tokenizers.load(run_tokenizer.settled(config, tmp_path / "plain").data.tokenizer).chat is None


def test_a_run_keeps_all_templates_of_a_tokenizer_that_has_several(tmp_path, monkeypatch):
    install(monkeypatch)
    made = transformers.AutoTokenizer.from_pretrained(checkpoint(tmp_path / "own", "chatml"))
    several = {"default": made.chat_template, "tool_use": "{{ messages }}"}
    made.chat_template = several
    made.save_pretrained(tmp_path / "several")
    config = common.config("sft")
    config.data.tokenizer = str(tmp_path / "several")
    for workdir in (str(tmp_path / "sft"), "gs://bucket/sft"):
        config.data.tokenizer = run_tokenizer.settled(config, workdir).data.tokenizer
        assert tokenizers.load(config.data.tokenizer).pretrained(pad=False).chat_template == several
    assert loaded(config.data.tokenizer).chat.jinja == several["default"]


def test_a_run_from_before_there_were_templates_goes_on_without_one():
    config = common.config("sft")
    stored = workdirs.as_json(config)
    for key in ("template", "end_tokens"):
        del stored["data"][key]
    assert workdirs.compare(stored, workdirs.as_json(config)) == []
    config.data.template = "chat"
    (line,) = workdirs.compare(stored, workdirs.as_json(config))
    assert line == "  data.template: '' in the workdir, 'chat' asked for"
