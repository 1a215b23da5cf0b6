"""Turns JSONL, and any other source, into sharded ArrayRecord, which a pod reads at random from shared storage.

    python -m instructgpt_jax.data.build --kind=comparisons --input='labels/*.jsonl.gz' --data_dir=/data/tfds

and afterwards `config.data.comparisons = ("tfds:comparisons:train",)` with `config.data.data_dir = "/data/tfds"` (or
`$TFDS_DATA_DIR`). `--valid` and `--test` add those splits. Other sources are named as in a configuration,
`--input=hf:ID:train`. Every record is checked as `data/schema.py` says before one is written, K may differ from record
to record, and optional fields, `messages` among them, come back as they were. The sets are ordinary TFDS data sets:
they carry their own description, so that reading needs neither this module nor TensorFlow. TFDS writes the
records in the order of a hash of their keys: the same input gives the same order.

    python -m instructgpt_jax.data.build --kind=pretraining --format=tokens --input='text/*.jsonl.gz' \\
        --tokenizer=openai-community/gpt2 --data_dir=/data/text

writes text as token shards (`data/build_tokens.py`), for `config.data.pretraining = ("tokens:/data/text/*.tokens",)`. A
run then reads the sequences that it trains on and nothing else. On N hosts `--part=1/N` to `--part=N/N` write together
into one folder. `--verify --input='tokens:/data/text/*.tokens'` reads all shards again and compares their checksums.
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
from instructgpt_jax.data import build_tokens, sources, tables

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
    given = {split: paths.expand_source(_source(one)) for split, one in inputs.items()}
    splits = {split: sources.load((one,), kind, skip_bad) for split, one in given.items()}
    paths.make_folder("data_dir", data_dir)
    builder = BUILDERS[kind](splits=splits, data_dir=data_dir)
    if builder.is_prepared():
        raise ValueError(f"data_dir must not hold {kind} yet, got {builder.data_path}; remove it to rebuild the set")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards or None))
    return {split: builder.info.splits[split].num_examples for split in inputs}


def _source(given: str) -> str:
    """A source of any form, or a pattern of JSONL files, as a source."""
    return given if given.partition(":")[0] in sources.FORMS else f"jsonl:{given}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        "python -m instructgpt_jax.data.build", description="Records to ArrayRecord, or text to token shards."
    )
    parser.add_argument("--kind", required=True, choices=BUILDERS)
    parser.add_argument("--input", required=True, help="pattern of the JSONL files, or source, of the split 'train'")
    parser.add_argument("--data_dir", default="", help="where TFDS sets lie, or the token shards; local or gs://")
    parser.add_argument("--skip_bad", type=int, default=0, help="malformed records that may be left out of a split")
    parser.add_argument("--format", default="array_record", choices=("array_record", "tokens"), help="what is written")
    records = parser.add_argument_group("--format=array_record")
    records.add_argument("--valid", default="", help="as --input, for the split 'valid'")
    records.add_argument("--test", default="", help="as --input, for the split 'test'")
    records.add_argument("--shards", type=int, default=0, help="files a split; 0: by size")
    ids = parser.add_argument_group("--format=tokens, of --kind=pretraining")
    ids.add_argument("--tokenizer", default="", help="directory or Hub id; WORKDIR/tokenizer is that of a run")
    ids.add_argument("--part", default="", help="I/N: the I-th of N parts, which N hosts build; all parts by default")
    ids.add_argument("--workers", type=int, default=0, help="files encoded beside each other; 0: as many as cores")
    ids.add_argument("--verify", action="store_true", help="write nothing: read --input=tokens:GLOB and its checksums")
    args = parser.parse_args(argv)
    of_tokens = {name: getattr(args, name) for name in ("tokenizer", "part", "workers", "verify")}
    of_records = {name: getattr(args, name) for name in ("valid", "test", "shards")}
    for name, value in (of_records if args.format == "tokens" else of_tokens).items():
        if value:
            parser.error(f"--{name} must not be given with --format={args.format}")
    if not args.verify and not args.data_dir:
        parser.error("--data_dir must be given")
    if args.format == "tokens":
        if args.kind != "pretraining" or not (args.verify or args.tokenizer):
            parser.error("--format=tokens must have --kind=pretraining and a --tokenizer")
        with errors.one_line():
            _tokens(args)
        return
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    inputs = {"train": args.input, "valid": args.valid, "test": args.test}
    inputs = {split: given for split, given in inputs.items() if given}
    with errors.one_line():
        counts = build(args.kind, inputs, paths.expand(args.data_dir), args.shards, args.skip_bad)
    for split, count in counts.items():
        print(f"tfds:{args.kind}:{split} has {count:,} records")


def _tokens(args: argparse.Namespace) -> None:
    """Writes token shards, or verifies them."""
    source = paths.expand_source(_source(args.input))
    if args.verify:
        form, _, pattern = source.partition(":")
        if form != "tokens":
            raise ValueError(f"--input must be tokens:GLOB for --verify, got {args.input!r}")
        print(f"{source} has {build_tokens.verify(pattern):,} shards, each as it was written")
        return
    folder, part = paths.expand(args.data_dir), build_tokens.parse_part(args.part or "1/1")
    tokenizer = paths.expand(args.tokenizer)
    made = build_tokens.build(source, tokenizer, folder, part, args.workers, args.skip_bad)
    own = f" of part {args.part}" if part.count > 1 else ""
    print(
        f"tokens:{folder.rstrip('/')}/*.tokens has {made['documents']:,} documents, {made['tokens']:,} tokens in "
        f"{len(made['shards']):,} shards{own}"
    )


if __name__ == "__main__":
    main()
