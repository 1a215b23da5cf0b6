"""Results as files, each written whole, so that a run that was killed does not repeat them."""

import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from instructgpt_jax import process
from instructgpt_jax import workdir as workdirs


class Parts:
    """The files `<folder>/<name>.json` that were there when the run began, and those it adds."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._found = {path.name for path in folder.iterdir()}
        if jax.process_count() > 1:  # nobody writes before everybody has looked
            multihost_utils.sync_global_devices("parts")

    def __len__(self) -> int:
        return len(self._found)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """What the file holds; where there is none, or a damaged one, what `make` returns, as it reads back from JSON.

        All processes read the same file, and none has made it anew before each has read it: they make it together.
        """
        path = self.folder / f"{name}.json"
        if path.name in self._found:
            try:
                return json.loads(path.read_text())
            except ValueError as error:  # also what is no UTF-8
                process.say(f"evaluate: {path} is damaged ({error}), it is made again")
        process.end_if_stopped()
        text = json.dumps(make(), ensure_ascii=False)
        if jax.process_index() == 0:
            workdirs.write_atomically(path, text + "\n")
        return json.loads(text)
