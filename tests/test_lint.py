"""Rules that every Triton kernel keeps, read off the source. Each rule has an example that breaks it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))
SOURCE_FILES = sorted(p for package in ("fused_ops", "models", "bench") for p in (ROOT / package).rglob("*.py"))


def called_name(call: ast.Call) -> str:
    """Last part of the called name: `load` of `tl.load(...)`."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called_name(node) in names:
            yield node


def jit_functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
            if any(ast.unparse(d) in ("triton.jit", "jit") for d in decorators):
                yield node


def loads_without_other(tree: ast.AST) -> list[str]:
    """Masked-out lanes then hold anything on a GPU, but zeros in the interpreter: no test would notice."""
    found = []
    for function in jit_functions(tree):
        for load in calls(function, "load"):
            keywords = {keyword.arg for keyword in load.keywords}
            masked = "mask" in keywords or len(load.args) > 1
            if masked and "other" not in keywords and len(load.args) < 3:
                found.append(f"line {load.lineno}: masked load without other=")
    return found


def block_pointers(tree: ast.AST) -> list[str]:
    names = ("make_block_ptr", "advance")
    return [f"line {call.lineno}: {called_name(call)}" for call in calls(tree, *names)]


def autotuned(tree: ast.AST) -> list[str]:
    """Autotuning makes users wait, and raises without a GPU; a single configuration is no tuning."""
    found = []
    for call in calls(tree, "autotune"):
        configs = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "configs")]
        if not (configs and isinstance(configs[0], ast.List) and len(configs[0].elts) == 1):
            found.append(f"line {call.lineno}: autotune over several configurations")
    return found


# OFFSET is a kernel's constant: int32 where the launch's plan knows that no offset passes 31 bits.
WIDE_ENOUGH = ("tl.int64", "OFFSET")


class NarrowStrideProducts(ast.NodeVisitor):
    """Finds products of a stride with an index that comes from a program id and is still 32 bits wide.

    `width` maps each local name to 64 (made int64), 32 (from a program id, not made int64) or 0 (neither);
    arithmetic takes the widest of its operands. What the project's own helpers return is unknown, hence 0.
    """

    def __init__(self) -> None:
        self.width: dict[str, int] = {}
        self.found: list[str] = []

    def width_of(self, node: ast.expr) -> int:
        match node:
            case ast.Name(id=name):
                return self.width.get(name, 0)
            case ast.Call(func=ast.Attribute(value=value, attr="to"), args=[dtype, *_]):
                return 64 if ast.unparse(dtype) in WIDE_ENOUGH else self.width_of(value)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr=name)):
                return 32 if name == "program_id" else max(map(self.width_of, node.args), default=0)
            case ast.BinOp(left=left, right=right):
                return max(self.width_of(left), self.width_of(right))
            case ast.UnaryOp(operand=operand) | ast.Subscript(value=operand):
                return self.width_of(operand)
            case ast.IfExp(body=body, orelse=orelse):
                return max(self.width_of(body), self.width_of(orelse))
        return 0

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.width[target.id] = self.width_of(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self.width[node.target.id] = max(self.width_of(node.target), self.width_of(node.value))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult):
            for index, other in ((node.left, node.right), (node.right, node.left)):
                names = {name.id for name in ast.walk(other) if isinstance(name, ast.Name)}
                if self.width_of(index) == 32 and any(name.startswith("stride_") for name in names):
                    self.found.append(f"line {node.lineno}: {ast.unparse(node)} before a cast to int64")


def narrow_stride_products(tree: ast.AST) -> list[str]:
    """Tensors may pass 2^31 elements: an offset is int64 before it meets a stride."""
    found = []
    for function in jit_functions(tree):
        visitor = NarrowStrideProducts()
        visitor.visit(function)
        found += visitor.found
    return found


def _copies(statement: ast.stmt) -> set[tuple[str, str]]:
    """(a, b) of every plain a = b in an assignment."""
    if not isinstance(statement, ast.Assign):
        return set()
    pairs = set()
    for target in statement.targets:
        several = isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple)
        both = zip(target.elts, statement.value.elts, strict=True) if several else [(target, statement.value)]  # pyright: ignore
        pairs |= {(a.id, b.id) for a, b in both if isinstance(a, ast.Name) and isinstance(b, ast.Name)}
    return pairs


def copies_around_loops(tree: ast.AST) -> list[str]:
    """A variable that a loop sets, by name alone, to what it was before the loop: Triton compares the two, finds them
    the same and leaves the variable as it is in every round. Interpreted, it follows."""
    found = []
    for function in jit_functions(tree):
        loops = [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.While) or (isinstance(node, ast.For) and not list(calls(node.iter, "static_range")))
        ]
        for loop in loops:
            before = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node.lineno < loop.lineno]
            inside = [node for part in loop.body for node in ast.walk(part) if isinstance(node, ast.stmt)]
            earlier = set().union(*map(_copies, before))
            both = earlier & set().union(*map(_copies, inside))
            found += [
                f"line {loop.lineno}: {a} = {b} before and in the loop"
                for a, b in sorted(both)
                if _carried(function, loop, a)
            ]
    return found


