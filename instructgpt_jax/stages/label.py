"""Questionnaires for people (`labeling/`): made, brought to Label Studio, fetched, and read into data and preferences.

`config.label.step` says which part of the way is gone:

* `make` writes the projects of a questionnaire and its key into the workdir;
* `push` takes the projects to the Label Studio server of `config.label.url`; import by hand does the same;
* `pull` fetches what has been answered so far, into `exports/` of the workdir, and reads it;
* `read` reads the exports that `config.label.export` names, or those in `exports/`;
* `simulate` does all of it without people: the labelers of the simulated world answer what `make` wrote, as an export
  in `exports/`, which is read.

`push` and `pull` need the extra `label` and a token in the environment (`LABEL_STUDIO_API_KEY`). Each may be given
again at any time: nothing is sent twice, and what was read before is replaced.
"""

import json

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import jsonl
from instructgpt_jax.labeling import filling, kinds, make, panel, people, reading, server

EXPORTS, USERS, READ = "exports", "users.json", "read.json"


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Runs one step; files alone, on the first process.

    Raises:
      ValueError: a source, a file of labelers or an export that is not what it must be, no key yet, a server that
        cannot be reached or that refuses.
    """
    c, folder = config.label, epath.Path(workdir)
    crowd = panel.crowd() if c.step == "simulate" else people.load(c.labelers)
    workdirs.claim(workdirs.resolved(config, {}), folder)
    if jax.process_index() > 0:
        return
    if c.step == "make":
        _make(config, crowd, folder)
    elif c.step == "push":
        for name, count, link in server.push(c.url, folder):
            process.say(f"label: {count} tasks sent to project {name}, {link}")
    else:
        if c.step == "pull":
            fetched, users = server.pull(c.url, folder)
            (folder / EXPORTS).mkdir(exist_ok=True)
            workdirs.write_atomically(folder / USERS, json.dumps(users) + "\n")
            for name, export in fetched.items():
                workdirs.write_atomically(folder / EXPORTS / f"{name}.json", export)
        elif c.step == "simulate":
            _make(config, crowd, folder)
            _simulate(config, folder)
        read(config, crowd, folder)


def _make(config: ConfigDict, crowd: people.People, folder: epath.Path) -> None:
    if (folder / make.KEY).exists():
        process.say(f"label: the questionnaires are in {folder / make.PROJECTS}, nothing to do")
        return
    made = make.write(config, crowd, folder)
    told = ", ".join(f"{count} {name}" for name, count in made.items())
    process.say(f"label: {told}, in {folder / make.PROJECTS}")


def _simulate(config: ConfigDict, folder: epath.Path) -> None:
    """The export of a server on which the simulated labelers have answered everything."""
    c = config.label
    answers = panel.answers(make.read_key(folder).values(), c.groups, config.seed)
    (folder / EXPORTS).mkdir(exist_ok=True)
    text = filling.dump(filling.export(c.kind, kinds.page(c.kind, c.pairs), answers))
    workdirs.write_atomically(folder / EXPORTS / "simulated.json", text)


def read(config: ConfigDict, crowd: people.People, folder: epath.Path) -> None:
    """Writes the files of the answers (see `labeling`), and `read.json` in the end."""
    given = config.label.export if config.label.step == "read" else ()
    files = [file for pattern in given for file in jsonl.match(pattern, "json")]
    files = files or sorted(map(str, (folder / EXPORTS).glob("*.json")))
    if not files:
        raise ValueError(f"config.label.export must name an export of Label Studio, got none, and none in {EXPORTS}/")
    users = folder / USERS
    emails = {int(number): email for number, email in json.loads(users.read_text()).items()} if users.exists() else {}
    lines, report = reading.read(config, make.read_key(folder), crowd, files, emails)
    for name, found in lines.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        workdirs.write_atomically(folder / f"{name}.jsonl", text)
    workdirs.write_atomically(folder / READ, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    counts = ", ".join(f"{report[name]} {name}" for name in ("kept", "skipped", "edited", "unanswered"))
    personal = f"; left out for personal information: {report['personal']}" if report["personal"] else ""
    process.say(f"label: {report['annotations']} annotations of {report['tasks']} tasks: {counts}{personal}")
    for name, found in lines.items():
        process.say(f"label: {len(found)} lines in {folder / name}.jsonl")
