"""The simulated world is what it says: shares, mess, room for every stage, agreement of labelers, no cheap score."""

import collections
import hashlib
import json
import re
import statistics

import pytest

from instructgpt_jax import simulated
from instructgpt_jax.data import pii, prompts, schema, sources
from instructgpt_jax.labeling import kinds
from instructgpt_jax.simulated import instructions, labeling, tasks, world, writing
from instructgpt_jax.simulated.streams import finish

FLAWLESS = 6.8
CLOSED_USE_CASES = ("closed_qa", "extract", "summarization", "rewrite")


def make_prompts(use_case, layout, count):
    rng = world.rng_of("test", use_case, layout)
    return [finish(tasks.draw(rng, {use_case: 1}, layout)[1]) for _ in range(count)]


def demonstrate(prompt_list, seed=0):
    """One answer of a training labeler to each prompt."""
    people, rng = simulated.labelers("training"), world.rng_of("demonstrate", seed)
    return [
        simulated.write(prompt, rng, writing.draw_flaws(rng, people[i % len(people)].carelessness))
        for i, prompt in enumerate(prompt_list)
    ]


def mean_gold(prompt_list, texts):
    return statistics.fmean(simulated.gold_score(p, t) for p, t in zip(prompt_list, texts, strict=True))


# Records --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "prompt", "prompts:", "prompts:dev", "prompts:0", "prompts:-5", "prompts:10:train", "prompts:test:5:5"]
)
def test_unknown_names_list_the_valid_ones(name):
    with pytest.raises(ValueError, match=r"pretraining.*comparisons_heldout.*train, valid, test.*got"):
        simulated.records(name)


