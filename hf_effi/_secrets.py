"""
What looks like a secret, by the name of a field and by its form, so that it does not get into a record, card or
recipe.

A scanner of source code (detect-secrets and the like) reports a line; here the part of a value that is secret has to
go and the rest has to stay, at every log, so the table is ours. It errs towards hiding.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence

REDACTED = "<redacted>"

#: last words of a name that make its value a secret
_LAST_WORDS = frozenset(
    "token tokens secret secrets password passwords passwd pwd passphrase pat cookie cookies bearer credential "
    "credentials auth authorization dsn apikey accesskey privatekey secretkey".split()
)
#: a key is one of a cipher or an account with such a word before it, and of a mapping or a table without
_KEY_OWNERS = frozenset(
    "api access private secret ssh signing encryption account master auth service client deploy hub wandb license "
    "app".split()
)
#: words before `token(s)` that make it a piece of a vocabulary
_VOCABULARY = frozenset(
    "eos bos pad unk sep cls mask image video audio special stop start end forced begin boi eoi prefix suffix middle "
    "im new max min num total input output prompt completion real".split()
)
#: fields of the environment that are no secret in spite of their names
_FOLDERS = frozenset({"PWD", "OLDPWD"})


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """
    Return whether a field of this name holds a secret.

    Example:
    ```python
    >>> [is_secret_name(name) for name in ("hub_token", "X-Api-Key", "apiKey", "pwd", "key", "Proxy-Authorization")]
    [True, True, True, True, True, True]
    >>> [is_secret_name(name) for name in ("eos_token", "num_tokens", "sort_key", "author", "path", "secretary")]
    [False, False, False, False, False, False]
    ```
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:200])
    words = [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in ("key", "keys"):
        return (len(words) == 1 and last == "key") or before in _KEY_OWNERS
    if last in ("token", "tokens") and before in _VOCABULARY:
        return False
    return last in _LAST_WORDS


#: a value that is nothing to hide: a number, a switch, a piece of a vocabulary, or hidden already
_INNOCENT = re.compile(r"[-+]?[0-9][0-9.,_]*%?|true|false|none|null|yes|no|nan|<[^<>]*>", re.I)
_STRONG = r"api[_-]?key|access[_-]?key|private[_-]?key|secret[_-]?key|password|passwd|passphrase|pwd"
_WEAK = r"token|secret|pat|cookie|bearer|credentials?|auth|dsn"

#: forms of known kinds; what they match goes as a whole
_FORMS = re.compile(
    r"""
    -----BEGIN[ ][A-Z0-9 ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z0-9 ]*PRIVATE[ ]KEY-----|\Z)
    | \b(?:
        hf_\w{16,}
      | sk-[\w-]{16,}
      | [sr]k_(?:live|test)_\w{16,}
      | gh[pousr]_\w{20,} | github_pat_\w{20,}
      | glpat-[\w-]{16,}
      | A(?:KIA|SIA)[0-9A-Z]{16}
      | xox[abeoprs]-[\w-]{10,}
      | AIza[\w-]{30,}
      | ya29\.[\w-]{20,}
      | npm_\w{30,}
      | pypi-[\w-]{16,}
      | dckr_pat_[\w-]{16,}
      | SG\.[\w-]{16,}\.[\w-]{16,}
      | eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+
    )
    """,
    re.X | re.S,
)
#: the parts of a text around a secret stay: (pattern, group that goes)
_AROUND: tuple[tuple[re.Pattern[str], int], ...] = (
    # User information of an address, with or without a password.
    (re.compile(r"(?<=://)([^/\s@'\"]{1,256})(?=@)"), 1),
    # Signatures and keys in the query of an address.
    (
        re.compile(
            r"[?&](?:[\w-]{0,64}?(?:token|key|secret|password|signature|credential|auth)|sig|code)=([^&\s'\"#]+)", re.I
        ),
        1,
    ),
    (re.compile(r"\bBasic\s+(?=[A-Za-z0-9+/]{0,256}?(?:[0-9=+/]|[a-z][A-Z]))([A-Za-z0-9+/]{8,}={0,2})"), 1),
    (re.compile(r"\bBearer\s+(?=\S{0,256}?[0-9])([\w.~+/-]{8,}=*)", re.I), 1),
    # Headers: `Authorization: ...`, `X-Api-Key: ...`, `Cookie: ...`, to the end of the line or quotation.
    (
        re.compile(
            r"\b(?:proxy-)?authorization\s*+:\s*+([^\r\n'\"<][^\r\n'\"]*)|\b(?:set-)?cookie\s*+:\s*+([^\r\n'\"<][^\r\n'\"]*)",
            re.I,
        ),
        0,
    ),
    # `api_key: ...`, `'password': '...'`, `NAME_API_KEY=...`, `--password ...`
    (re.compile(rf"(?:\b|_)(?:{_STRONG})['\"]?(?:\s*[:=]\s*|(?<=['\"])\s+)['\"]?([^\s'\",;&}}\])]+)", re.I), 1),
    (re.compile(rf"--[\w-]{{0,64}}?(?:{_STRONG}|token|secret)(?:\s+|=)['\"]?([^\s'\"]+)", re.I), 1),
)
#: `token = ...`, `'token': '...'`: such words are ordinary too, so the value has to look like a key
_WEAK_ASSIGNMENT = re.compile(
    rf"(?<![\w-])([\w-]{{0,64}}?(?:{_WEAK}))(['\"]?\s*[:=]\s*['\"]?)((?=[^\s'\",;&}}\])]{{0,256}}?[0-9])(?=[^\s'\",;&}}\])]{{0,256}}?[A-Za-z])[^\s'\",;&}}\])]{{8,}})",
    re.I,
)
#: a part of every match of the patterns above: a text without one of these is searched once and not ten times
_ANY = re.compile(
    r"""
    private[ ]key | hf_ | sk- | k_live_ | k_test_ | gh[pousr]_ | glpat- | akia | asia | xox | aiza | ya29 | npm_
    | pypi- | sg\. | eyj | :// | sig= | code= | basic | key | pass | pwd | signature | auth
    | """
    + _WEAK,
    re.X | re.I,
)
#: nothing that is searched may be longer: patterns look ahead
_LONGEST = 2**20


def hide_in_text(text: str, secrets: Sequence[str] | None = None) -> str:
    """
    Return a text without the parts of it that look like secrets, and without values of secret environment variables.

    Args:
        text (`str`): Any text.
        secrets (`Sequence[str]`, *optional*): What [`secrets_of_environment`] returned, for many texts in a row.

    Example:
    ```python
    >>> hide_in_text("curl -H 'X-Api-Key: abc' https://me:pass@host/x?sig=abc&page=2")
    "curl -H 'X-Api-Key: <redacted>' https://<redacted>@host/x?sig=<redacted>&page=2"
    >>> hide_in_text("eos_token=<end>, num_tokens=128, Basic training, the next token: a")
    'eos_token=<end>, num_tokens=128, Basic training, the next token: a'
    ```
    """
    for secret in secrets_of_environment() if secrets is None else secrets:
        text = text.replace(secret, REDACTED)
    if len(text) > _LONGEST:
        return "".join(hide_in_text(text[at : at + _LONGEST], ()) for at in range(0, len(text), _LONGEST))
    if not _ANY.search(text):
        return text
    text = _FORMS.sub(REDACTED, text)
    for pattern, group in _AROUND:
        text = pattern.sub(_without(group), text)
    return _WEAK_ASSIGNMENT.sub(_weak, text)


def _without(group: int) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        number = group or next(i for i, found in enumerate(match.groups(), 1) if found is not None)
        if _INNOCENT.fullmatch(match[number]):
            return match[0]
        start, end = match.start(number) - match.start(), match.end(number) - match.start()
        return match[0][:start] + REDACTED + match[0][end:]

    return replace


def _weak(match: re.Match[str]) -> str:
    if not is_secret_name(match[1]) or _INNOCENT.fullmatch(match[3]):
        return match[0]
    return f"{match[1]}{match[2]}{REDACTED}"


def secrets_of_environment() -> list[str]:
    """Return the values of the environment variables whose names say that they are secret, the longest first."""
    found = (value for name, value in os.environ.items() if name not in _FOLDERS and is_secret_name(name))
    return sorted((value for value in found if len(value) >= 8), key=len, reverse=True)
