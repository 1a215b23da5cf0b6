"""The same scalars, samples and figures on Weights & Biases, where `config.log.wandb` names a project.

A workdir is one run there, also when it goes on: the run's id is kept in the workdir. Points lie at the step of the
state, so what a killed run wrote after its last checkpoint is written again with the same numbers. Without a network
WANDB_MODE=offline keeps the run in the workdir, for `wandb sync`.
"""

import contextlib
import json
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from instructgpt_jax import workdir as workdirs

ID = "wandb.json"  # in the workdir: the id of its run


class Run:
    """One run of Weights & Biases; with no project, and on other processes than 0, every method does nothing."""

    def __init__(self, project: str, workdir: epath.Path, config: dict[str, Any]):
        """Begins the run of a workdir, or goes on with it.

        Args:
          project: of Weights & Biases, 'PROJECT' or 'ENTITY/PROJECT'; '' = none.
          workdir: which exists; its name is the run's.
          config: the resolved configuration.

        Raises:
          ValueError: Weights & Biases refuses it, or is out of reach; WANDB_MODE=offline needs neither key nor network.
        """
        self._run = None
        if not project or jax.process_index() > 0:
            return
        import wandb  # slow to import, and an extra

        entity, _, name = project.rpartition("/")
        remote = "://" in str(workdir)
        try:
            run = wandb.init(
                project=name,
                entity=entity or None,
                id=_id_of(workdir),
                name="/".join(workdir.parts[-2:]),
                dir=tempfile.gettempdir() if remote else str(workdir),
                config=config,
                resume="allow",
                reinit="create_new",  # stages beside each other are runs beside each other
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:  # no key, no such project, no network
            raise ValueError(f"config.log.wandb={project!r} could not be opened: {error}") from error
        self._run, self._wandb = run, wandb
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A point of every metric."""
        if self._run is not None:
            self._run.log({"step": step, **values})

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """The samples of a step as a table."""
        if self._run is not None and samples:
            columns = list(dict.fromkeys(key for sample in samples for key in sample))
            rows = [[_cell(sample.get(column)) for column in columns] for sample in samples]
            self._run.log({"step": step, "samples": self._wandb.Table(columns=columns, data=rows)})

    def figures(self, folder: epath.PathLike) -> None:
        """The PNG figures of a report."""
        if self._run is not None:
            with tempfile.TemporaryDirectory() as local:  # the folder may be on gs://, and wandb reads local files
                for path in sorted(epath.Path(folder).glob("*.png")):
                    path.copy(f"{local}/{path.name}")
                    self._run.log({path.stem: self._wandb.Image(f"{local}/{path.name}")})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


@contextlib.contextmanager
def run(project: str, workdir: epath.Path, config: dict[str, Any]) -> Iterator[Run]:
    """A Run that is closed at the end of the block."""
    opened = Run(project, workdir, config)
    try:
        yield opened
    finally:
        opened.close()


def _id_of(workdir: epath.Path) -> str:
    path = workdir / ID
    if not path.exists():
        workdirs.write_atomically(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    return json.loads(path.read_text())["id"]


def _cell(value: Any) -> Any:
    """Text and numbers as they are; what a table cannot hold, such as a calibration curve, as JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)