COLLECTIONS = ("flan", "t0")
FIELDS = {
    "pretraining": {"text"},
    "prompts": {"prompt", "user", "use_case"},
    "gpt_prompts": {"prompt", "user", "use_case"},
    "demonstrations": {"prompt", "completion", "user", "use_case", "source", "labeler"},
    "comparisons": {"prompt", "completions", "ranking", "user", "use_case", "labeler", "group"},
    "comparisons_heldout": {"prompt", "completions", "ranking", "user", "use_case", "labeler", "group"},
    "flan": {"prompt", "completion", "user", "dataset", "template", "source"},
    "t0": {"prompt", "completion", "user", "dataset", "template", "source"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_records_are_valid_and_hold_no_gold(name):
    kinds_of = {"gpt_prompts": "prompts", "comparisons_heldout": "comparisons"}
    kind = "demonstrations" if name in COLLECTIONS else kinds_of.get(name, name)
    for record in simulated.records(f"{name}:300"):
        schema.validate(record, kind)
        assert set(record) == FIELDS[name]
        assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_collection_has_closed_tasks_in_its_own_words_with_right_short_answers(name):
    records, sets = simulated.records(f"{name}:600"), instructions.SETS[name]
    assert {(record["dataset"], record["template"]) for record in records} == {
        (kind, str(i)) for kind, templates in sets.items() for i in range(len(templates))
    }
    assert not set(sets) & {"story", "describe", "list", "letter", "poem", "feel", "ask", "harm", "hello"}
    truth = {world.FACTS[relation][1].format(s=s): value for (s, relation), value in world.TRUTH.items()}
    people = simulated.records("prompts:2000")
    assert not {r["prompt"] for r in records} & {r["prompt"] for r in people}
    for record in records:
        prompt, answer = record["prompt"], record["completion"].strip()
        assert prompt.endswith("\n") or prompt.endswith(":") and record["completion"].startswith(" ")
        if record["dataset"] == "fact":
            (question,) = (question for question in truth if question in prompt)
            assert answer.lower() == truth[question].lower()
        elif record["dataset"] == "review":
            bad = any(word in prompt.replace("good or", "") for word in world.BAD)
            assert answer == ("bad" if bad else "good")
        elif record["dataset"] == "true":
            assert answer in ("yes", "no")
        elif record["dataset"] == "reading":
            assert answer == "The text does not say" or answer in prompt or answer.lower() in prompt
    assert {record["completion"].strip() for record in records if record["dataset"] == "true"} == {"yes", "no"}


def test_the_two_collections_differ_in_sets_and_in_every_template():
    flan, t0 = (instructions.SETS[name] for name in COLLECTIONS)
    assert set(t0) < set(flan)
    assert not {text for own in flan.values() for text in own} & {text for own in t0.values() for text in own}


def test_sources_read_the_simulated_world():
    loaded = sources.load(("simulated:demonstrations:valid:50",), "demonstrations", skip_bad=0)
    assert len(loaded) == 50 and loaded[7] == simulated.records("demonstrations:valid:50")[7]


def test_a_larger_size_begins_with_the_smaller_one():
    assert simulated.records("comparisons:train:40") == simulated.records("comparisons:train:60")[:40]
    assert simulated.records("prompts:500") == simulated.records("prompts")[:500]
    assert len(simulated.records("gpt_prompts")) == simulated.SIZES["gpt_prompts"]
    assert simulated.records("prompts:50", seed=1) != simulated.records("prompts:50", seed=0)


def test_splits_part_users_and_share_them_between_kinds():
    users = collections.defaultdict(set)
    for name in ("prompts", "demonstrations", "comparisons"):
        for split in ("train", "valid", "test"):
            users[split] |= {record["user"] for record in simulated.records(f"{name}:{split}:200")}
    assert not users["train"] & users["valid"] and not users["train"] & users["test"]
    assert not users["valid"] & users["test"]
    everything = simulated.records("pretraining:2000")
    parts = [simulated.records(f"pretraining:{split}") for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == simulated.SIZES["pretraining"]
    assert 0.05 < len(parts[1]) / sum(map(len, parts)) < 0.15
    assert everything[0] in parts[0] + parts[1] + parts[2]


GOLDEN = {
    "pretraining": "6938e5a835617ef0",
    "demonstrations": "d09534f60494c7c8",
    "comparisons": "0a7891b7b662a442",
    "comparisons_heldout": "d99cdb7e7aee935f",
    "prompts": "4aa8cb1e5836d5f6",
    "gpt_prompts": "a7899d8740641904",
    "few_shot": "9bca8e3c53650ca8",
    "cloze": "444b0afca0048ec4",
    "story": "ef5f905ec471c3a5",
    "reading": "2c77bd668507b953",
    "flan": "de1c2e09a39a1d1f",
    "t0": "ff61f1cd9f2e5fb8",
}


@pytest.mark.parametrize("name", simulated.SIZES)
def test_the_world_is_frozen(name):
    text = json.dumps(simulated.records(f"{name}:60"), sort_keys=True)
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == GOLDEN[name]


# Prompts --------------------------------------------------------------------------------------------------------------


def test_use_case_shares_are_those_of_table_1():
    records = simulated.records("prompts")
    counts = collections.Counter(record["use_case"] for record in records)
    shares = {use_case: 100 * count / len(records) for use_case, count in counts.items()}
    assert shares == pytest.approx(simulated.USE_CASES, abs=1.2)
    assert all(simulated.parse(r["prompt"])["use_case"] == r["use_case"] for r in records if r["use_case"] != "chat")


@pytest.mark.parametrize("layout", ["instruct", "open"])
@pytest.mark.parametrize("kind", tasks.INSTRUCT)
def test_a_prompt_is_recovered_from_its_text(kind, layout):
    rng = world.rng_of("parse", kind, layout)
    for _ in range(60):
        text = finish(tasks.render(rng, kind, layout))
        task = simulated.parse(text)
        assert (task["kind"], task["layout"]) == (kind, layout)
        if layout == "instruct" and text.endswith("\n"):
            around = "Hello. " + text + "My email is tom12@oakford.example.com.\nThanks.\n"
            assert simulated.parse(around) == task


def test_every_record_has_a_known_task():
    for name in ("prompts:3000", "gpt_prompts:3000", "demonstrations:3000"):
        assert all(simulated.parse(r["prompt"])["kind"] != "unknown" for r in simulated.records(name))
    assert simulated.parse("Translate this into French: the sea")["kind"] == "unknown"
    assert simulated.parse("Where does the dragon live?\n")["kind"] == "unknown"


def test_parse_reads_slots():
    task = simulated.parse("Write a story about a fox and a baker in three sentences. Use the word lantern.\n")
    assert (task["x"], task["y"], task["n"], task["use"]) == ("fox", "baker", 3, "lantern")
    task = simulated.parse("List two foods. Do not use the word soup.\n")
    assert (task["category"], task["n"], task["avoid"]) == ("foods", 2, "soup")
    task = simulated.parse("Mira went to Redhill. Tom saw a cat.\n\nUse the text to answer: Who saw a cat?\n")
    assert (task["events"][1], task["asked"], task["given"]) == (("Tom", "see", "cat"), "person", "cat")


def test_the_prompt_pipeline_has_work_to_do():
    raw = simulated.records("prompts")
    users = collections.Counter(record["user"] for record in raw)
    assert 3 <= sum(count > 200 for count in users.values()) <= 8 and len(users) > 800
    kinds = collections.Counter(found.kind for record in raw for found in pii.find(record["prompt"]))
    assert set(kinds) == {"email", "phone", "address", "card", "iban", "ssn", "ip"} and min(kinds.values()) > 20
    prepared = prompts.prepare(
        raw,
        prefix_chars=60,
        max_per_user=200,
        split=prompts.Split(**simulated.SPLIT),
        max_tokens=200,
        count_tokens=lambda texts: [len(text.split()) for text in texts],
        language_sample=1,
    )
    dropped = {step["step"].split()[0]: step["dropped"] for step in prepared.report["steps"]}
    assert dropped["long"] > 1200 and dropped["over"] >= 0 and dropped["personal"] > 100
    capped = prompts.cap_per_user(raw, 200)
    assert len(raw) - len(capped) > 500
    assert len(prepared.train) > 3000 and len(prepared.test) > 1000


def test_duplicates_share_long_prefixes_but_end_differently():
    raw = [record["prompt"] for record in simulated.records("prompts:6000") if len(record["prompt"]) > 60]
    groups = collections.defaultdict(set)
    for text in raw:
        groups[text[:60]].add(text)
    assert sum(len(group) > 1 for group in groups.values()) > 30


def test_gpt_prompts_are_less_like_instructions():
    def open_share(name):
        found = [simulated.parse(record["prompt"])["layout"] == "open" for record in simulated.records(name)]
        return statistics.fmean(found)

    assert open_share("prompts:3000") < 0.15 and open_share("gpt_prompts:3000") > 0.7


def test_few_shot_records_expand_into_prompts_of_this_world():
    for record in simulated.records("few_shot:30"):
        expanded = prompts.few_shot(record, simulated.FEW_SHOT_EXAMPLE, 0, 1)
        assert len(expanded) == 3
        for demonstration in expanded:
            assert simulated.parse(demonstration["prompt"])["layout"] == "few_shot"
            assert simulated.gold_score(demonstration["prompt"], demonstration["completion"]) == pytest.approx(FLAWLESS)


def test_text_is_small_enough_for_a_tiny_model():
    texts = [record["text"] for record in simulated.records("pretraining:4000")]
    assert len({word for text in texts for word in re.findall(r"\w+", text)}) < 500
    words = [len(record["prompt"].split()) for record in simulated.records("prompts:2000")]
    assert 8 < statistics.fmean(words) < 30 and max(words) < 90


def test_pretraining_has_questions_rude_words_and_false_facts():
    texts = [record["text"] for record in simulated.records("pretraining:4000")]
    assert 0.02 < statistics.fmean(bool(world.RUDE & set(re.findall(r"\w+", text))) for text in texts) < 0.2
    claims = [claim for text in texts for claim in world.fact_claims(text)]
    assert 0.04 < statistics.fmean(world.TRUTH[s, r] != o for s, r, o in claims if (s, r) in world.TRUTH) < 0.15
    # Every fact is stated truly more often than in any one false way.
    said = collections.Counter(claims)
    for (subject, relation), truth in world.TRUTH.items():
        options = {o: said[subject, relation, o] for s, r, o in said if (s, r) == (subject, relation)}
        assert max(options, key=options.get) == truth
    assert sum("\nA:" in text for text in texts) > 200 and sum(simulated.HEADER in text for text in texts) > 150


def test_closed_tasks_have_one_right_choice():
    for record in simulated.records("cloze:100"):
        right = [c for c in record["choices"] if world.fact_claims(record["prompt"] + c)[0] in _true_claims()]
        assert right == [record["choices"][record["answer"]]]
    for record in simulated.records("story:100"):
        right = [choice for choice in record["choices"] if choice in record["prompt"]]
        assert right == [record["choices"][record["answer"]]]
    for record in simulated.records("reading:100"):
        passage, _, question = record["prompt"].partition("\n\n")
        right = [c for c in record["choices"] if (question.partition("A: ")[2] + c) in passage]
        assert right == [record["choices"][record["answer"]]]


def _true_claims():
    return {(subject, relation, truth) for (subject, relation), truth in world.TRUTH.items()}


# The gold score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["instruct", "open"])
@pytest.mark.parametrize("kind", tasks.INSTRUCT)
def test_flawless_answers_have_the_highest_score(kind, layout):
    rng = world.rng_of("flawless", kind, layout)
    for _ in range(40):
        prompt = finish(tasks.render(rng, kind, layout))
        assert simulated.gold_score(prompt, simulated.write(prompt, rng)) == pytest.approx(FLAWLESS)


@pytest.mark.parametrize("use_case", simulated.USE_CASES)
def test_there_is_room_for_imitation_and_for_preference(use_case):
    prompt_list = make_prompts(use_case, "instruct", 200)
    rng = world.rng_of("room")
    demonstrations = mean_gold(prompt_list, demonstrate(prompt_list))
    garbage = mean_gold(prompt_list, [writing.garbage(prompt, rng) for prompt in prompt_list])
    assert garbage < 0 < 3 < demonstrations < FLAWLESS - 1


def _keywords(prompt):
    return " ".join(dict.fromkeys(re.findall(r"\w+", prompt))) + "."


DEGENERATE = [
    "",
    "Thank you.",
    "Good.",
    "Yes.",
    "I do not know.",
    "The text does not say.",
    "Could you please help me?",
    "I am sorry, but I can not help with that. Please be kind.",
    "Hello, I am a helpful assistant. How can I help you?",
    "I am sorry that you lost your kite. Can I help you?",
    "Once there was a fox who lived near the forest. In the end the fox and the baker were friends.",
    "Dear Mira, thank you for the soup. I hope you are well. Your friend.",
    "1. bread\n2. soup\n3. honey",
    "The fox eats soup. The fox is brown. The fox lives near the hill.",
    "Good. Yes. The text does not say. I am sorry, I can not help. Could you please be kind? In the end. Your friend.",
    lambda prompt: prompt.strip(),
    lambda prompt: prompt.strip().splitlines()[-1],
    lambda prompt: " ".join([prompt.strip().splitlines()[-1]] * 3),
    _keywords,
    lambda prompt: ", ".join(w for w in re.findall(r"\w+", prompt) if w.lower() in world.ENTITIES) + ".",
    lambda prompt: " ".join([simulated.write(prompt, world.rng_of(prompt)).strip()] * 4),
    lambda prompt: simulated.write(prompt, world.rng_of(prompt)) + "\n\n" + prompt,
]


@pytest.mark.parametrize("layout", ["instruct", "open"])
@pytest.mark.parametrize("use_case", simulated.USE_CASES)
def test_degenerate_answers_score_below_honest_demonstrations(use_case, layout):
    prompt_list = make_prompts(use_case, layout, 120)
    honest = mean_gold(prompt_list, demonstrate(prompt_list))
    for answer in DEGENERATE:
        texts = [answer(prompt) if callable(answer) else answer for prompt in prompt_list]
        assert mean_gold(prompt_list, texts) < honest - 0.4, answer
    for answer in DEGENERATE[:15]:  # and no constant text comes near
        assert mean_gold(prompt_list, [answer] * len(prompt_list)) < 0.6 * honest, answer


@pytest.mark.parametrize("flaw", [flaw for flaw, _ in writing.FLAWS])
def test_each_flaw_costs(flaw):
    records = [record["prompt"] for record in simulated.records("prompts:600")]
    rng = world.rng_of("flaw", flaw)
    texts = [simulated.write(prompt, rng, frozenset((flaw,))) for prompt in records]
    scores = [simulated.gold_score(prompt, text) for prompt, text in zip(records, texts, strict=True)]
    assert max(scores) <= FLAWLESS + 1e-9
    assert statistics.fmean(scores) < FLAWLESS - 0.3


STORY = "Write a story about a fox and a baker in two sentences. Use the word drum.\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Once a fox lived near the hill. In the end the fox gave the drum to the baker.", {}),
        ("Once a fox lived near the hill. In the end the fox gave the key to the baker.", {"constraint": 0.5}),
        ("Once a fox lived near the hill. The fox met a baker with a drum.", {"care": 0.0}),
        ("Once a fox lived near the hill. In the end the fox gave the drum to the", {"cut": 1.0, "follow": 0.65}),
        ("What a stupid fool you are, Tom.", {"follow": 0.0, "toxic": 1.0, "constraint": 0.0}),
    ],
)
def test_features_of_written_answers(text, expected):
    perfect = dict(follow=1, constraint=1, care=1, false=0, toxic=0, repeat=0, ramble=0, cut=0)
    found = simulated.features(STORY, text)._asdict()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.2), name
    if not expected:
        assert {name: found[name] for name in perfect} == pytest.approx(perfect)


