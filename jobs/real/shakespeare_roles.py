"""Write plays as training and held-out examples, a natural client for each role: ``shakespeare_roles.py INPUT.txt OUT_DIR``.

INPUT.txt holds speeches that are parted by empty lines, the role and a colon in each one's first line, as in "tiny Shakespeare"
(github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt). Roles of at least 5,000 characters are kept. An example is a
speech, or a part of one at whole lines; its prompt is the role and what the speaker before has said last. Every tenth of a role's
examples goes to OUT_DIR/test.jsonl, the others to OUT_DIR/train.jsonl, with the columns prompt, response and role.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

MIN_CHARACTERS = 5_000
MAX_RESPONSE = 240  # characters of a part; a small vocabulary spells in short pieces, some two characters a token
MAX_CUE = 60
HELD_OUT = 10  # one in so many


def speeches(text: str) -> list[tuple[str, str]]:
    """(role, what is said), in the order of the text."""
    parts = [part.split("\n", 1) for part in text.strip().split("\n\n")]
    return [(part[0].removesuffix(":"), part[1]) for part in parts if len(part) == 2 and part[0].endswith(":")]


def pieces(speech: str) -> list[str]:
    """A speech in parts of whole lines, each of at most `MAX_RESPONSE` characters unless a line alone is longer."""
    out: list[str] = []
    for line in speech.splitlines():
        if out and len(out[-1]) + 1 + len(line) <= MAX_RESPONSE:
            out[-1] += "\n" + line
        else:
            out.append(line)
    return out


def main(source: Path, folder: Path) -> None:
    """Write both files."""
    found = speeches(source.read_text(encoding="utf-8"))
    spoken: Counter[str] = Counter()
    for role, speech in found:
        spoken[role] += len(speech)
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    cue = ""
    for role, speech in found:
        for piece in pieces(speech):
            if spoken[role] >= MIN_CHARACTERS:
                examples[role].append({"prompt": f"{cue}\n\n{role}:", "response": piece, "role": role})
            cue = piece.splitlines()[-1][-MAX_CUE:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, is_test in (("train", False), ("test", True)):
        rows = [e for of in examples.values() for i, e in enumerate(of) if (i % HELD_OUT == HELD_OUT - 1) == is_test]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} examples of {len(examples)} roles")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
