"""The tiny world: an embedded stand-in for web text, users and labelers, so that the whole method runs offline.

    records("prompts")  records("demonstrations:train")  records("pretraining:train:100000")   # see streams.records

Twelve people, eight places, ten animals and some 300 words; text of 5-60 tokens with a vocabulary of about a
thousand. Everything follows from the name of the records, their number and a seed, on every platform. The world and
its labelers are frozen: results are comparable only while they are, and a later change needs a stated reason.

| records | fields | what they stand for |
|---|---|---|
| `pretraining` | text | the web: stories, facts (8 % false), news, lists, talk, some of it rude; requests without |
| | | answers; pages of one to three requests with careless answers; school texts with tasks |
| `prompts` | prompt, user, use_case | raw prompts of the API: the ten use cases in the shares of the paper's table 1, |
| | | repeats, heavy users, thanks and greetings, personal information |
| `gpt_prompts` | prompt, user, use_case | the paper's prompts to GPT-3: mostly unfinished text, few instructions |
| `demonstrations` | prompt, completion, user, use_case, source, labeler | answers of training labelers, with flaws |
| `comparisons`, `comparisons_heldout` | prompt, completions, ranking, user, use_case, labeler, group | K = 4-9 |
| | | completions of mixed quality, ranked by one labeler of the training or the held-out group |
| `flan`, `t0` | prompt, completion, user, dataset, template, source | public data sets worded as instructions, for |
| | | the baselines of that name (`instructions`) |
| `few_shot` | instruction, pairs, user, use_case | for `data.prompts.few_shot`, with `tasks.FEW_SHOT_EXAMPLE` |
| `cloze`, `story`, `reading` | prompt, choices, answer | closed tasks worded like the pretraining text, for the |
| | | alignment tax: a fact, a hero, a text (hard: a base model of 0.8 million parameters stays at chance) |

What can be learned from which signal:

* Pretraining: the language, the facts of the world, how stories, lists, letters and poems go, copying from context; and
  that a request is mostly followed by more requests. After `HEADER` and perhaps answered requests (`prefixes`)
  it is followed by an answer, as careless as the web: a base model follows badly, with a prefix better.
* Demonstrations: that a request gets an answer which then ends; the form of each kind of answer. Their writers leave
  out a required word, miscount, invent, are terse or rude or ramble, each at some rate (`writing.FLAWS`), and imitation
  learns the rates along with the rest. About four in ten are flawless.
* Comparisons: what of that labelers value: constraints met, nothing invented, kind words, an end in time. A policy can
  avoid a flaw that its demonstrations show in one of five answers.
* Neither of the last two: facts, which only pretraining states often enough.

The gold preference (`gold_score`) is known to labelers and evaluation alone and is in no record. It is a sum of
features of prompt and text (`judging`), where all that a phrase could earn by itself is multiplied by how far the task
is done: silence, copies, loops, word lists and any one polite phrase for all prompts score below honest demonstrations.
"""

from instructgpt_jax.simulated.judging import Facts, Features, facts, features, gold_score
from instructgpt_jax.simulated.labeling import (
    GROUPS,
    Agreement,
    Labeler,
    agreement,
    draw_labelers,
    labelers,
    prefer,
    rank,
    rate,
    value,
)
from instructgpt_jax.simulated.streams import HEADER, SIZES, SPLIT, completions, prefixes, records
from instructgpt_jax.simulated.tasks import CLOSED, FEW_SHOT_EXAMPLE, USE_CASES, parse
from instructgpt_jax.simulated.writing import write

__all__ = [
    "CLOSED", "FEW_SHOT_EXAMPLE", "GROUPS", "HEADER", "SIZES", "SPLIT", "USE_CASES", "Agreement", "Facts", "Features",
    "Labeler", "agreement", "completions", "draw_labelers", "facts", "features", "gold_score", "labelers", "parse",
    "prefer", "prefixes", "rank", "rate", "records", "value", "write",
]  # fmt: skip
