"""Removes passwords and tokens from texts that hold addresses, before they are shown, stored or sent."""

from __future__ import annotations

import re

HIDDEN = "***"
# ``scheme://user:password@host``. A password may hold what belongs escaped (``p/w``, ``p@ss``), but ``host:5000/a@b`` is a port
# and a path. A web address has no use for a user alone: what stands there is a token.
USERINFO = re.compile(
    r"""(?<=://)(?!\[)(?:[^\s/?\#@:]*:(?!\d*['"/?\#])\S*@|[^\s/?\#@:]*:[^\s/?\#]*@)|(?<=https://)[^\s/?\#]+@|(?<=http://)[^\s/?\#]+@""",
    re.IGNORECASE,
)
# ``?password=…``, ``&sslpassword=…``, ``;PWD=…``, also percent-encoded as in ``odbc_connect=…%3BPWD%3D…``.
QUERY = re.compile(
    r"((?:[?&;]|%3B|%26)(?:[\w-]*[_-])?(?:ssl)?(?:password|passwd|passphrase|pwd|token|secret|api_?key|access_?key|signature|sig)"
    r"(?:=|%3D))(?:(?!%3B|%26)[^&;\s\#])+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text with three stars for users with passwords in addresses, and for values in queries that are named like a secret."""
    if "://" not in text:
        return text
    return QUERY.sub(rf"\1{HIDDEN}", USERINFO.sub(f"{HIDDEN}@", text))


def without_secrets(uri: str) -> str:
    """One address, safe to show; it differs from ``uri`` if that holds a secret. Blanks are escaped first: they would end it."""
    return redacted(re.sub(r"\s", "%20", uri))
