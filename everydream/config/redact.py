"""Secrets out of everything that is written or printed, and home folders out of what is handed to others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # shorter values of such variables are no secrets, and would blank harmless words

_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH)(_|$)", re.IGNORECASE
)
_SECRET_FORMS = (
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\b(?:ghp|gho|ghs|ghu|github_pat)_\w{16,}"),
    re.compile(r"\bwandb_v\d_\w{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bAKIA[A-Z0-9]{16}\b"),
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_SECRETS_OF_URLS = (  # elsewhere "?key=" is a question, or a prompt
    re.compile(r"(?<=://)[^/:@]+:[^/@]+(?=@)"),  # user:password@host
    re.compile(r"(?i)(?<=[?&])(?:\w*token|\w*key|\w*secret|password|signature)=[^&#,]+"),
)


def secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values of environment variables whose names say that they are secret, the longest first."""
    found = {value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return tuple(sorted(found, key=len, reverse=True))


def clean(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """The same text or tree of JSON values with every secret as ***."""
    return _clean(value, secrets(os.environ if environ is None else environ))


def for_others(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """`clean`, with ~ for the home folder: what goes into exported files and to trackers."""
    home = str(Path.home())
    cleaned = clean(value, environ)
    return cleaned if home == os.sep else _replace(cleaned, re.compile(re.escape(home) + r"(?=[/\\]|$)"), "~")


def _clean(value: Any, hidden: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        for secret in hidden:
            value = value.replace(secret, HIDDEN)
        for form in _SECRET_FORMS:
            value = form.sub(HIDDEN, value)
        return _URL.sub(_clean_url, value)
    if isinstance(value, Mapping):
        return {
            _clean(key, hidden): HIDDEN if isinstance(key, str) and item and isinstance(item, str)
            and _SECRET_NAME.search(key) else _clean(item, hidden)
            for key, item in value.items()
        }  # fmt: skip
    return [_clean(item, hidden) for item in value] if isinstance(value, (list, tuple)) else value


def _clean_url(found: re.Match[str]) -> str:
    url = found.group()
    for form in _SECRETS_OF_URLS:
        url = form.sub(HIDDEN, url)
    return url


def _replace(value: Any, pattern: re.Pattern[str], text: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(text, value)
    if isinstance(value, Mapping):
        return {key: _replace(item, pattern, text) for key, item in value.items()}
    return [_replace(item, pattern, text) for item in value] if isinstance(value, list) else value
