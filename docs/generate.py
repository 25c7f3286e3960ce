"""Write the generated pages: the job file, from the models that read it; the devices; the trees of files; the index's methods.

python docs/generate.py            write
python docs/generate.py --check    exit status 1 where a page is not what would be written
"""

from __future__ import annotations

import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tree import readme, tree_page

from fleetune.fleet import devices
from fleetune.methods import METHODS
from fleetune.spec import RunSpec

DOCS = Path(__file__).parent
INTRODUCTION = """\
# The job file

<!-- Written by docs/generate.py from the configuration models. Do not edit: run `make docs`. -->

A job file is YAML. A field that is left out has its default, a name that does not exist is an error that says which was meant,
and numbers are checked before anything starts. `fleetune schema` prints the JSON schema, with which an editor completes fields.

```yaml
{example}
```

On the command line every field has its dotted path: `fleetune run JOB.yaml --set local.batch_size=4 --set method.name=fedprox`.
Values are YAML too (`--set 'model.lora.targets=[q_proj, v_proj]'`), but fields of text take what was typed as it is, with
blanks, quotes and `#` (`--set 'data.template=Ask {{prompt}} ### Answer'`); of those that may be left out, `null` or nothing means
none. A key that stands twice in one mapping is an error. Another `method.name` starts from that method's defaults,
and the other `--set method.…` apply to it. `spec.yaml` in the run directory is the job with every default filled in and every
`auto` decided; it is a job file again.

`execution` and `tracking` say where work is done and where results go. Of all their fields only `execution.cohort`,
`execution.threads`, `execution.device`, `execution.kernels` and `execution.precision` can change a result, the first four in its
last digits
([reproducibility](reproducibility.md)).
"""


def job_file() -> str:
    """The page on the job file."""
    example = (DOCS.parent / "jobs" / "quickstart.yaml").read_text(encoding="utf-8")
    lines = [line for line in example.splitlines() if not line.startswith("#")]
    parts = [INTRODUCTION.format(example="\n".join(lines))]
    sections = {name: field for name, field in RunSpec.model_fields.items() if name != "method"}
    plain = {name: field for name, field in sections.items() if not _is_config(field.annotation)}
    parts.append("## The run\n\n" + table(rows(plain)))
    for name, field in sections.items():
        if name not in plain:
            model: Any = field.annotation
            heading = f"## {name}\n\n{field.description}\n\n"
            parts.append(heading + table(rows(model.model_fields, f"{name}.")))
    parts.append(
        f"## method\n\n{RunSpec.model_fields['method'].description} `method.name` is one of\n{_method_names()}.\n"
    )
    for name, method in METHODS.items():
        own = {n: f for n, f in method.Config.model_fields.items() if n != "name"}
        text = table(rows(own, "method.")) if own else "No settings of its own.\n"
        parts.append(f"### {name}\n\n[{name}](../methods/{name}.md): {method.source}.\n\n{text}")
    return "\n".join(parts)


def rows(fields: dict[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted path, type, default, meaning) of all fields, those of nested parts in their place."""
    for name, field in fields.items():
        model: Any = field.annotation
        if _is_config(model):
            yield from rows(model.model_fields, f"{prefix}{name}.")
            continue
        meaning = " ".join((field.description or "").split()).replace("``", "`")
        yield f"`{prefix}{name}`", _type(field), _default(field), meaning


def table(lines: Iterator[tuple[str, str, str, str]]) -> str:
    """A Markdown table of fields."""
    head = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    return (
        "\n".join(head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]) + "\n"
    )


def _method_names() -> str:
    return ", ".join(f"[`{name}`](../methods/{name}.md)" for name in METHODS)


def index() -> str:
    """The index, with all methods by name."""
    links = ", ".join(f"[{name}](methods/{name}.md)" for name in sorted(METHODS))
    text = textwrap.fill(f"- {links}", 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    old = (DOCS / "index.md").read_text(encoding="utf-8")
    return re.sub(r"(?<=<!-- methods -->\n\n).*?(?=\n\n<!-- end -->)", text, old, flags=re.S)


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type(field: FieldInfo) -> str:
    limits = [_limit(rule) for rule in field.metadata]
    return ", ".join([_name(field.annotation), *(limit for limit in limits if limit)])


def _limit(rule: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for name, sign in signs.items():
        if hasattr(rule, name):
            return f"{sign} {getattr(rule, name)}"
    if hasattr(rule, "min_length"):
        return "not empty" if rule.min_length == 1 else f"at least {rule.min_length} long"
    return f"at most {rule.max_length} characters" if hasattr(rule, "max_length") else ""


def _name(annotation: Any) -> str:
    """A type as a reader of YAML sees it."""
    plain = {Any: "any value", str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _name(arguments[0])
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {_name(arguments[0])} to {_name(arguments[1])}"
    raise TypeError(f"docs/generate.py cannot describe {annotation}")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "`{" + ", ".join(f"{key}: {item:g}" for key, item in value.items()) + "}`"
    return f"`{value}`" if value != " " else "a space"


PAGES = {
    "index.md": index,
    "reference/job_file.md": job_file,
    "reference/devices.md": devices.markdown,
    "design/tree.md": tree_page,
    "../README.md": readme,
}


def main() -> int:
    """Write, or check with ``--check``."""
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run python docs/generate.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
