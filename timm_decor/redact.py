"""Passwords and tokens in text: by their makers' shapes, by the names beside them, and those of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"

# A token's own shape. Digits or capitals are asked for where the rest could be words of a file's name.
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        (?: hf | api_org )_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}         # Hugging Face
      | (?: gh[oprsu]_ | github_pat_ )(?=\w*[A-Z0-9])\w{20,}           # GitHub
      | gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat)-[\w-]{20,}           # GitLab
      | wandb_v\d_\w{20,}
      | AIza[\w-]{35} | ya29\.[\w-]{20,}                               # Google
      | (?: AKIA | ASIA )[0-9A-Z]{16}                                  # Amazon
      | sk-(?: proj | ant | svcacct | admin | or )-[\w-]{20,}          # OpenAI, Anthropic, OpenRouter
      | sk-(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}
      | [rs]k_(?: live | test )_[A-Za-z0-9]{16,}                       # Stripe
      | xox[abeoprs]-[\w-]{10,} | xapp-\d-[\w-]{10,}                   # Slack
      | eyJ[\w-]{8,}\.eyJ[\w-]{4,}(?:\.[\w-]*)?                        # JSON web tokens
      | npm_[A-Za-z0-9]{36} | pypi-AgE[\w-]{20,} | dckr_pat_[\w-]{20,} | dop_v1_[0-9a-f]{64}
      | nvapi-[\w-]{30,} | gsk_[A-Za-z0-9]{40,} | r8_[A-Za-z0-9]{36,} | SG\.[\w-]{16,}\.[\w-]{16,}
    )
      | -----BEGIN[ A-Z]*PRIVATE\ KEY-----""",
    re.VERBOSE,
)
# one slash: what pathlib leaves of two
_URL_PASSWORD = re.compile(r"(\w\w:/{1,2})[^/\s?#]*:[^/\s?#]*@")

_NAME = r"""(?: [\w.-]*(?: api[_-]?key | access[_-]?key | secret[_-]?key | private[_-]?key | token | secret | passwd
                         | password | passphrase )
              | (?: [\w.-]*[_.-] )?(?: pwd | pass | pat | credentials? | auth[_-]?key ) )"""
_SECRET_NAME = re.compile(_NAME, re.VERBOSE | re.IGNORECASE)
_ENVIRONMENT_NAME = re.compile(rf"{_NAME} | \w+_key | \w*(?: passwd | apikey )", re.VERBOSE | re.IGNORECASE)
_NO_SECRETS = ("PWD", "OLDPWD")  # the shell's folders
_PARAMETER = re.compile(
    rf"(?<=[?&\#;])({_NAME} | [\w.-]*sig(?:nature)? | key | auth | x-amz-credential)=([^&\#\s'\"]+)",
    re.VERBOSE | re.IGNORECASE,
)
# name=value, and 'name': 'value' as Python and JSON show it
_SETTING = re.compile(
    rf"""(?<![\w.-])({_NAME}(?: \s?=\s? | ['"]:\s?(?=['"]) )) (?! (?: True | False | None | null )(?!\w) )
         (?: '[^'\n]*' | "[^"\n]*" | [^\s'",;&)\]}}]+ )""",
    re.VERBOSE | re.IGNORECASE,
)
_SHORT, _LONG = 8, 16  # characters of the environment's secrets: from 16 on they are found inside other words, too


def is_secret(name: str, value: Any) -> bool:
    """Whether a name says that its value is a password, token or key: `api_key`, `DB_PASSWD`. A switch is none."""
    return _SECRET_NAME.fullmatch(name) is not None and str(value) not in ("", "None", "True", "False")


def without_secrets(text: str) -> str:
    """Text with `***` for each password and token in it."""
    for secret in _of_the_environment():
        pattern = re.escape(secret)
        text = re.sub(pattern if len(secret) >= _LONG else rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])", HIDDEN, text)
    text = _URL_PASSWORD.sub(rf"\1{HIDDEN}@", text)
    text = _PARAMETER.sub(lambda found: f"{found[1]}={HIDDEN}", text)
    text = _SETTING.sub(lambda found: found[1] + HIDDEN, text)
    return _SHAPES.sub(HIDDEN, text)


def holds_secret(value: Any) -> bool:
    """Whether there is a password or token in a string, in a list of them, or in a mapping, also by its key."""
    if isinstance(value, Mapping):
        named = any(is_secret(str(key), item) for key, item in value.items())
        return named or any(holds_secret(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return any(holds_secret(item) for item in value)
    return isinstance(value, str) and without_secrets(value) != value


def _of_the_environment() -> Iterator[str]:
    """Long ones first, or a short one could leave half of a long one."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORT and name not in _NO_SECRETS and _ENVIRONMENT_NAME.fullmatch(name)
        if not os.path.exists(value)  # where a secret lies, as GOOGLE_APPLICATION_CREDENTIALS says it
    }
    yield from sorted(found, key=len, reverse=True)
