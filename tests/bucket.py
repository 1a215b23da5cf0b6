"""A bucket in memory, where `gs://` leads: one class for all tests, since epath keeps the first that it meets."""

import re
import sys

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Attributes:
    asked: bytes of each range that was read.
    """

    protocol = ("gcs", "gs")
    store, pseudo_dirs, asked = {}, [""], []

    def __init__(self, finalize_on_close=True, **options):
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(re.sub(r"^gc?s://", "memory://", path))

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode, "an object store cannot append"
        return super()._open(path, mode, **options)

    def cat_file(self, path, start=None, end=None, **more):
        if start is not None:
            self.asked.append(end - start)
        return super().cat_file(path, start, end, **more)


def install(monkeypatch) -> Bucket:
    """An empty one, for the length of a test."""
    for name in Bucket.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, Bucket)
    Bucket.store.clear()
    Bucket.asked.clear()
    return Bucket()