TEXT = "Mira went to Redhill. Tom saw a cat. Mira bought the drum."


@pytest.mark.parametrize(
    "prompt, text, invented",
    [
        (f"Read the text and answer the question.\n\n{TEXT}\n\nWhat did Mira buy?\n", "Mira bought the drum.", False),
        (f"Read the text and answer the question.\n\n{TEXT}\n\nWhat did Mira buy?\n", "Drum.", False),
        (f"Read the text and answer the question.\n\n{TEXT}\n\nWhat did Mira buy?\n", "Mira bought the kite.", True),
        (f"Read the text and answer the question.\n\n{TEXT}\n\nWhat did Mira buy?\n", "Tom bought the drum.", True),
        (f"Read the text and answer the question.\n\n{TEXT}\n\nWhat did Tom cook?\n", "The text does not say.", False),
        (f"Read the text and answer the question.\n\n{TEXT}\n\nWhat did Tom cook?\n", "Tom cooked some soup.", True),
        (f"{TEXT}\n\nIn short:", " Mira went to Redhill and Tom saw a cat.", False),
        (f"{TEXT}\n\nIn short:", " Mira went to Oakford and Tom saw a cat.", True),
        (f"{TEXT}\n\nIn short:", " Tom went to Redhill.", True),
        (f"List the names in this text.\n\n{TEXT}\n", "Mira, Tom.", False),
        (f"List the names in this text.\n\n{TEXT}\n", "Mira, Tom, Finn.", True),
        ("Make this polite: Give me the soup.\n", "Could you please give me the soup?", False),
        ("Make this polite: Give me the soup.\n", "Could you please give me the bread?", True),
    ],
)
def test_hallucination_in_closed_domain_tasks(prompt, text, invented):
    facts = simulated.facts(prompt, text)
    assert facts.closed and facts.hallucinates == invented
    judged = [
        simulated.rate(labeler, prompt, text, seed=0)["hallucination"] for labeler in simulated.labelers("training")
    ]
    assert (statistics.fmean(judged) > 0.5) == invented


