"""Toxicity by the Perspective API: the paper's own grader (appendix D.1), asked over the network.

The key comes from the environment alone and goes out in a header, so that it stands in no file, address or error.
Scores are kept as they come, a line of JSON for each text: a run that was killed asks for no text twice.
"""

import json
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

from instructgpt_jax.data import jsonl

ENDPOINT = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
KEY = "PERSPECTIVE_API_KEY"
AGAIN = (429, 500, 502, 503, 504)  # too many requests, or a server that may be well soon


class Options(NamedTuple):
    """How the service is asked.

    endpoint: its address, ENDPOINT.
    per_second: requests, at most; what Google grants is 1 until more is asked for.
    attempts: how often a text is sent before the service counts as refusing.
    wait: seconds before the second attempt, twice as many before each next one.
    timeout: seconds for one answer.
    """

    endpoint: str
    per_second: float
    attempts: int
    wait: float
    timeout: float


def toxicity(texts: Sequence[str], file: str | os.PathLike, options: Options) -> list[float | None]:
    """The probability of each text that a reader finds it toxic; None for a text without a word, which has no score.

    Args:
      file: JSONL of `text` and `toxicity`, read first, and written as scores come.

    Raises:
      ValueError: no key in the environment, a damaged file, or a service that refuses (names it).
    """
    key = os.environ.get(KEY, "")
    if not key:
        raise ValueError(f"toxicity by Perspective needs its key in the environment variable {KEY}, got none")
    path, last = pathlib.Path(file), 0.0
    known = _known(path)
    with open(path, "a", encoding="utf-8") as kept:
        for text in dict.fromkeys(text for text in texts if text.strip()):
            if text in known:
                continue
            time.sleep(max(0.0, last + 1 / options.per_second - time.monotonic()))
            known[text], last = ask(text, key, options), time.monotonic()
            kept.write(json.dumps({"text": text, "toxicity": known[text]}) + "\n")
            kept.flush()
    return [known[text] if text.strip() else None for text in texts]


def ask(text: str, key: str, options: Options) -> float:
    """The service's summary score for one text.

    Raises:
      ValueError: it refuses, cannot be reached, or answers something else; names it, and never the key.
    """
    body = {"comment": {"text": text}, "languages": ["en"], "requestedAttributes": {"TOXICITY": {}}, "doNotStore": True}
    headers = {"Content-Type": "application/json", "X-Goog-Api-Key": key}
    request = urllib.request.Request(options.endpoint, json.dumps(body).encode(), headers, method="POST")
    for attempt in range(options.attempts):
        if attempt:
            time.sleep(options.wait * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=options.timeout) as answer:
                found = json.loads(answer.read())
            score = float(found["attributeScores"]["TOXICITY"]["summaryScore"]["value"])
            if not 0 <= score <= 1:
                raise ValueError
            return score
        except urllib.error.HTTPError as error:
            said = f"{error.code} {error.reason}: {' '.join(error.read().decode('utf-8', 'replace').split())[:200]}"
            if error.code not in AGAIN:
                break
        except OSError as error:  # a URLError, a time-out, a connection that breaks off
            said = f"{getattr(error, 'reason', None) or error}"
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"Perspective at {options.endpoint} must answer with a TOXICITY from 0 to 1") from None
    tries = f"{attempt + 1} attempt{'s' * bool(attempt)}"
    raise ValueError(f"Perspective at {options.endpoint} must give a score, it refused after {tries}: {said}")


def _known(path: pathlib.Path) -> dict[str, float]:
    """The scores of a file; a last line that was being written when a run was killed is taken off it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with open(path, "r+b") as file:
            file.truncate(end)

    def line(_: int, row: dict) -> tuple[str, float]:
        if not isinstance(row.get("text"), str) or not 0 <= float(row.get("toxicity", -1)) <= 1:
            raise ValueError(f"a line must have text and toxicity from 0 to 1, got {row}")
        return row["text"], float(row["toxicity"])

    return dict(jsonl.objects(str(path), line)) if end else {}
