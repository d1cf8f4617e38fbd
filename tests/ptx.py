"""PTX as Triton writes it, read into statements that `ptx_machine` executes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

# What numpy has no name for, bf16, is read as fp32.
DTYPES: dict[str, np.dtype[Any]] = {"pred": np.dtype(bool)} | {
    f"{kind}{width}": np.dtype(f"{code}{width // 8}")
    for kind, code, widths in (("u", "u", 8), ("b", "u", 8), ("s", "i", 8), ("f", "f", 16))
    for width in (8, 16, 32, 64)
    if width >= widths
}


class Vector(NamedTuple):
    """{a, b, ...}"""

    parts: tuple[Operand, ...]


class Address(NamedTuple):
    """[base + offset]; the base is a register, a parameter or shared memory."""

    base: str
    offset: int


class Immediate(NamedTuple):
    """A number's bits, as many as its instruction takes."""

    bits: int


Operand = str | Immediate | Vector | Address


class Statement(NamedTuple):
    """An instruction; `text` is what it was."""

    guard: str  # the predicate that a lane needs, or ""
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


@dataclass
class Program:
    """One kernel: widths in bits of its parameters, in order, and registers; statements, and where labels lead."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


IGNORED = re.compile(r"^\s*\.(loc|file|pragma|section).*$|//.*$", re.MULTILINE)
PARAMETER = re.compile(r"\.param \.(?:u|s|b|f)(\d+)[^,\n]*?(\w+)\s*[,\n]")
TOKEN = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):(?!:)|(?P<statement>[^;{}]+(?:\{[^}]*\}[^;{}]*)*);)"
)
NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)U?")


def parse(text: str) -> Program:
    """The one kernel of a module."""
    text = IGNORED.sub("", text)
    header, body = text[text.index(".entry") :].split("\n{", 1)
    name = re.search(r"\.entry (\w+)", header)
    assert name
    program = Program(name[1])
    for width, parameter in PARAMETER.findall(header):
        program.parameters[parameter] = int(width)
    # Assembly written by hand has registers and labels of its own between braces, and may stand more than once.
    scopes: list[str] = [""]
    opened, jumps = 0, []
    position = 0
    while found := TOKEN.match(body, position):
        position = found.end()
        if found["open"]:
            opened += 1
            scopes.append(f"#{opened}")
        elif found["close"]:
            scopes.pop()
            if not scopes:
                break
        elif found["label"]:
            program.labels[found["label"] + scopes[-1]] = len(program.statements)
        elif (statement := found["statement"].strip()).startswith(".reg"):
            _declare(program, statement, scopes[-1])
        else:
            jumps.append(list(scopes))
            program.statements.append(_statement(program, statement, scopes))
    assert not scopes, f"not understood: {body[position : position + 80]!r}"
    for index, (statement, seen) in enumerate(zip(program.statements, jumps, strict=True)):
        if statement.opcode[0] == "bra":
            (target,) = statement.operands
            assert isinstance(target, str)
            inner = next(target + scope for scope in reversed(seen) if target + scope in program.labels)
            program.statements[index] = statement._replace(operands=(inner,))
    return program


def _declare(program: Program, statement: str, scope: str) -> None:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    width = 1 if kind == "pred" else int(kind[1:])
    for name in names.split(","):
        name = name.strip()
        if counted := re.match(r"(%\w+)<(\d+)>", name):
            program.registers |= {f"{counted[1]}{i}": width for i in range(int(counted[2]))}
        else:
            program.registers[name + scope] = width


def _statement(program: Program, text: str, scopes: list[str]) -> Statement:
    text = " ".join(text.split())
    found = re.match(r"(?:@(!?)([%\w]+) )?([\w.:]+) ?(.*)", text)
    assert found, text
    negated, guard, opcode, rest = found.groups()
    operands = tuple(_operand(program, each, scopes) for each in _split(rest))
    return Statement(
        _name(program, guard, scopes) if guard else "", bool(negated), tuple(opcode.split(".")), operands, text
    )


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text) if part.strip()]


def _name(program: Program, name: str, scopes: list[str]) -> str:
    for scope in reversed(scopes):
        if name + scope in program.registers:
            return name + scope
    return name


def _operand(program: Program, text: str, scopes: list[str]) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(program, part, scopes) for part in _split(text[1:-1])))
    if text[0] == "[":
        base, _, offset = (part.strip() for part in text[1:-1].replace("+ -", "+-").partition("+"))
        return Address(_name(program, base, scopes), int(offset or "0"))
    if text[:2] in ("0f", "0d"):
        return Immediate(int(text[2:], 16))
    if NUMBER.fullmatch(text):
        return Immediate(int(text.removesuffix("U"), 0))
    return _name(program, text, scopes)
