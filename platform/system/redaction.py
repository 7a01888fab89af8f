"""Redact secrets in text that leaves a run: parameters, tags, reasons, configurations.

A value is a secret if its name says so, if it looks like a key, or if an environment variable with
such a name holds it. Redacting too much costs a parameter in a table; too little costs an account.
"""

from __future__ import annotations

import itertools
import os
import re

REDACTED = "***"

# A name is secret if one of its words is: hf_token, aws.secretAccessKey, MLFLOW_..._PASSWORD.
_WORDS = {
    "token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential",
    "credentials", "apikey", "authorization", "bearer", "cookie", "signature",
}  # fmt: skip
_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("account", "key"),
          ("shared", "key"), ("encryption", "key"), ("auth", "key"),
          ("session", "key")}  # fmt: skip

_SHAPES = re.compile(
    r"""(?x)
    (?<![A-Za-z0-9])(?:
        (?:AKIA|ASIA)[0-9A-Z]{16}                       # Amazon
      | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{20,}
      | hf_[A-Za-z0-9]{20,} | sk-[\w-]{20,} | xox[abprs]-[\w-]{10,}
      | AIza[\w-]{30,} | ya29\.[\w-]{20,} | dapi[0-9a-f]{32} | npm_[A-Za-z0-9]{30,}
      | pypi-[\w-]{30,} | dckr_pat_[\w-]{20,} | (?:sk|rk|pk)_(?:live|test)_\w{16,}
      | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+              # JSON web token
    )
    | -----BEGIN[ A-Z]*PRIVATE[ ]KEY-----.*?(?:-----END[ A-Z]*-----|\Z)
    """,
    re.DOTALL,
)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s\"'?#]+@")
# name=value, "name": "value", --name value; a value ends at its quote or its last character
_ASSIGNED = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]{0,60}(?i:token|secret|passw|passphrase|pwd|credential|bearer"""
    r"""|authorization|cookie|signature|(?:api|access|private|account|shared|encryption|auth"""
    r"""|session)[_.-]?key)[\w.-]{0,40})(?P<sign>\\?["']?\s*[=:]\s*|(?<=\S)[ ](?=\S))"""
    r"""(?P<value>\\?"[^"\n]*"|'[^'\n]*'|[^\s"',;&}\])]+)"""
)
_HINT = re.compile("(?i)token|secret|pass|pwd|credential|bearer|authorization|cookie|signature|key")
_LONG = re.compile(r"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_-]{32,}={0,2}(?![A-Za-z0-9+/_=-])")
_AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")


def is_secret_name(name: str) -> bool:
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", name)]
    return bool(_WORDS & set(words)) or any(pair in _PAIRS for pair in itertools.pairwise(words))


def redact_value(name: str, value: str) -> str:
    """Return the value of a parameter, tag or key of this name, redacted if it is a secret."""
    if value and is_secret_name(name) and value not in ("None", "True", "False"):
        return REDACTED
    return redact(value)


def redact(text: str) -> str:
    """Replace every secret in a text by ***; leave the rest and the layout unchanged."""
    for secret in _own_secrets():
        text = text.replace(secret, REDACTED)
    text = _USER_IN_URL.sub(f"{REDACTED}@", text)
    text = _SHAPES.sub(REDACTED, text)
    text = _AUTHORIZATION.sub(rf"\1 {REDACTED}", text)
    lines = text.split("\n")
    text = "\n".join(  # searching for a single word first is far faster
        _ASSIGNED.sub(_without_value, line) if _HINT.search(line) else line for line in lines
    )
    return _LONG.sub(lambda found: REDACTED if _is_random(found[0]) else found[0], text)


def holds_secret(text: str) -> bool:
    """Return whether a text certainly holds a secret: a password in a URL, or a known key format.

    Used to refuse user input, so it does not guess as `redact` does.
    """
    parts = _USER_IN_URL.search(text)
    return (
        (parts is not None and ":" in parts[0])
        or _SHAPES.search(text) is not None
        or ("://" in text and _ASSIGNED.sub(_without_value, text) != text)
    )


def _without_value(found: re.Match[str]) -> str:
    name, sign, value = found["name"], found["sign"], found["value"]
    if sign == " " and not name.startswith("--"):
        return found[0]  # words of a sentence, not an option with its value
    if value in ("None", "null", "none", '""', "''", REDACTED):
        return found[0]
    if not is_secret_name(name):  # "tokenizer: password=…"
        return f"{name}{sign}{_ASSIGNED.sub(_without_value, value)}"
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{sign}{quote}{REDACTED}{quote}"


def _own_secrets() -> list[str]:
    found = {v for k, v in os.environ.items() if len(v) >= 8 and is_secret_name(k)}
    # The path of a token file, or a switch, is not a secret.
    return sorted((v for v in found if not v.startswith("/")), key=len, reverse=True)


def _is_random(text: str) -> bool:
    """Return whether text looks like a key: upper case, lower case and digits alternate often.

    Hex hashes, paths and ordinary file names alternate less often.
    """
    kinds = [0 if c.isupper() else 1 if c.islower() else 2 if c.isdigit() else 3 for c in text]
    if not {0, 1, 2} <= set(kinds):
        return False
    changes = sum(one != other for one, other in itertools.pairwise(kinds))
    return changes > 0.45 * len(text)  # 0.65 on average if all 64 characters are equally likely
