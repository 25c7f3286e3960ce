"""YAML text as plain values. A key that stands twice in a mapping is an error: YAML's own rule, which PyYAML lets pass."""

from __future__ import annotations

from typing import Any

import yaml

# The errors that PyYAML raises on text without a value: 2001-13-45, !!bool maybe, !!timestamp x, [[[[…
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
SPECIAL_TAGS = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")  # << and =, which have no value of their own


class DuplicateKey(yaml.YAMLError):
    """A key stands twice in one mapping; PyYAML alone would silently keep the last."""


class _Loader(yaml.SafeLoader):
    """The safe loader. Keys are compared where the text has them, before ``<<`` mixes in those of other mappings."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # Compared as text, for `1` and `"1"` name the same field.
            name = key.value if key.tag in SPECIAL_TAGS else str(self.construct_object(key))
            line = key.start_mark.line + 1
            if name in lines:
                raise DuplicateKey(
                    f"{name!r} is given twice, in line {lines[name]} and in line {line}; keep one of them"
                )
            lines[name] = line
        return node


def load(text: str | bytes) -> Any:
    """The value that a text holds, None for an empty one. Raises one of NOT_YAML."""
    return yaml.load(text, Loader=_Loader)
