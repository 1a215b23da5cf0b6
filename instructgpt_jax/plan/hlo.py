"""The text of a compiled program: its instructions, how often its loops run, and which function wrote what.

XLA prints one module: computations of instructions `%name = type opcode(operands), attributes`, and tables of the
Python functions and frames that instructions come from.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_PLAIN = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "opt-barrier")
_ARITHMETIC = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "and": operator.and_, "or": operator.or_,
    "minimum": min, "maximum": max,
}  # fmt: skip
_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip
FOREVER = 2**24  # a loop that a condition has not ended by then is not a counted one


class Shape(NamedTuple):
    """An array of a type; `far` where it does not lie in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    far: bool

    @property
    def bytes(self) -> float:
        return BITS[self.dtype] / 8 * math.prod(self.dims)


class Op(NamedTuple):
    """An instruction; `inner` is the text between its parentheses, `attributes` what follows them."""

    name: str
    type: str
    code: str
    operands: tuple[str, ...]
    inner: str
    attributes: str

    @property
    def shapes(self) -> list[Shape]:
        return shapes_of(self.type)

    def called(self, attribute: str) -> str:
        """The computation that an attribute names, '' = none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, in their order, and the name of the last."""

    name: str
    ops: dict[str, Op]
    root: str

    def parameters(self) -> dict[int, Op]:
        return {int(op.inner): op for op in self.ops.values() if op.code == "parameter"}


class Module(NamedTuple):
    """A program; `frames`: number of a stack frame -> functions from the innermost outwards."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, ...]]

    def functions(self, op: Op) -> tuple[str, ...]:
        """The Python functions that an instruction comes from, the innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", op.attributes)
        return self.frames.get(int(found[1]), ()) if found else ()


def shapes_of(text: str) -> list[Shape]:
    """The arrays of a type, a tuple's one after another.

    >>> shapes_of("(bf16[8,128]{1,0:T(8,128)S(1)}, s32[])")
    [Shape(dtype='bf16', dims=(8, 128), far=True), Shape(dtype='s32', dims=(), far=False)]
    """
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype in BITS:
            space = re.search(r"S\((\d+)\)", layout or "")
            sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
            found.append(Shape(dtype, sizes, bool(space) and space[1] != "5"))
    return found


