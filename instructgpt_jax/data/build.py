"""Turns JSONL, and any other source, into sharded ArrayRecord, which a pod reads at random from shared storage.

    python -m instructgpt_jax.data.build --kind=comparisons --input='labels/*.jsonl.gz' --data_dir=/data/tfds

and afterwards `config.data.comparisons = ("tfds:comparisons:train",)` with `config.data.data_dir = "/data/tfds"` (or
`$TFDS_DATA_DIR`). `--valid` and `--test` add those splits. Other sources are named as in a configuration,
`--input=hf:ID:train`. Every record is checked as `data/schema.py` says before one is written, K may differ from record
to record, and optional fields, `messages` among them, come back as they were. The sets are ordinary TFDS data sets:
they carry their own description, so that reading needs neither this module nor TensorFlow. TFDS writes the
records in the order of a hash of their keys: the same input gives the same order.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from instructgpt_jax import errors, paths
from instructgpt_jax.data import sources, tables

_TEXT = tfds.features.Text()


class _FromRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes `splits` (name -> records): the fields of `FEATURES` as they are, all others as one JSON text.

    A text that a record lacks, since it has messages, is written empty.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)  # TFDS would look for it with a package that it does not depend on
    FEATURES: dict[str, Any]

    def __init__(self, *, splits: dict[str, sources.Records], data_dir: str):
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.FEATURES | {tables.EXTRA_FIELDS: _TEXT})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {name: self._generate_examples(records) for name, records in self._splits.items()}

    def _generate_examples(self, records: sources.Records) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, record in enumerate(records):
            own = {field: record.get(field, "") for field in self.FEATURES}
            yield i, own | {tables.EXTRA_FIELDS: json.dumps({k: v for k, v in record.items() if k not in own})}


class Demonstrations(_FromRecords, skip_registration=True):
    """Prompts with the completion that a labeler wrote."""

    FEATURES = {"prompt": _TEXT, "completion": _TEXT}


class Comparisons(_FromRecords, skip_registration=True):
    """Prompts with K completions and their ranks, 1 = best."""

    FEATURES = {
        "prompt": _TEXT,
        "completions": tfds.features.Sequence(_TEXT),
        "ranking": tfds.features.Sequence(np.int64),
    }


class Prompts(_FromRecords, skip_registration=True):
    """Prompts alone."""

    FEATURES = {"prompt": _TEXT}


class Pretraining(_FromRecords, skip_registration=True):
    """Plain text."""

    FEATURES = {"text": _TEXT}


BUILDERS = {
    "demonstrations": Demonstrations,
    "comparisons": Comparisons,
    "prompts": Prompts,
    "pretraining": Pretraining,
}


def build(kind: str, inputs: dict[str, str], data_dir: str, shards: int, skip_bad: int) -> dict[str, int]:
    """Writes a data set of one kind.

    Args:
      kind: key of `BUILDERS`, and the name of the data set.
      inputs: a pattern of JSONL files, or a source of any form, for each split.
      data_dir: where TFDS sets lie.
      shards: files a split is cut into; 0 leaves it to TFDS, which goes by size.
      skip_bad: malformed records that may be left out of a split.
    Returns:
      The number of records of each split.
    Raises:
      ValueError: a malformed input (file and line), or a set of this kind that is there already.
    """
    given = {split: one if one.partition(":")[0] in sources.FORMS else f"jsonl:{one}" for split, one in inputs.items()}
    splits = {split: sources.load((paths.expand_source(one),), kind, skip_bad) for split, one in given.items()}
    paths.make_folder("data_dir", data_dir)
    builder = BUILDERS[kind](splits=splits, data_dir=data_dir)
    if builder.is_prepared():
        raise ValueError(f"data_dir must not hold {kind} yet, got {builder.data_path}; remove it to rebuild the set")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards or None))
    return {split: builder.info.splits[split].num_examples for split in inputs}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser("python -m instructgpt_jax.data.build", description="Records to ArrayRecord.")
    parser.add_argument("--kind", required=True, choices=BUILDERS)
    parser.add_argument("--input", required=True, help="pattern of the JSONL files, or source, of the split 'train'")
    parser.add_argument("--valid", default="", help="the same for 'valid'")
    parser.add_argument("--test", default="", help="the same for 'test'")
    parser.add_argument("--data_dir", required=True, help="where TFDS sets lie, local or gs://")
    parser.add_argument("--shards", type=int, default=0, help="files a split; 0: by size")
    parser.add_argument("--skip_bad", type=int, default=0, help="malformed records that may be left out of a split")
    args = parser.parse_args(argv)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    inputs = {"train": args.input, "valid": args.valid, "test": args.test}
    inputs = {split: given for split, given in inputs.items() if given}
    with errors.one_line():
        counts = build(args.kind, inputs, paths.expand(args.data_dir), args.shards, args.skip_bad)
    for split, count in counts.items():
        print(f"tfds:{args.kind}:{split} has {count:,} records")


if __name__ == "__main__":
    main()
