"""
Texts that say the same: normalised forms, F1 of tokens, and answers of mathematics, without sympy.

All functions take any text, never raise for what is written in it, and take time linear in its length.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from .numbers import parse_number, plain_characters

#: characters of the longest answer that [`same_math`] compares as mathematics
LONGEST_MATH = 1000
#: elements of a tuple or set
MOST_ELEMENTS = 64
#: combining characters in a row; more would make the normal form of Unicode take quadratic time
_MOST_COMBINING = 30

_POWERS = {
    code: "^" + unicodedata.normalize("NFKC", chr(code)) for code in (0xB2, 0xB3, 0xB9, 0x2070, *range(0x2074, 0x207A))
}
_QUOTES = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x02BC: "'"}
_FENCE = re.compile(r"\s*+(`{3,}+|~{3,}+)[^\n`]*+\n(?P<inner>.*)\n[ \t]*+\1\s*", re.DOTALL)
_GROUPS = re.compile(r"(?<![\w.,])([0-9][0-9,]*+)(\.[0-9]++)?+(?![\w,])")
_TOKEN = re.compile(r"(?:(?<!\w)-(?=[0-9]))?+[0-9]++(?:\.[0-9]++)*+\w*+|\w++#*+|[+<>=^/%&@~|$]|[^\x00-\x7f\s]")
_ARTICLES = frozenset(("a", "an", "the"))
_UNITS = frozenset(
    """% percent percents $ € £ ¥ dollar dollars usd cent cents euro euros eur pound pounds degree degrees deg ° mm cm
    dm m km inch inches in ft foot feet yard yards mile miles meter meters metre metres centimeter centimeters
    kilometer kilometers g kg mg gram grams kilogram kilograms ton tons lb lbs oz ounce ounces l ml liter liters litre
    litres s sec second seconds min minute minutes h hr hrs hour hours day days week weeks month months year
    years mph kmh unit units square cubic""".split()
)


def without_fence(text: str) -> str:
    r"""
    Return what stands in a fence of Markdown, where the text is nothing but one.

    Example:
    ```python
    >>> without_fence("```json\n{}\n```"), without_fence("see ```x```")
    ('{}', 'see ```x```')
    ```
    """
    found = _FENCE.fullmatch(text)
    return text if found is None else found["inner"]


def normal_tokens(
    text: str, case: bool = False, punctuation: bool = False, articles: bool = False, units: bool = True
) -> list[str]:
    """
    Return the words, numbers and signs of a text, so that texts which say the same have the same ones.

    The compatibility form of Unicode (but a power stays one: `x²` is `x ^ 2`), ASCII for minus signs and quotes, no
    fence of Markdown around it, numbers without thousands commas and without zeros at the end.

    Args:
        text (`str`): Any text.
        case, punctuation, articles, units (`bool`, *optional*): Whether they count: upper and lower case; punctuation
            and decoration, without which `+ < > = ^ / & @ ~ |` and other signs still count; "a", "an" and "the" before
            a word; units, percent signs and currencies that stand beside a number.

    Example:
    ```python
    >>> normal_tokens("The answer: −1,000.50 km!"), normal_tokens("$5", units=False)
    (['answer', '-1000.5', 'km'], ['5'])
    ```
    """
    plain = _compatible(plain_characters(without_fence(text).translate(_POWERS)))
    if not case:
        plain = plain.casefold()
    plain = _GROUPS.sub(_one_number, plain)
    if punctuation:
        tokens = re.findall(r"(?:(?<!\w)-(?=[0-9]))?+[0-9]++(?:\.[0-9]++)*+\w*+|\w++|\S", plain)
    else:
        tokens = _TOKEN.findall(plain.replace("'", ""))
        tokens = [token for token in tokens if token.isascii() or not unicodedata.category(token[0]).startswith("P")]
    if not articles:
        followed = zip(tokens, [*tokens[1:], ""], strict=False)
        tokens = [token for token, after in followed if token.lower() not in _ARTICLES or not after[:1].isalnum()]
    return tokens if units else _without_units(tokens)


def _compatible(text: str) -> str:
    if text.isascii():
        return text
    run, kept = 0, []
    for char in text:
        run = run + 1 if unicodedata.combining(char) else 0
        if run <= _MOST_COMBINING:
            kept.append(char)
    return unicodedata.normalize("NFKC", "".join(kept)).translate(_QUOTES)


def _one_number(found: re.Match[str]) -> str:
    whole, point = found[1], (found[2] or "").rstrip("0")
    first, *rest = whole.split(",")
    if rest:
        if first == "0" or len(first) > 3 or any(len(piece) != 3 for piece in rest):
            return found[0]
        whole = "".join((first, *rest))
    return whole + (point if point != "." else "")


def _without_units(tokens: list[str]) -> list[str]:
    kept: list[str] = []
    for place, token in enumerate(tokens):
        beside = [tokens[place - 1] if place else "", tokens[place + 1] if place + 1 < len(tokens) else ""]
        is_unit = token.lower() in _UNITS
        if is_unit and (any(part[-1:].isdigit() for part in beside) or beside[0].lower() in _UNITS):
            continue
        joined = re.fullmatch(r"(-?[0-9.]+)([a-z]{1,12})", token, re.IGNORECASE) if len(token) < 40 else None
        kept.append(joined[1] if joined is not None and joined[2].lower() in _UNITS else token)
    return kept


def token_f1(answer: Iterable[str], gold: Iterable[str]) -> float:
    """
    Return the F1 score of two lists of tokens, as in SQuAD: `2 p r / (p + r)` of the tokens that both have.

    Two empty lists have 1, one empty list has 0. From [1606.05250](https://huggingface.co/papers/1606.05250).

    Example:
    ```python
    >>> round(token_f1(["the", "cat", "sat"], ["cat", "sat", "down", "there"]), 4)
    0.5714
    ```
    """
    said, wanted = Counter(answer), Counter(gold)
    if not said or not wanted:
        return float(not said and not wanted)
    common = sum((said & wanted).values())
    return 2.0 * common / (said.total() + wanted.total())


# --- mathematics -----------------------------------------------------------------------------------------------------

_SPACES = re.compile(r"\\[,;:! ]|~|\\q?quad\b|\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?)(?![a-zA-Z])|\\\$")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|textrm|operatorname|boxed|fbox)\s?\{([^{}]*)\}")
_DEGREES = re.compile(r"\^?\{?(?:\\circ|\u00b0)\}?")
_SHORT_FRAC = re.compile(r"\\[dtc]?frac\s?(?:(?<=frac)|\s)([0-9])\s?([0-9])(?![0-9])")
_FRAC = re.compile(r"\\[dtc]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_BRACED = re.compile(r"(\\sqrt(?:\[[^\[\]{}]*\])?|[\^_])\{([^{}]*)\}")
_ROOT = re.compile(r"\\sqrt\s?([0-9a-zA-Z])")
_SINGLE = re.compile(r"(?<![a-zA-Z])\((\w+|-?[0-9.]+)\)")
_SAME = {
    "\\cdot": "*", "\\times": "*", "\\div": "/", "\\leq": "<=", "\\le": "<=", "\\geq": ">=", "\\ge": ">=",
    "\\neq": "!=", "\\ne": "!=", "\\%": "%", "\u2264": "<=", "\u2265": ">=", "\u2260": "!=", "\u03c0": "\\pi",
    "\u221e": "\\infty", "\u221a": "\\sqrt", "\u00d7": "*", "\u00b7": "*", "\\lbrace": "\\{", "\\rbrace": "\\}",
}  # fmt: skip
_SAME_PATTERN = re.compile(
    "|".join(re.escape(key) + ("(?![a-zA-Z])" if key[-1].isalpha() else "") for key in sorted(_SAME, reverse=True))
)
_NAMED = re.compile(r"([a-zA-Z](?:_?[0-9a-z])?(?:\([a-z]\))?)=(?!=)")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def same_math(answer: str, gold: str, units: bool = False) -> bool:
    r"""
    Return whether two answers are written the same up to notation, or are equal numbers, tuples, intervals or sets.

    Notation is spaces, sizes of brackets, kinds of fractions and of multiplication signs, words in `\text`, a name in
    front (`x =`). There is no algebra: `(x+1)^2` and `x^2+2x+1` are different. Sets and lists without brackets have no
    order; tuples and intervals have one, and their brackets count. An answer of more than 1000 characters is compared
    as a text.

    Args:
        answer, gold (`str`): Of LaTeX or plain.
        units (`bool`, *optional*, defaults to `False`): Whether units, degrees, percent signs and currencies count.

    Example:
    ```python
    >>> same_math("\\dfrac34", "0.75"), same_math("(1, 2]", "(1,2)"), same_math("12\\text{ cm}", "12")
    (True, False, True)
    ```
    """
    if max(len(answer), len(gold)) > LONGEST_MATH:
        return answer.strip() == gold.strip()
    first, second = _plain_math(answer, units), _plain_math(gold, units)
    if not first or not second or units and _signs(answer) != _signs(gold):
        return False
    names = [found[1] if (found := _NAMED.match(text)) else None for text in (first, second)]
    if None in names or names[0] == names[1]:
        first, second = (_NAMED.sub("", text, count=1) if _NAMED.match(text) else text for text in (first, second))
    return _same(first, second, 3)


def _signs(text: str) -> list[str]:
    """Return percent signs and currencies, without the dollars around a formula."""
    return sorted(re.findall("%|\\\\\\$|[\u00a3\u20ac\u00a5]", text))


def _same(first: str, second: str, depth: int) -> bool:
    if first == second:
        return True
    one, other = parse_number(_bare(first)), parse_number(_bare(second))
    if one is not None or other is not None:
        return one == other
    parts, others = _elements(first), _elements(second)
    if parts is None or others is None or not depth or parts[0] != others[0] or len(parts[1]) != len(others[1]):
        return bool(first.isalpha() and first.lower() == second.lower())
    if parts[0] not in ("", "{}"):
        return all(_same(a, b, depth - 1) for a, b in zip(parts[1], others[1], strict=True))
    left = list(others[1])
    for part in parts[1]:
        place = next((i for i, candidate in enumerate(left) if _same(part, candidate, depth - 1)), None)
        if place is None:
            return False
        del left[place]
    return True


def _bare(text: str) -> str:
    return text[1:-1] if text[:1] == "(" and text[-1:] == ")" and text.count("(") == 1 else text


def _elements(text: str) -> tuple[str, list[str]] | None:
    """Return the brackets of a tuple, interval, set or bare list, and its elements; `None` for what is none."""
    brackets = ""
    inner = text.replace("\\{", "{").replace("\\}", "}")
    if inner[:1] in _PAIRS and inner[-1:] in ("]", ")", "}") and _closes_at_end(inner):
        brackets, inner = inner[0] + inner[-1], inner[1:-1]
    parts, depth, start = [], 0, 0
    for place, char in enumerate(inner):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth <= 0:
            parts.append(inner[start:place])
            start = place + 1
    parts.append(inner[start:])
    if len(parts) > MOST_ELEMENTS or (len(parts) == 1 and brackets != "{}"):
        return None
    return brackets, parts


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _plain_math(text: str, units: bool) -> str:
    text = plain_characters(text).strip().strip("$").strip()
    text = _SAME_PATTERN.sub(lambda found: _SAME[found[0]], text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\[,!]|,\\!|,)(?=[0-9]{3}(?![0-9]))", _comma_of_thousands(text), text)
    text = _SPACES.sub(" ", text)
    if not units:
        text = _DEGREES.sub("", text).replace("%", "")
        text = re.sub(r"^[$\u00a3\u20ac\u00a5]\s?", "", text.strip())
        text = _without_last_units(text)
    text = _WORDS.sub(r" \1 ", text)
    text = re.sub(r"\s(?:and|or)\s", ",", text)
    text = re.sub(r"\s+", "", text).removesuffix(".").replace("\\infty", "oo").replace("+oo", "oo")
    text = _ROOT.sub(r"\\sqrt{\1}", _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text))
    if re.search(r"[0-9]\\[dtc]?frac\{[0-9]+\}\{[0-9]+\}$", text):
        text = re.sub(r"\\[dtc]?frac", r" \\frac", text)  # a mixed number
    for _ in range(MOST_ELEMENTS):
        before = text
        text = _SINGLE.sub(r"\1", _FRAC.sub(r"((\1)/(\2))", _BRACED.sub(r"\1(\2)", text)))
        if text == before:
            break
    text = re.sub(r"\(([0-9]+/[0-9]+)\)", r"\1", text)
    return re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)


def _comma_of_thousands(text: str) -> str:
    """Return what stands for a comma between digits: nothing where the text is one number, else the comma."""
    return "" if re.fullmatch(r"[^0-9]*[0-9]{1,3}(?:(?:\{,\}|\\[,!]|,\\!|,)[0-9]{3})+(?![0-9,]).*", text) else ","


def _without_last_units(text: str) -> str:
    found = re.search(r"\\(?:text|mathrm|mbox|textrm)\s?\{([^{}]*)\}(?:\^\{?[23]\}?)?\s*\.?$", text)
    before = "" if found is None else text[: found.start()].strip()
    if before and (before[-1].isdigit() or before[-1] == "}"):
        return before
    words = text.strip().removesuffix(".").split()
    while len(words) > 1 and words[-1].lower() in _UNITS and words[0][:1] in "-.0123456789\\(":
        words.pop()
    return " ".join(words)
