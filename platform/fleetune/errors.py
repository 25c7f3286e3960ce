"""The errors that a user sees, and the search for the name they probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from fleetune.columns import round_number
from fleetune.redaction import redacted

MAX_VALUE, MAX_FIELD, MAX_WORDS = 300, 150, 500  # characters of a message's parts; assumed: nobody reads on


class UserError(ValueError):
    """A mistake in a job file or on the command line: the field, the value, the rule, and the way out. Exit status 2.

    ``rule`` says what must hold, ``hint`` what to do; ``field`` is the dotted path of the job file
    (``rounds.clients_per_round``) or the argument on the command line. Of a very long text only the beginning is shown.
    """

    def __init__(self, rule: str, *, field: str | None = None, value: Any = None, hint: str | None = None):
        self.rule, self.value = shortened(redacted(rule), MAX_WORDS), _short_value(value)
        self.field = field and shortened(field, MAX_FIELD)
        self.hint = hint and shortened(redacted(hint), MAX_WORDS)
        where = f"{self.field}={self.value!r}: " if field and value is not None else f"{self.field}: " if field else ""
        super().__init__(redacted(where + self.rule + (f" ({self.hint})" if hint else "")))

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data, for ``--json``."""
        return {
            "error": "user",
            "field": self.field,
            "value": self.value,
            "rule": self.rule,
            "hint": self.hint,
        }


class RunFailed(RuntimeError):
    """A real failure that a retry did not cure: the reason, the clients, the round and the stage.

    With a reason alone its text is the reason. That is also how it is unpickled in another process: from the full text.
    """

    def __init__(
        self,
        reason: str,
        *,
        round_idx: int | None = None,
        stage: int | None = None,
        client_ids: Iterable[int] = (),
    ):
        self.round_idx, self.stage, self.client_ids = round_idx, stage, tuple(client_ids)
        shown = ", ".join(map(str, self.client_ids[:8])) + (", …" if len(self.client_ids) > 8 else "")
        where = [f"client {shown}"] if self.client_ids else []
        where += [f"round {round_number(round_idx)}"] if round_idx is not None else []
        where += [f"stage {stage}"] if stage is not None else []
        super().__init__(redacted(f"{', '.join(where)}: {reason}" if where else reason))


class Stopped(KeyboardInterrupt):
    """A command was ended on request, by Ctrl-C or SIGTERM; the text says how to go on."""


def printable(text: str) -> str:
    """A text for the terminal. Control characters, which a name may hold, are escaped; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def shortened(text: str, most: int) -> str:
    """A text, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _short_value(value: Any) -> Any:
    """A value that can be shown; a long one becomes a shortened text."""
    if isinstance(value, str):
        return shortened(redacted(value), MAX_VALUE)
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return value if len(text) <= MAX_VALUE else shortened(redacted(text), MAX_VALUE)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest to a misspelt one, or None if none is near."""
    matches = difflib.get_close_matches(name[:MAX_VALUE], list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str], *, field: str) -> UserError:
    """The error for a name that is none of the known ones, with the nearest right name."""
    known = sorted(known)
    guess = nearest(name, known)
    hint = f"did you mean {guess!r}? known: {', '.join(known)}" if guess else f"known: {', '.join(known)}"
    return UserError(f"no such {kind}", field=field, value=name, hint=hint)