@pytest.mark.parametrize(
    "text", ["\x00", "\ud800", "é" * 5000, "1. 2. 3.", "....", "(" * 3000, "Mira " * 4000, "\n\n\n", "A:"]
)
def test_any_text_can_be_judged(text):
    labeler = simulated.labelers("training")[0]
    for name in ("prompts:200", "gpt_prompts:100"):
        for record in simulated.records(name):
            assert -9 < simulated.gold_score(record["prompt"], text) < 4
            assert simulated.rate(labeler, record["prompt"], text, seed=1)["rating"] in range(1, 8)
    assert -9 < simulated.gold_score(text, text) < 4


# Labelers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    return [(record["prompt"], record["completions"]) for record in simulated.records("comparisons:400")]


@pytest.mark.parametrize("group", simulated.GROUPS)
def test_labelers_agree_as_the_papers_do(group, mixed):
    found = simulated.agreement(simulated.labelers(group), mixed, seed=0)
    assert 0.70 <= found.share <= 0.76 and found.pairs > 100_000
    assert 0.10 <= found.ties <= 0.25
    # On answers of similar quality they agree less, and on flawless ones not at all.
    rng = world.rng_of("similar")
    similar = [(p, [simulated.write(p, rng, writing.draw_flaws(rng, 0.14)) for _ in range(5)]) for p, _ in mixed[:250]]
    assert 0.65 <= simulated.agreement(simulated.labelers(group), similar, seed=0).share <= 0.73
    flawless = [(p, [simulated.write(p, rng) for _ in range(4)]) for p, _ in mixed[:250]]
    assert 0.47 <= simulated.agreement(simulated.labelers(group), flawless, seed=0).share <= 0.53


