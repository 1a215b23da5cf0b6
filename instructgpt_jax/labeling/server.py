"""Questionnaires to a Label Studio server and back, through `label-studio-sdk` 2.x (the extra `label`).

A project is known again by a mark in its description, and a task by its id: `push` sends what is not there yet, so that
one that died half way is given again. The token stands in the environment, `LABEL_STUDIO_API_KEY`.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from instructgpt_jax.labeling import instructions, make

TOKEN = "LABEL_STUDIO_API_KEY"
BATCH = 200  # tasks of a request


def check() -> None:
    """Refuses an environment without the extra or without a token.

    Raises:
      ValueError: says what is missing.
    """
    if importlib.util.find_spec("label_studio_sdk") is None:
        raise ValueError(
            "config.label.step push and pull need the extra 'label' (pip install 'instructgpt-jax[label]'), got none; "
            "projects/*/tasks.json and config.xml can be imported by hand"
        )
    if not os.environ.get(TOKEN):
        raise ValueError(f"${TOKEN} must be the token of a Label Studio account, got none")


def push(url: str, folder: epath.Path) -> Iterator[tuple[str, int, str]]:
    """Makes the projects of a workdir and sends their tasks, each of them once.

    Args:
      url: of the server.
      folder: the workdir.

    Yields:
      Of each project its name, how many tasks were sent now, and its page.

    Raises:
      ValueError: no questionnaires in the workdir; a server that cannot be reached, or that refuses.
    """
    names = _projects(folder)
    with _speaking_to(url) as client:
        known = _known(client)
        for name in names:
            part = folder / make.PROJECTS / name
            tasks = json.loads((part / "tasks.json").read_text())
            about = json.loads((part / "project.json").read_text())
            mark, xml = _mark(folder, name), (part / "config.xml").read_text()
            text = instructions.html((part / "instructions.md").read_text())
            if mark not in known:
                made = client.projects.create(
                    title=f"{about['kind']} {mark}", description=mark, label_config=xml, expert_instruction=text,
                    show_instruction=True, show_skip_button=True, maximum_annotations=about["labelers_per_task"],
                )  # fmt: skip
                known[mark] = made
            else:  # the files may have been edited since
                client.projects.update(id=known[mark].id, label_config=xml, expert_instruction=text)
            number = known[mark].id
            there = {task.data.get("task") for task in client.tasks.list(project=number, page_size=BATCH)}
            missing = [task for task in tasks if task["data"]["task"] not in there]
            for start in range(0, len(missing), BATCH):
                client.projects.import_tasks(id=number, request=missing[start : start + BATCH])
            yield name, len(missing), f"{url.rstrip('/')}/projects/{number}"


def pull(url: str, folder: epath.Path) -> tuple[dict[str, str], dict[int, str]]:
    """What has been answered so far.

    Returns:
      Of each project of the workdir its export in JSON, and number -> e-mail of the server's users.

    Raises:
      ValueError: a project that was never sent; a server that cannot be reached, or that refuses.
    """
    found, names = {}, _projects(folder)
    with _speaking_to(url) as client:
        known = _known(client)
        for name in names:
            mark = _mark(folder, name)
            if mark not in known:
                raise ValueError(f"{url} must have the project {mark!r}, which config.label.step=push makes, got none")
            tasks = client.projects.exports.as_json(known[mark].id)
            found[name] = json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"
        users = {user.id: user.email for user in client.users.list()}
    return found, users


def _projects(folder: epath.Path) -> list[str]:
    make.read_key(folder)
    return sorted(part.name for part in (folder / make.PROJECTS).iterdir())


def _mark(folder: epath.Path, name: str) -> str:
    """What a project is called on the server: it follows from its tasks, and says nothing of who wrote them."""
    tasks = (folder / make.PROJECTS / name / "tasks.json").read_bytes()
    return f"{name} {hashlib.blake2b(tasks, digest_size=5).hexdigest()}"


def _known(client: Any) -> dict[str, Any]:
    """Mark -> project, of those that the account sees."""
    return {project.description: project for project in client.projects.list() if project.description}


@contextlib.contextmanager
def _speaking_to(url: str) -> Iterator[Any]:
    """A client; what the server or the way to it says becomes one line."""
    import httpx
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.core import ApiError

    try:
        yield LabelStudio(base_url=url, api_key=os.environ[TOKEN])
    except ApiError as error:
        body = error.body if isinstance(error.body, str) else json.dumps(error.body, default=str)
        if error.status_code in (401, 403):
            raise ValueError(
                f"${TOKEN} must be a token with the right to make projects at {url}, got {error.status_code}: "
                f"{' '.join(body.split())[:200]}"
            ) from None
        raise ValueError(
            f"config.label.url: {url} answered {error.status_code}: {' '.join(body.split())[:200]}; what it has taken "
            "is not sent again"
        ) from None
    except httpx.HTTPError as error:
        raise ValueError(
            f"config.label.url must be a Label Studio server that can be reached, got {url}: {error or type(error)}; "
            "what it has taken is not sent again"
        ) from None
