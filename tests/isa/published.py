"""Evaluates AMD's published pseudo-code of an instruction (the text of the CDNA4 ISA document, in
tinygrad's wheel) for one lane: an oracle that shares nothing with the executor."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np

_TOKEN = re.compile(
    r"\s*(?:(//[^\n]*)|(\d+'[0-9.xA-Fa-f]+[UF]?|\d+'[UIFB]\b|0x[0-9a-fA-F]+[UL]*|\d+\.\d+F?"
    r"|\d+[ULF]*|\.\w+|\w+|\*\*|<<|>>|<>|<=|>=|==|!=|&&|\|\||\+=|-=|.))"
)
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


class Unreadable(ValueError):
    """Pseudo-code that this does not understand."""


def _bits(value: Any, kind: str, width: int) -> int:
    """The bits of a value of type `kind`: "f", "bf", "u", "i" or "b"."""
    if kind == "f":
        return int(np.array(value, FLOATS[width]).view(f"u{width // 8}"))
    if kind == "bf":
        x = int(np.array(value, np.float32).view(np.uint32))
        return x >> 16 | 0x40 if np.isnan(value) else x + 0x7FFF + (x >> 16 & 1) >> 16
    if isinstance(value, (float, np.floating)):
        raise Unreadable("a number with a point where bits are wanted")
    return int(value) & (1 << width) - 1


def _typed(bits: int, kind: str, width: int) -> Any:
    """The reverse of _bits."""
    bits &= (1 << width) - 1
    if kind == "f":
        return np.array(bits, f"u{width // 8}").view(FLOATS[width])[()]
    if kind == "bf":
        return np.array(bits << 16, np.uint32).view(np.float32)[()]
    return bits - (1 << width) if kind == "i" and bits >> width - 1 else bits


def _exponent(x: Any) -> int:
    return (_bits(x, "f", 32) >> 23) & 255


def _to_int(x: Any, low: int, high: int) -> int:
    if np.isnan(x):
        return 0
    whole = math.trunc(float(x)) if np.isfinite(x) else math.copysign(1 << 70, x)
    return int(max(low, min(high, whole)))


def _max(a: Any, b: Any) -> Any:
    if np.isnan(a) or np.isnan(b):
        return b if np.isnan(a) else a
    minus_zero = a == 0 and np.signbit(a) and not np.signbit(b)
    return a if a >= b and not minus_zero else b


def _fma(a: Any, b: Any, c: Any) -> Any:
    """Rounded once, by exact fractions."""
    numbers = np.isfinite(a) and np.isfinite(b) and np.isfinite(c)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) if numbers else 0
    if exact == 0:
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    guess = np.float32(float(exact))
    if not np.isfinite(guess) and abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        return guess
    ends = (np.float32(-np.inf), guess, np.float32(np.inf))
    near = [x for x in (np.nextafter(guess, end) for end in ends) if np.isfinite(x)]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - exact), _bits(x, "f", 32) & 1))


FUNCTIONS = {
    "fma": _fma,
    "abs": abs,
    "sign": lambda x: int(np.signbit(x)),
    "exponent": _exponent,
    "isNAN": lambda x: bool(np.isnan(x)),
    "isSignalNAN": lambda x: False,
    "isQuietNAN": lambda x: bool(np.isnan(x)),
    "cvtToQuietNAN": lambda x: x,
    "floor": np.floor,
    "trunc": np.trunc,
    "sqrt": np.sqrt,
    "log2": np.log2,
    "ldexp": lambda x, n: np.float32(np.ldexp(np.float64(x), n)),
    "pow": lambda a, b: np.float32(np.power(np.float64(a), np.float64(b))),
    "isEven": lambda x: bool(np.isfinite(x)) and int(x) % 2 == 0,
    "fract": lambda x: x - np.floor(x),
    "f32_to_u32": lambda x: _to_int(x, 0, 2**32 - 1),
    "f32_to_i32": lambda x: _to_int(x, -(2**31), 2**31 - 1),
    "u32_to_f32": np.float32,
    "i32_to_f32": np.float32,
    "f32_to_f16": lambda x: np.float16(x),
    "f16_to_f32": lambda x: np.float32(x),
    "f32_to_bf16": lambda x: x,
    "bf16_to_f32": lambda x: x,
    "v_max_f32": _max,
    "v_min_f32": lambda a, b: -_max(-a, -b),
    "v_min3_f32": lambda a, b, c: -_max(_max(-a, -b), -c),
    "v_max3_f32": lambda a, b, c: _max(_max(a, b), c),
    "v_minimum_f32": lambda a, b: np.minimum(a, b),
    "v_maximum_f32": lambda a, b: np.maximum(a, b),
    "sin": lambda x: np.float32(np.sin(np.float64(x))),
    "cos": lambda x: np.float32(np.cos(np.float64(x))),
    "v_max_i32": max,
    "v_min_i32": min,
    "v_max_u32": max,
    "v_min_u32": min,
    "signext": lambda x: x,
    "signext_from_bit": lambda x, n: (x & (1 << n) - 1) - (1 << n if n and x >> n - 1 & 1 else 0),
    "u8_to_f32": np.float32,
}
_TYPE = re.compile(r"\.(u|i|f|b|bf)(\d+)$")


class Lane:
    """One lane: the bits of each name, as "S0", "D0", "SCC"."""

    def __init__(self, names: dict[str, int], lane: int = 0):
        self.names = dict(names)
        self.plain: dict[str, Any] = {"laneId": lane, "ROUND_MODE": 0, "ROUND_NEAREST_EVEN": 0}

    def run(self, text: str) -> dict[str, int]:
        """The names after `text`. Raises Unreadable."""
        self.tokens = [t[1] for t in _TOKEN.findall(text) if t[1].strip()]
        self.at = 0
        self._block(True)
        if self.at < len(self.tokens):
            raise Unreadable(self.tokens[self.at])
        return self.names

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self, want: str | None = None) -> str:
        token = self._peek()
        if want is not None and token != want:
            raise Unreadable(f"{token!r} where {want!r} is wanted")
        self.at += 1
        return token

    def _block(self, live: bool) -> None:
        while self._peek() not in ("", "endif", "elsif", "else", "endfor"):
            self._statement(live)
            if self._peek() == ";":
                self._take()

    def _statement(self, live: bool) -> None:
        token = self._peek()
        if token == "if":
            self._take()
            done = False
            while True:
                holds = bool(self._expression(live and not done)) and live and not done
                self._take("then")
                self._block(holds)
                done |= holds
                if self._peek() == "elsif":
                    self._take()
                    continue
                if self._peek() == "else":
                    self._take()
                    self._block(live and not done)
                self._take("endif")
                return
        if token == "declare":
            while self._peek() not in (";", ""):
                self._take()
            return
        if token == "for":
            self._take()
            name = self._take()
            self._take("in")
            low = self._expression(live)
            self._take(":")
            high = self._expression(live)
            self._take("do")
            begin = self.at
            for value in range(int(low), int(high) + 1) if live else range(1):
                self.at = begin
                self.plain[name] = value
                self._block(live)
            self._take("endfor")
            return
        place = self._place(live)
        operation = self._take()
        if operation not in ("=", "+=", "-="):
            raise Unreadable(f"{token} {operation}")
        value = self._expression(live)
        if live:
            changed = {"=": lambda: value, "+=": lambda: self._read(place) + value}
            changed["-="] = lambda: self._read(place) - value
            self._assign(place, changed[operation]())

    def _place(self, live: bool) -> tuple[str, int, str, int]:
        """(name, lowest bit, kind, width) of something that is written or read."""
        name, low, kind, width = self._take(), 0, "b", 0
        if not re.match(r"[A-Za-z_]\w*$", name):
            raise Unreadable(name)
        while self._peek() == "[" or _TYPE.match(self._peek()):
            if self._peek() == "[":
                self._take()
                high = int(self._expression(live))
                last = high
                if self._peek() == ":":
                    self._take()
                    last = int(self._expression(live))
                self._take("]")
                low, width = low + last, high - last + 1
                kind = "b"
            else:
                kind, size = _TYPE.match(self._take()).groups()
                width = int(size) if not width or kind in ("f", "bf", "i") else width
                width = width or int(size)
        return name, low, kind, width

    def _assign(self, place: tuple[str, int, str, int], value: Any) -> None:
        name, low, kind, width = place
        if name == "ROUND_MODE":
            return
        if name == "tmp" and width and name not in self.names:
            self.names[name] = (
                int(self.plain.pop(name, 0))
                if not isinstance(self.plain.get(name), np.floating)
                else 0
            )
        if not width:
            if name in self.names and name != "tmp":
                width = 1 if name == "SCC" else 64 if name == "VCC" else 32
            else:
                self.plain[name] = value
                return
        bits = _bits(
            value, kind if kind != "b" or not isinstance(value, np.floating) else "f", width
        )
        old = self.names.get(name, 0)
        self.names[name] = old & ~((1 << width) - 1 << low) | bits << low

    def _read(self, place: tuple[str, int, str, int]) -> Any:
        name, low, kind, width = place
        if name in self.plain and not width:
            return self.plain[name]
        if name in self.plain:
            raw = self.plain[name]
            if isinstance(raw, np.floating):
                return raw
            return _typed(int(raw) >> low, kind, width)
        if name not in self.names:
            raise Unreadable(name)
        return _typed(self.names[name] >> low, kind, width or 64)

    _LEVELS = [
        ("||",),
        ("&&",),
        ("|",),
        ("^",),
        ("&",),
        ("==", "!=", "<>"),
        ("<", ">", "<=", ">="),
        ("<<", ">>"),
        ("+", "-"),
        ("*", "/"),
        ("**",),
    ]

    def _expression(self, live: bool) -> Any:
        condition = self._binary(0, live)
        if self._peek() == "?":
            self._take()
            yes = self._expression(live)
            self._take(":")
            no = self._expression(live)
            return yes if condition else no
        return condition

    def _binary(self, level: int, live: bool) -> Any:
        if level == len(self._LEVELS):
            return self._unary(live)
        left = self._binary(level + 1, live)
        while self._peek() in self._LEVELS[level]:
            operation = self._take()
            right = self._binary(level + 1, live)
            left = self._apply(operation, left, right) if live else 0
        return left

    @staticmethod
    def _apply(operation: str, a: Any, b: Any) -> Any:
        with np.errstate(all="ignore"):
            if operation == "/":
                return a / b if isinstance(a, np.floating) or isinstance(b, np.floating) else a // b
            if operation == "**":
                return np.float32(np.power(np.float64(a), np.float64(b)))
            return {
                "||": lambda: bool(a) or bool(b),
                "&&": lambda: bool(a) and bool(b),
                "|": lambda: int(a) | int(b),
                "^": lambda: int(a) ^ int(b),
                "&": lambda: int(a) & int(b),
                "==": lambda: a == b,
                "!=": lambda: a != b,
                "<>": lambda: a < b or a > b,
                "<": lambda: a < b,
                ">": lambda: a > b,
                "<=": lambda: a <= b,
                ">=": lambda: a >= b,
                "<<": lambda: int(a) << int(b),
                ">>": lambda: int(a) >> int(b),
                "+": lambda: a + b,
                "-": lambda: a - b,
                "*": lambda: a * b,
            }[operation]()

    def _unary(self, live: bool) -> Any:
        token = self._peek()
        if token in ("~", "!", "-", "+"):
            self._take()
            value = self._unary(live)
            return {
                "~": lambda: ~int(value),
                "!": lambda: not value,
                "-": lambda: -value,
                "+": lambda: value,
            }[token]()
        if token == "(":
            self._take()
            value = self._expression(live)
            self._take(")")
            return value
        if token == "{":
            raise Unreadable("concatenation")
        sized = re.match(r"(\d+)'([UIFB])$", token)
        if sized:
            self._take()
            self._take("(")
            value = self._expression(live)
            self._take(")")
            width, kind = int(sized[1]), sized[2].lower()
            if kind == "f":
                return (
                    FLOATS[width](value)
                    if isinstance(value, np.floating)
                    else _typed(int(value), "f", width)
                )
            return _typed(_bits(value, kind, width), kind, width)
        constant = re.match(r"(?:(\d+)')?(0x[0-9a-fA-F]+|\d+\.\d+|\d+)([ULF]*)$", token)
        if constant:
            self._take()
            if "." in constant[2] or "F" in constant[3]:
                return np.float32(constant[2]) if "F" in constant[3] else np.float64(constant[2])
            return int(constant[2], 0)
        if self.tokens[self.at + 1 : self.at + 2] == ["("]:
            name = self._take()
            if name not in FUNCTIONS:
                raise Unreadable(name)
            self._take("(")
            values = []
            while self._peek() != ")":
                values.append(self._expression(live))
                if self._peek() == ",":
                    self._take()
            self._take(")")
            with np.errstate(all="ignore"):
                return FUNCTIONS[name](*values) if live else 0
        if token == "WAVE_MODE":
            self._take()
            self._take()
            return 1
        if token == "INF":
            self._take()
            self._take() if self._peek() == ".f32" else None
            return np.float32(np.inf)
        if token == "NAN":
            self._take()
            self._take() if self._peek() == ".f32" else None
            return np.float32(np.nan)
        if token in ("OVERFLOW_F32", "UNDERFLOW_F32"):
            self._take()
            return np.float32(np.inf if token[0] == "O" else 0)
        place = self._place(live)
        return self._read(place) if live else 0