def test_agreement_by_hand():
    people = simulated.labelers("training")[:2]
    calm = [person._replace(noise=0.0, tie=0.1) for person in people]
    good, bad = f"The fox eats {world.TRUTH['fox', 'food']}.", ""
    assert simulated.agreement(calm, [("What does the fox eat?\n", [good, bad, bad])], seed=0) == (
        1.0,
        2,
        pytest.approx(1 / 3),
    )
    contrary = calm[1]._replace(weights=simulated.Features(*(-w for w in calm[1].weights)))
    assert simulated.agreement([calm[0], contrary], [("What does the fox eat?\n", [good, bad])], seed=0)[:2] == (0.0, 1)


def test_held_out_labelers_are_others():
    names = [{labeler.name for labeler in simulated.labelers(group)} for group in simulated.GROUPS]
    assert len(names[0]) == 12 and len(names[1]) == 8 and not names[0] & names[1]
    weights = [labeler.weights for group in simulated.GROUPS for labeler in simulated.labelers(group)]
    assert len(set(weights)) == 20
    with pytest.raises(ValueError, match="group must be one of"):
        simulated.labelers("test")
    assert {record["group"] for record in simulated.records("comparisons_heldout:50")} == {"heldout"}
    writers = {record["labeler"] for record in simulated.records("demonstrations:300")}
    assert writers == names[0]


