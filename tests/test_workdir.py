"""A run's folder: one run at a time, and files that are never half written."""

import os
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from instructgpt_jax import workdir as workdirs
from instructgpt_jax.cluster import agreeing

HOLDS = "from instructgpt_jax import workdir; held = workdir.lock({!r}, print); print('held', flush=True); input()"


def test_one_run_at_a_time_in_a_workdir(tmp_path, monkeypatch):
    said = []
    with agreeing.alone(tmp_path, said.append), pytest.raises(ValueError, match="must have one run at a time"):
        monkeypatch.setattr(workdirs, "PATIENCE", 0.0)
        workdirs.lock(tmp_path, said.append)
    with agreeing.alone(tmp_path, said.append):  # the first has ended
        assert (tmp_path / workdirs.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    command = [sys.executable, "-c", HOLDS.format(str(tmp_path))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"^workdir .* got process {other.pid} on .* at work in it$"):
            workdirs.lock(tmp_path, said.append)
        monkeypatch.setattr(workdirs, "PATIENCE", 60.0)
        other.kill()
        workdirs.lock(tmp_path, said.append).close()
    assert workdirs.lock(epath.Path("gs://bucket/run"), said.append) is None


def test_a_file_is_written_where_its_link_points(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "there" / "target.json"
    link.symlink_to(target)
    for content in ("first", "second"):
        workdirs.write_atomically(link, content)
        assert link.is_symlink() and target.read_text() == content and os.listdir(tmp_path / "there") == [target.name]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    workdirs.write_atomically(pathlib.Path(pipe), "told")
    assert os.read(reader, 10) == b"told" and pipe.is_fifo()
    os.close(reader)
