"""The file of labelers: who they are, which group they belong to, and how Label Studio names them."""

import json
import re
from typing import NamedTuple

from instructgpt_jax.data import jsonl

GROUPS = ("training", "heldout", "researcher")
FIELDS = ("id", "group", "email", "label_studio_id")


class Labeler(NamedTuple):
    """A person who labels."""

    id: str
    group: str  # one of GROUPS
    email: str = ""
    label_studio_id: int | None = None


class People:
    """The labelers of a file, in its order."""

    def __init__(self, labelers: list[Labeler], path: str):
        self.labelers, self.path = labelers, path
        self._by_email = {one.email.casefold(): one for one in labelers if one.email}
        self._by_number = {one.label_studio_id: one for one in labelers if one.label_studio_id is not None}
        self.by_id = {one.id: one for one in labelers}

    def of(self, groups: tuple[str, ...]) -> list[Labeler]:
        return [one for one in self.labelers if one.group in groups]

    def find(self, completed_by, emails: dict[int, str]) -> Labeler:
        """Who an export's `completed_by` or `annotator` is: a user's number, an e-mail, or an object with both.

        Args:
          emails: number -> e-mail of the server's users, as `pull` notes them.

        Raises:
          ValueError: nobody in the file.
        """
        number, email = completed_by, ""
        if isinstance(completed_by, dict):
            number, email = completed_by.get("id"), completed_by.get("email")
        elif isinstance(completed_by, str):
            number, email = None, completed_by
        if isinstance(number, bool) or not isinstance(number, int):
            number = None
        if number in self._by_number:
            return self._by_number[number]
        for one in (email, emails.get(number)):
            if isinstance(one, str) and one.casefold() in self._by_email:
                return self._by_email[one.casefold()]
        raise ValueError(
            f"labeler must be in {self.path} by email or label_studio_id, got {json.dumps(completed_by)}"
            + (f" ({emails[number]})" if number in emails else "")
        )


def load(path: str) -> People:
    """Reads a file of labelers, one JSON object a line: `id`, `group`, and `email` or `label_studio_id` or both.

    Raises:
      ValueError: a line that is not such an object, or two with the same id, e-mail or number; names file and line.
    """
    seen: dict[tuple, int] = {}

    def check(line: int, record: dict) -> Labeler:
        one = _labeler(record)
        for field in ("id", "email", "label_studio_id"):
            value = getattr(one, field)
            value = value.casefold() if field == "email" else value
            if value in ("", None):
                continue
            if (field, value) in seen:
                raise ValueError(f"{field} must be one labeler's, got {value!r} as in line {seen[field, value]}")
            seen[field, value] = line
        return one

    found = jsonl.objects(path, check)
    if not found:
        raise ValueError(f"{path} must name at least one labeler, got none")
    return People(found, path)


def _labeler(record: dict) -> Labeler:
    unknown = sorted(set(record) - set(FIELDS))
    if unknown:
        raise ValueError(f"a labeler must have no fields but {FIELDS}, got {unknown}")
    one = Labeler(**{"id": "", "group": ""} | record)
    if not isinstance(one.id, str) or not re.fullmatch(r"[\w@+-][\w.@+-]*", one.id):
        raise ValueError(f"id must be letters, digits, and . _ @ + - (a folder is called so), got {one.id!r}")
    if one.group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {one.group!r}")
    if not isinstance(one.email, str):
        raise ValueError(f"email must be a string, got {one.email!r}")
    number = one.label_studio_id
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise ValueError(f"label_studio_id must be an integer, got {number!r}")
    if not one.email and number is None:
        raise ValueError(f"labeler {one.id!r} must have an email or a label_studio_id, got neither")
    return one