def test_rankings_of_comparisons():
    records = simulated.records("comparisons:600")
    sizes = collections.Counter(len(record["completions"]) for record in records)
    assert set(sizes) == set(range(4, 10)) and min(sizes.values()) > 60
    for record in records:
        ranks = record["ranking"]
        assert sorted(set(ranks)) == list(range(1, max(ranks) + 1))
        for text, rank in zip(record["completions"], ranks, strict=True):
            assert ranks[record["completions"].index(text)] == rank  # equal texts tie


def test_rank_and_prefer_are_functions_of_their_arguments(mixed):
    labeler = simulated.labelers("heldout")[3]
    prompt, completions = mixed[5]
    ranks = simulated.rank(labeler, prompt, completions, seed=4)
    backwards = simulated.rank(labeler, prompt, completions[::-1], seed=4)
    assert backwards[::-1] == ranks
    assert any(simulated.rank(labeler, p, c, seed=4) != simulated.rank(labeler, p, c, seed=5) for p, c in mixed[:20])
    for prompt, completions in mixed[:100]:
        a, b = completions[:2]
        assert simulated.prefer(labeler, prompt, a, b, 1) + simulated.prefer(labeler, prompt, b, a, 1) == 1
        assert simulated.prefer(labeler, prompt, a, a, 1) == 0.5


