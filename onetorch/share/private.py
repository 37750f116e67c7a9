"""What nobody means to share: tokens, keys, and names of the people and places where a model was made."""

import getpass
import re
from collections.abc import Iterator
from pathlib import Path

SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{18,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abeprs]-[0-9A-Za-z-]{10,}",
    "a PyPI or npm token": r"\b(?:pypi-AgE[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{30,})",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a password in a URL": r"[a-z][a-z0-9+.-]*://[^\s/:@'\"]+:[^\s/@'\"{]+@",
    "a password or token": r"(?i)(?:password|passwd|secret|token|api_?key|access_?key)[\"']?\s*[:=]\s*[\"'][^\"'\s{}]{12,}[\"']",
    "a path in a home folder": r"(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})[A-Za-z0-9._-]+|/root/[A-Za-z0-9._-]+",
}
ROLES = {"root", "user", "admin", "ubuntu", "debian", "runner", "docker", "jovyan", "nobody", "guest", "test", "app", "model", "agent", "worker", "python"}


def findings(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """("file:line", what stands there) for everything in the texts (file name to text) that looks private; the secret itself is not repeated.

    >>> list(findings({"a.py": "x = 1\\nroot = '/home/ada/data'\\n"}))
    [('a.py:2', 'a path in a home folder')]
    """
    patterns = {what: re.compile(pattern) for what, pattern in SECRETS.items()}
    home, user = str(Path.home()), _user()
    if len(home) > 1:
        patterns["your home folder"] = re.compile(re.escape(home) + r"(?=$|[/\\\"'\s])")
    if user:
        patterns["your user name"] = re.compile(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", re.IGNORECASE)
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            for what, pattern in patterns.items():
                if pattern.search(line):
                    yield f"{name}:{number}", what
                    break


def _user() -> str | None:
    """This user's name, where it is a person's."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        return None  # a user id without a name, as in many containers
    return name if len(name) > 2 and name.lower() not in ROLES else None
