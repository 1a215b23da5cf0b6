"""What `--plan` and its companions ask."""

from typing import NamedTuple


class Asked(NamedTuple):
    """The flags of a plan.

    topology: `--plan`. out: `--plan_out`, '' = plans/NAME_TOPOLOGY. size: `--plan_size`.
    records: `--plan_records`, of the stage's data; 0 = the configuration says how long the run is.
    price: `--plan_price`, dollars for a chip and hour; 0 = none is told.
    search: `--plan_search`.
    options: of the TPU compiler.
    texts: `--plan_hlo`, whether the compiled programs are written too.
    """

    topology: str
    out: str = ""
    size: str = ""
    records: int = 0
    price: float = 0.0
    search: bool = False
    options: dict[str, str] = {}
    texts: bool = False


def options(text: str) -> dict[str, str]:
    """Options of the compiler from the flags of a run, `LIBTPU_INIT_ARGS`: a plan is of what that run will compile.

    >>> options("--xla_tpu_scoped_vmem_limit_kib=65536 --xla_other")
    {'xla_tpu_scoped_vmem_limit_kib': '65536', 'xla_other': 'true'}
    """
    pairs = (flag.lstrip("-").partition("=") for flag in text.split() if flag.lstrip("-").startswith("xla"))
    return {name: value or "true" for name, _, value in pairs}