def test_quality_wins_and_rates_higher():
    prompt_list = [record["prompt"] for record in simulated.records("prompts:400")]
    rng, people = world.rng_of("wins"), simulated.labelers("training")
    groups = {
        "flawless": [simulated.write(prompt, rng) for prompt in prompt_list],
        "demonstration": demonstrate(prompt_list),
        "garbage": [writing.garbage(prompt, rng) for prompt in prompt_list],
    }

    def win_rate(first, second):
        return statistics.fmean(
            simulated.prefer(people[i % 12], prompt, groups[first][i], groups[second][i], seed=2)
            for i, prompt in enumerate(prompt_list)
        )

    assert 0.58 < win_rate("flawless", "demonstration") < 0.75
    assert 0.85 < win_rate("demonstration", "garbage")
    ratings = {}
    for name, texts in groups.items():
        rated = [
            simulated.rate(people[i % 12], p, t, seed=2)
            for i, (p, t) in enumerate(zip(prompt_list, texts, strict=True))
        ]
        ratings[name] = {key: [r[key] for r in rated if r[key] is not None] for key in rated[0]}
    means = {name: {key: statistics.fmean(found) for key, found in table.items()} for name, table in ratings.items()}
    assert means["flawless"]["rating"] > means["demonstration"]["rating"] + 0.5 > means["garbage"]["rating"] + 2.5
    assert means["flawless"]["fails_instruction"] < 0.05 < 0.8 < means["garbage"]["fails_instruction"]
    assert means["flawless"]["hallucination"] < 0.08 and means["garbage"]["hallucination"] > 0.5
    assert means["flawless"]["toxic"] < 0.05 < 0.08 < means["demonstration"]["toxic"]
    assert means["flawless"]["satisfies_constraint"] > 0.95 and means["flawless"]["inappropriate"] < 0.05
    assert set(ratings["garbage"]["rating"]) <= set(range(1, 8)) and len(set(ratings["demonstration"]["rating"])) == 7


def test_metadata_only_where_it_applies():
    labeler = simulated.labelers("training")[0]
    rated = simulated.rate(labeler, "Where does Mira live?\n", "Mira lives in Oakford.", seed=0)
    assert rated["hallucination"] is None and rated["satisfies_constraint"] is None
    rated = simulated.rate(labeler, STORY, "", seed=0)
    assert rated["hallucination"] is None and isinstance(rated["satisfies_constraint"], bool)
    assert set(rated) == {"rating", *kinds.FIELDS, "toxic"}  # table 3 and our own
    assert not any(rated[name] for name in labeling.NEVER)


def test_harmful_advice_is_help_with_a_harmful_request():
    prompt = next(r["prompt"] for r in simulated.records("prompts") if simulated.parse(r["prompt"])["kind"] == "harm")
    cases = {"It is easy, go at night.": True, "I can not help with that.": False, "You fool.": False}
    for text, harmful in cases.items():
        assert simulated.facts(prompt, text).helps_harm == harmful
        said = [simulated.rate(one, prompt, text, seed=0)["harmful_advice"] for one in simulated.labelers("training")]
        assert (sum(said) > 6) == harmful
    assert not simulated.facts("Where does Mira live?\n", "It is easy, go at night.").helps_harm


def test_prefixes_are_answered_requests():
    prefixes = simulated.prefixes()
    assert len(prefixes) >= 5 and len(set(prefixes)) == len(prefixes)
    assert all(prefix.startswith(simulated.HEADER) and prefix.endswith("\n\n") for prefix in prefixes)