def _carried(function: ast.FunctionDef, loop: ast.For | ast.While, name: str) -> bool:
    """Whether one round of the loop hands the variable to the next, or to what follows."""
    uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
    lines = [node.lineno for node in uses if isinstance(node.ctx, ast.Load)]
    end = loop.end_lineno or loop.lineno
    first_set = min(n.lineno for n in uses if isinstance(n.ctx, ast.Store) and loop.lineno < n.lineno <= end)
    return any(loop.lineno < line < first_set or line > end for line in lines)


RULES = [loads_without_other, block_pointers, autotuned, narrow_stride_products, copies_around_loops]


def test_there_are_kernels_to_check():
    assert sum(len(list(jit_functions(ast.parse(path.read_text())))) for path in KERNEL_FILES) > 0


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_kernels(rule, path):
    assert rule(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_autotuning_outside_kernels(path):
    assert autotuned(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_live_in_kernels(path):
    assert [function.name for function in jit_functions(ast.parse(path.read_text()))] == []


HEAD = """
@triton.jit
def kernel(x_ptr, y_ptr, n, stride_n, stride_c, BLOCK: tl.constexpr):
    pid_n = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
"""

BAD = {
    "mask by keyword": (loads_without_other, "x = tl.load(x_ptr + offs, mask=offs < n)"),
    "mask by position": (loads_without_other, "x = tl.load(x_ptr + offs, offs < n)"),
    "make_block_ptr": (block_pointers, "block = tl.make_block_ptr(x_ptr, (n,), (1,), (0,), (BLOCK,), (0,))"),
    "advance": (block_pointers, "block = tl.advance(x_ptr, (BLOCK,))"),
    "direct product": (narrow_stride_products, "x_ptr += pid_n * stride_n"),
    "stride first": (narrow_stride_products, "x_ptr += stride_n * tl.program_id(1)"),
    "through names": (
        narrow_stride_products,
        "rows = pid_n * BLOCK + offs\n    x_ptr += rows[:, None] % n * stride_n",
    ),
    "cast to another constant": (narrow_stride_products, "x_ptr += pid_n.to(INDEX) * stride_n"),
    "cast too late": (narrow_stride_products, "x_ptr += (pid_n * stride_n).to(tl.int64)"),
    "augmented": (narrow_stride_products, "row = 0\n    row += pid_n\n    x_ptr += row * stride_n"),
    "in a loop": (
        narrow_stride_products,
        "for i in range(n):\n        x_ptr += tl.cdiv(pid_n, 2) * stride_n",
    ),
    "copied before and in a loop": (
        copies_around_loops,
        "before, m = offs, n\n    for i in range(n):\n        m += before\n        before, offs = offs, offs + 1",
    ),
}

GOOD = {
    "other by keyword": (loads_without_other, "x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)"),
    "other by position": (loads_without_other, "x = tl.load(x_ptr + offs, offs < n, 0.0)"),
    "no mask": (loads_without_other, "x = tl.load(x_ptr + offs)"),
    "cast at once": (narrow_stride_products, "x_ptr += pid_n.to(tl.int64) * stride_n"),
    "cast on the way": (
        narrow_stride_products,
        "row = pid_n.to(tl.int64) * BLOCK + offs\n    x_ptr += row * stride_n",
    ),
    "cast to what the plan chose": (narrow_stride_products, "x_ptr += pid_n.to(OFFSET) * stride_n"),
    "no program id": (narrow_stride_products, "x_ptr += offs * stride_n"),
    "another value before the loop": (
        copies_around_loops,
        "before = offs * 0\n    for i in range(n):\n        n += before\n        before, offs = offs, offs + 1",
    ),
    "an unrolled loop": (
        copies_around_loops,
        "before = offs\n    for i in tl.static_range(4):\n        n += before\n        before, offs = offs, offs + 1",
    ),
    "set anew in each round": (copies_around_loops, "m = n\n    for i in range(n):\n        m = n\n        m += 1"),
}


@pytest.mark.parametrize(("rule", "line"), BAD.values(), ids=BAD)
def test_rule_finds(rule, line):
    assert len(rule(ast.parse(f"{HEAD}    {line}\n"))) == 1


@pytest.mark.parametrize(("rule", "line"), GOOD.values(), ids=GOOD)
def test_rule_allows(rule, line):
    assert rule(ast.parse(f"{HEAD}    {line}\n")) == []


@pytest.mark.parametrize(
    ("decorator", "count"),
    [
        ("@triton.autotune([triton.Config({}), triton.Config({})], key=[])", 1),
        ("@triton.autotune(configs=CONFIGS, key=[])", 1),
        ("@triton.autotune(configs=[triton.Config({})], key=[])", 0),
    ],
)
def test_rule_on_autotuning(decorator, count):
    assert len(autotuned(ast.parse(f"{decorator}{HEAD}    pass\n"))) == count
