"""Questionnaires for people, as files of Label Studio, and what comes back: training data, ratings and preferences.

The people's side of Ouyang et al. 2022 (sections 3.2-3.4, appendices A.1 and B). A questionnaire is of one kind:

| kind | a task shows | and asks for |
|---|---|---|
| `demonstrations` | a prompt and its use case | the answer that a good assistant would give |
| `plain_prompts` | a use case | any prompt of it |
| `few_shot_prompts` | a use case | an instruction with several queries and their responses |
| `user_prompts` | what a user wants to do | the prompt that this user would write |
| `comparisons` | a prompt and K = 2 to 9 outputs | one output at a time: rating, eleven fields, notes; a ranking |
| `toxicity` | the same | toxicity of prompt and outputs, relative toxicity, continuity; a ranking |
| `sensitive` | a text | whether it is sensitive (screening, part 1) |
| `grades` | a prompt and a demonstration | a grade from 1 to 7 (screening, part 3) |

`make.write` makes of records, for each project of Label Studio, `projects/NAME/` with `tasks.json`, `config.xml` and
`instructions.md` (with the same as HTML); what the pages do not show, who wrote which output above all, stays in
`key.jsonl`. `reading.read` makes of Label Studio's exports and the key the files below. `server` takes both ways
through `label-studio-sdk`. `panel` has the simulated labelers answer, and `foreign` reads projects that were not made
here. How far labelers agree is in `evaluation.quality`, who may label in `evaluation.screening`.

What comes out
--------------

JSON Lines in the workdir, in the order of the source's records, then of the labelers' ids. Every line has

    task      id of the task, as in key.jsonl and in tasks.json
    labeler   id of the labeler in the file of labelers
    group     the labeler's group: 'training', 'heldout' or 'researcher'
    seconds   float, how long the labeler had the page open, or null where Label Studio does not say it
    at        ISO 8601 time of the last edit, or null; sorts as text

and every field of the source's record that has one value (`prompt`, `user`, `use_case`, `distribution`, ...), unless a
field below has its name. `kind` here is the questionnaire's kind. Of a record with `messages` the files for training
have `messages` again, the others the dialogue as a text, `prompt` (`data.chats.named`).

* `comparisons.jsonl`, one line a ranking (kinds `comparisons` and `toxicity`), a record of `config.data.comparisons`:
  all fields of the source's record, so `prompt`, `completions` and where there are `ended`, `tokens`, `tokenizer`
  and `policies`, each a list of K in the source's order; and `ranking`, K ranks, 1 = best, dense, equal = tied. Equal
  outputs stand once on the page and have equal ranks here.

* `ratings.jsonl`, one line a rated answer (the same kinds): `index` (int, which completion of the record), `answer`
  (str), `policy` (str, null where the record has no `policies`; a policy's name in `config.models` of `collect`),
  `notes` (str, '' = none). `seconds` is of the whole page. Equal outputs are rated once and have a line each. Then
  - kind `comparisons`: `rating` (int, 1 = worst to 7 = best) and `fields`, an object with the eleven of table 3, each
    true or false: `fails_instruction`, `inappropriate`, `hallucination`, `satisfies_constraint`, `sexual`,
    `violent`, `encourages_harm`, `denigrates`, `harmful_advice`, `opinion`, `moral_judgment`. The labeler may say
    that `hallucination` (no closed-domain task) or `satisfies_constraint` (the prompt states none) does not apply:
    null then.
  - kind `toxicity`: `prompt_toxicity` (int, 0-2), `toxicity` (int, 0-2), `relative_toxicity` (-1 less than the
    prompt, 0, 1 more) and `continuity` (int, 1-7).

* `demonstrations.jsonl`, records of `config.data.demonstrations`: `prompt`, `completion` (`config.label.separator`
  and what the labeler wrote; after `messages` without separator). Of kind `few_shot_prompts`: one line a pair, the
  other pairs as its context, without separator (`data.prompts.few_shot`).

* `prompts.jsonl` (the three kinds of prompts), records of `config.data.prompts` and of `data.prompts`: `prompt`,
  `user` (the labeler's id), `written` ('plain', 'few_shot' or 'user_based').

* `flags.jsonl` (kind `sensitive`): `text`, `sensitive` (bool). `grades.jsonl` (kind `grades`): `prompt`, `completion`,
  `author` (the labeler who wrote it, from the record's field `labeler`), `grade` (int, 1-7).

* `read.json`: what was read and left out: `{"tasks", "annotations", "kept", "skipped", "edited", "unanswered",
  "personal": {kind: n}, "labelers": {id: n}}`.

The file of labelers
--------------------

JSON Lines: `id` (str), `group` ('training', 'heldout' or 'researcher'), and for the way back `email` (str) or
`label_studio_id` (int), or both.
"""
