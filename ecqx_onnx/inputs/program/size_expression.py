"""Read the size expressions of exported programs, and write them anew.

torch writes the size `2*s39` as "Mul(Integer(2), Symbol('s39', positive=True, integer=True))", and
on loading it lets sympy evaluate that text as Python. Here it is parsed, nothing is evaluated,
checked against the functions below, and printed again; torch sees only that print.

    expression = ["-"] integer | constant | function "(" argument {"," argument} ")"
    argument   = expression | string | flag "=" (integer | "True" | "False")
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 4_000  # characters of one expression; torch's own have some hundreds
DEEPEST = 40  # functions inside each other
MOST_BITS = 256  # of any number that the arithmetic could give
MOST_TERMS = 1_000  # of the expanded sum, which torch forms when it simplifies
SYMBOL = re.compile(r"(?:s|u|z|zf|zuf)\d{1,6}")

TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*)|(\d+)|'([A-Za-z0-9.+-]*)'|([(),=-]))", re.ASCII)
CONSTANTS = frozenset(("true", "false", "oo", "int_oo", "zoo"))
COMPARISONS = (
    "Equality Unequality GreaterThan LessThan StrictGreaterThan StrictLessThan"
    " Eq Ne Ge Le Gt Lt And Or Not"
)
ROUNDING = (
    "FloorDiv PythonMod Mod CleanDiv CeilDiv ModularIndexing CeilToInt FloorToInt TruncToInt"
    " TruncToFloat RoundToInt ToFloat Identity Where IntTrueDiv FloatTrueDiv ceiling floor"
)
SHIFTS = "LShift RShift"
POWERS = "Pow PowByNatural FloatPow"
FUNCTIONS = frozenset(f"Add Mul Max Min {COMPARISONS} {ROUNDING} {SHIFTS} {POWERS}".split())
SIGNS = "positive negative nonnegative nonpositive nonzero zero"
ASSUMPTIONS = frozenset(f"{SIGNS} integer real finite".split())


class NotArithmetic(ValueError):  # noqa: N818 - says what the text is
    """The text is no size expression that a traced network has."""


@dataclass(frozen=True)
class Size:
    """A checked expression.

    Attributes:
        text: printed anew, in the form that torch writes.
        bits: a bound of the largest value's length, sizes themselves taken as 63 bits.
        terms: how many products its expanded sum has.
        integer: its value where it is a plain integer, else None.
    """

    text: str
    bits: int
    terms: int
    integer: int | None = None


def print_anew(text: str) -> str:
    """Parse a size expression as torch writes it and print it again.

    Args:
        text: sympy's `srepr` of integers, symbols and arithmetic, of at most LONGEST characters.

    Returns:
        The same expression, written from the parsed tree alone.

    Raises:
        NotArithmetic: for anything else, and for numbers of more than MOST_BITS.
    """
    if len(text) > LONGEST:
        raise NotArithmetic(f"{len(text)} characters, more than {LONGEST}")
    parser = _Parser(_split_tokens(text))
    size = parser.parse_expression(0)
    parser.expect_end()
    return size.text


def _split_tokens(text: str) -> list[tuple[str, str]]:
    """(type, text) of each token; "name", "integer", "string" or the character itself."""
    tokens = []
    at = 0
    while at < len(text.rstrip()):
        found = TOKEN.match(text, at)
        if found is None:
            raise NotArithmetic(f"{text[at : at + 20]!r} is no part of an expression")
        name, integer, string, character = found.groups()
        if name is not None:
            tokens.append(("name", name))
        elif integer is not None:
            tokens.append(("integer", integer))
        elif string is not None:
            tokens.append(("string", string))
        else:
            tokens.append((character, character))
        at = found.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens; `at` is the next one."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.at = 0

    def parse_expression(self, depth: int) -> Size:
        if depth > DEEPEST:
            raise NotArithmetic(f"functions more than {DEEPEST} deep")
        kind, text = self._take_any()
        if kind == "-":
            number = -self._parse_integer(self._take("integer"))
            return _make_number(number, str(number))
        if kind == "integer":
            number = self._parse_integer(text)
            return _make_number(number, str(number))
        if kind != "name":
            raise NotArithmetic(f"{text!r} where a number or a function should be")
        if self._peek_kind() != "(":
            if text not in CONSTANTS:
                raise NotArithmetic(f"the name {text!r}")
            return Size(text, 64, 1)
        self._take("(")
        if text == "Symbol":
            return self._parse_symbol()
        if text == "Float":
            return self._parse_float()
        arguments = [self.parse_expression(depth + 1)]
        while self._peek_kind() == ",":
            self._take(",")
            arguments.append(self.parse_expression(depth + 1))
        self._take(")")
        return _make_call(text, arguments)

    def expect_end(self) -> None:
        if self.at != len(self.tokens):
            raise NotArithmetic("more than one expression")

    def _parse_symbol(self) -> Size:
        name = self._take("string")
        if not SYMBOL.fullmatch(name):
            raise NotArithmetic(f"the symbol {name!r}")
        flags = []
        while self._peek_kind() == ",":
            self._take(",")
            flag = self._take("name")
            self._take("=")
            value = self._take("name")
            if flag not in ASSUMPTIONS or value not in ("True", "False"):
                raise NotArithmetic(f"{flag}={value} at the symbol {name}")
            flags.append(f", {flag}={value}")
        self._take(")")
        return Size(f"Symbol('{name}'{''.join(flags)})", 63, 1)

    def _parse_float(self) -> Size:
        """Float('0.5', precision=53)."""
        text = self._take("string")
        try:
            value = float(text)
        except ValueError:
            raise NotArithmetic(f"the number {text[:40]!r}") from None
        if len(text) > 40 or not abs(value) < 1e30:
            raise NotArithmetic(f"the number {text[:40]!r}")
        self._take(",")
        if self._take("name") != "precision":
            raise NotArithmetic("a number without its precision")
        self._take("=")
        precision = self._parse_integer(self._take("integer"))
        if not 1 <= precision <= 113:
            raise NotArithmetic(f"{precision} bits of precision")
        self._take(")")
        return Size(f"Float('{text}', precision={precision})", 100, 1)

    def _parse_integer(self, digits: str) -> int:
        if len(digits) > 20 or int(digits) >= 2**63:
            raise NotArithmetic(f"the number {digits[:30]}")
        return int(digits)

    def _peek_kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def _take_any(self) -> tuple[str, str]:
        if self.at == len(self.tokens):
            raise NotArithmetic("it ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def _take(self, wanted: str) -> str:
        kind, text = self._take_any()
        if kind != wanted:
            raise NotArithmetic(f"{text!r} where {wanted!r} should be")
        return text


def _make_number(value: int, text: str) -> Size:
    return Size(text, max(value.bit_length(), 1), 1, value)


def _make_call(name: str, arguments: list[Size]) -> Size:
    """The call of a known function, with bounds of what sympy makes of it."""
    inner = ", ".join(argument.text for argument in arguments)
    text = f"{name}({inner})"
    bits = sum(argument.bits for argument in arguments)
    terms = sum(argument.terms for argument in arguments)
    # 1. Numbers.
    if name == "Integer":
        value = arguments[0].integer
        if len(arguments) != 1 or value is None:
            raise NotArithmetic("Integer(...) of something else")
        return _make_number(value, f"Integer({value})")
    if name == "Rational":
        values = [argument.integer for argument in arguments]
        if len(values) != 2 or None in values or not values[1]:
            raise NotArithmetic("Rational(...) of something else")
        return Size(text, bits, 1)
    if name not in FUNCTIONS:
        raise NotArithmetic(f"the function {name!r}")
    # 2. Powers and products: the length of a number, and the terms of a sum that sympy expands,
    #    grow with them.
    if name in POWERS.split():
        exponent = arguments[-1].integer
        if len(arguments) != 2 or exponent is None or not -16 <= exponent <= 16:
            raise NotArithmetic(f"{name}(...) with an exponent that is no small integer")
        bits = arguments[0].bits * max(abs(exponent), 1)
        terms = arguments[0].terms ** max(abs(exponent), 1)
    elif name in SHIFTS.split():
        shift = arguments[-1].integer
        if len(arguments) != 2 or shift is None or not 0 <= shift <= 63:
            raise NotArithmetic(f"{name}(...) by something other than 0 to 63 bits")
        bits = arguments[0].bits + shift
    elif name == "Mul":
        terms = 1
        for argument in arguments:
            terms = min(terms * argument.terms, MOST_TERMS + 1)
    elif name != "Add":
        terms = 1
    if bits > MOST_BITS * 16 or (bits > MOST_BITS and name in POWERS.split()):
        raise NotArithmetic(f"numbers of {bits} bits")
    if terms > MOST_TERMS:
        raise NotArithmetic(f"a sum of more than {MOST_TERMS} terms")
    return Size(text, bits, terms)