def parse(text: str) -> Module:
    """The module of a text as `compiled.as_text()` returns it."""
    computations, entry, current, lines, root = {}, "", None, [], ""
    header = re.compile(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$")
    starts = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")

    def close():
        nonlocal root
        if lines:
            match = starts.match(lines[0])
            op = _op(match[2], " ".join(lines)[match.end() :])
            computations[current].ops[op.name] = op
            root = op.name if match[1] else root
            lines.clear()

    for line in text.splitlines():
        if current is None:
            match = header.match(line)
            if match and not line.startswith("HloModule"):
                current = match[2]
                entry = current if match[1] else entry
                computations[current] = Computation(current, {}, "")
        elif line == "}" or line.startswith("}, execution_thread"):
            close()
            computations[current] = computations[current]._replace(root=root)
            current = None
        elif starts.match(line):
            close()
            lines.append(line)
        elif lines:
            lines.append(line)
    return Module(computations, entry, _frames(text))


def _op(name: str, rest: str) -> Op:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inner = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    return Op(name, kind, rest[:opening], operands, inner, rest[closing + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"a compiled program must have balanced parentheses, got {text[start : start + 80]!r}")


def _frames(text: str) -> dict[int, tuple[str, ...]]:
    """Number of a frame -> functions, of the tables at the head of the text."""

    def table(title: str) -> dict[int, str]:
        start = text.find(f"\n{title}\n")
        rows = re.match(r"(?:\d+ .*\n)*", text[start + len(title) + 2 :])[0] if start >= 0 else ""
        return {int(number): row for number, _, row in (line.partition(" ") for line in rows.splitlines())}

    names = {number: name.strip('"') for number, name in table("FunctionNames").items()}
    locations = table("FileLocations").items()
    places = {number: int(re.search(r"function_name_id=(\d+)", row)[1]) for number, row in locations}
    links = {
        number: (int(re.search(r"file_location_id=(\d+)", row)[1]), int(re.search(r"parent_frame_id=(\d+)", row)[1]))
        for number, row in table("StackFrames").items()
    }
    frames = {}
    for number in links:
        chain, at = [], number
        while at in links and len(chain) < len(links):
            location, parent = links[at]
            chain.append(names.get(places.get(location, 0), ""))
            if parent == at:
                break
            at = parent
        frames[number] = tuple(chain)
    return frames


# How often a loop runs ------------------------------------------------------------------------------------------------

Value = int | None
Tuple = Callable[[int], Value]  # an element of a tuple, by its index


def evaluate(module: Module, computation: str, name: str, given: dict[int, Value | Tuple]) -> Value | Tuple:
    """A scalar of a computation, or a tuple of them, where it follows from its parameters; None = it does not."""
    op = module.computations[computation].ops[name]
    of = lambda n: evaluate(module, computation, op.operands[n], given)  # noqa: E731
    if op.code == "constant":
        text = op.inner.strip()
        if text in ("true", "false"):
            return int(text == "true")
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if op.code == "parameter":
        return given.get(int(op.inner))
    if op.code in _PLAIN:
        return of(0)
    if op.code == "tuple":
        return of
    if op.code == "get-tuple-element":
        whole = of(0)
        return whole(int(re.search(r"index=(\d+)", op.attributes)[1])) if callable(whole) else None
    if op.code in ("fusion", "call"):
        called = op.called("calls") or op.called("to_apply")
        inner = {n: of(n) for n in range(len(op.operands))}
        return evaluate(module, called, module.computations[called].root, inner)
    if op.code in _ARITHMETIC or op.code == "compare":
        a, b = of(0), of(1)
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        if op.code == "compare":
            return int(_COMPARE[re.search(r"direction=(\w+)", op.attributes)[1]](a, b))
        return _ARITHMETIC[op.code](a, b)
    return None


def trips(module: Module, computation: str, loop: Op, given: dict[int, Value | Tuple]) -> Value:
    """How often a `while` runs: by its attributes, else by counting; None where it hangs on data.

    Args:
      computation: that it stands in.
      given: what is known of the parameters of that.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    start = evaluate(module, computation, loop.operands[0], given)
    if not callable(start):
        return None
    condition, body = (module.computations[loop.called(name)] for name in ("condition", "body"))
    used: dict[int, Value] = {}

    def goes_on(values: dict[int, Value]) -> Value:
        def element(index):
            used.setdefault(index, start(index))
            return values.get(index, used[index])

        return evaluate(module, condition.name, condition.root, {0: element})

    def after(values: dict[int, Value]) -> dict[int, Value]:
        lap = evaluate(module, body.name, body.root, {0: lambda index: values.get(index)})
        return {index: lap(index) if callable(lap) else None for index in used}

    first = goes_on({})
    if not first:
        return first
    one = after(dict(used))
    if any(not isinstance(value, int) for value in (*used.values(), *one.values())):
        return None
    steps = {index: one[index] - used[index] for index in used}  # a counted loop's numbers go in equal steps
    at = lambda n: {index: used[index] + n * steps[index] for index in used}  # noqa: E731
    low, high = 0, 1
    while goes_on(at(high)):
        low, high = high, 2 * high
        if high > FOREVER:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if goes_on(at(middle)) else (low, middle)
    return high


def invariants(module: Module, computation: str, loop: Op, given: dict[int, Value | Tuple]) -> Tuple:
    """The elements of a loop's tuple that its laps hand on as they were, by their value before it."""
    start = evaluate(module, computation, loop.operands[0], given)
    body = module.computations[loop.called("body")]
    root = body.ops[body.root]

    def element(index: int) -> Value:
        if root.code != "tuple" or not callable(start):
            return None
        op = body.ops[root.operands[index]]
        while op.code in _PLAIN:
            op = body.ops[op.operands[0]]
        same = op.code == "get-tuple-element" and re.search(rf"index={index}\b", op.attributes)
        return start(index) if same and body.ops[op.operands[0]].code == "parameter" else None

    return element
