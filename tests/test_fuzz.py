"""Whatever a job file or an override holds: a spec, or a UserError, and never another exception."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetune.config import flatten
from fleetune.errors import UserError
from fleetune.spec import RunSpec, apply_overrides, from_dict, load, parse_overrides
from support import is_sweep

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in (ROOT / "jobs").rglob("*.yaml") if not is_sweep(path))
JOBS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES]
FIELDS = sorted({path for job in JOBS for path in flatten(from_dict(job).to_dict())})

quickly = settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))

text = st.text(st.characters(), max_size=12)  # lone surrogates too
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 12),
    st.sampled_from([2**63, -(2**64), 10**400, float("nan"), float("inf"), -float("inf"), 1e308]),
    st.just(20_000).map(lambda bits: 1 << bits),  # too long for Python to print, so no constant here
    st.floats(),
    text,
    st.sampled_from(["auto", "devft", "all-linear", "wifi", "jetson-nano", "{prompt", "(", "x{99999999999}", "1e3"]),
    st.dates(),
    st.binary(max_size=4),
    st.frozensets(st.integers(), max_size=2),
)
keys = st.one_of(
    text, st.sampled_from(sorted(RunSpec.model_fields)), st.integers(), st.booleans(), st.none(), st.dates()
)
values = st.recursive(
    scalars,
    lambda part: st.one_of(st.lists(part, max_size=3), st.dictionaries(keys, part, max_size=3)),
    max_leaves=8,
)


def spec_or_user_error(build: Any) -> RunSpec | None:
    """Build; what comes out survives its own YAML and JSON, and an error can be said in both forms."""
    try:
        spec: RunSpec = build()
    except UserError as error:
        refusal = error
    else:
        again = from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict())))
        assert again == spec
        assert again.spec_hash == spec.spec_hash
        return spec
    assert refusal.rule
    assert json.loads(json.dumps(refusal.to_dict(), default=str))["rule"] == refusal.rule
    return None


@quickly
@given(st.dictionaries(keys, values, max_size=4))
def test_any_mapping(job: dict[Any, Any]):
    spec_or_user_error(lambda: from_dict(job))


@quickly
@given(st.sampled_from(JOBS), st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2))
def test_a_real_job_with_fields_replaced(job: dict[str, Any], overrides: dict[str, Any]):
    spec_or_user_error(lambda: from_dict(job, overrides))


@quickly
@given(st.sampled_from(JOBS), st.sampled_from(sorted(RunSpec.model_fields)), keys, values)
def test_a_real_job_with_a_part_replaced_or_a_field_added(job: dict[str, Any], part: str, key: Any, value: Any):
    spec_or_user_error(lambda: from_dict({**job, part: value}))
    if isinstance(job.get(part), dict):
        spec_or_user_error(lambda: from_dict({**job, part: {**job[part], key: value}}))


@quickly
@given(st.sampled_from(FIELDS), st.integers(1, 9))
def test_a_field_in_range_is_taken_over(field: str, number: int):
    """Not everything is refused: where a number is a valid value, the spec holds it."""
    spec = spec_or_user_error(lambda: from_dict({}, {field: number}))
    if spec is not None:
        found = flatten(spec.to_dict())[field]
        assert found == (bool(number) if isinstance(found, bool) else number)


PIECES = [
    "a",
    "seed",
    "rounds",
    ": ",
    "\n",
    "  ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "&x ",
    "*x",
    "!!",
    "int ",
    "bool ",
    "%",
]
PIECES += [
    "timestamp ",
    "binary ",
    "set ",
    "? ",
    "<<: ",
    "'",
    '"',
    "\\ud800",
    "\t",
    "0x",
    "_",
    "1:2",
    ".nan",
    "2001-13-45",
]
PIECES += ["=", "---", "...", "|", ">", "#", "\0", "\ufeff", "9" * 5000]


@quickly
@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=40)))
def test_any_text_as_a_job_file(tmp_path_factory: pytest.TempPathFactory, content: str):
    path = tmp_path_factory.getbasetemp() / "job.yaml"
    path.write_text(content, encoding="utf-8")
    spec_or_user_error(lambda: load(path))


@quickly
@given(st.binary(max_size=40))
def test_any_bytes_as_a_job_file(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = tmp_path_factory.getbasetemp() / "job.yaml"
    path.write_bytes(content)
    spec_or_user_error(lambda: load(path))


@quickly
@given(
    st.one_of(
        st.sampled_from(FIELDS), st.lists(st.sampled_from([*FIELDS, ".", "method", ""]), max_size=3).map("".join)
    ),
    st.sampled_from(["=", "", " = ", "=="]),
    st.one_of(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.text(max_size=12)),
)
def test_any_set_argument(path: str, equals: str, value: str):
    spec_or_user_error(lambda: from_dict(JOBS[0], parse_overrides([path + equals + value])))


# -- the ones that were found, each once more ---------------------------------------------------------------------------------
def nested(depth: int) -> Any:
    out: Any = 0
    for _ in range(depth):
        out = [out]
    return out


def itself() -> Any:
    out: list[Any] = []
    out += [out, out]
    return out


def doubled(times: int) -> Any:
    out: Any = "lol"
    for _ in range(times):
        out = [out, out]
    return out


ENDLESS: dict[str, tuple[Any, str]] = {
    "deep": (nested(5000), "nested too deeply, or holds itself"),
    "cyclic": (itself(), "nested too deeply, or holds itself"),
    "doubling": (doubled(40), "more than 10000 values"),
    "large": (1 << 20_000, "too large a number"),
    "large key": ({1 << 20_000: 1}, "too large a number"),
    "not a number": (float("nan"), "finite number"),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_values_without_end(case: str):
    """In the file and in an override; the message names the field, or its part."""
    value, rule = ENDLESS[case]
    with pytest.raises(UserError, match=rule) as in_file:
        from_dict({"local": {"learning_rate": value}})
    with pytest.raises(UserError, match=rule) as in_override:
        from_dict({}, {"local.learning_rate": value})
    assert {str(error.value.field).partition(".")[0] for error in (in_file, in_override)} == {"local"}


@pytest.mark.parametrize("content", ["2001-13-45", "!!bool maybe", "!!timestamp x", "9" * 5000, "[" * 5000])
def test_tags_that_yaml_itself_stumbles_over(tmp_path: Path, content: str):
    (tmp_path / "job.yaml").write_text(f"seed: {content}")
    with pytest.raises(UserError, match="not valid YAML"):
        load(tmp_path / "job.yaml")


def test_keys_become_text():
    """``on:`` is True in YAML, ``2024-01-01:`` a date; both are unknown fields, named as text."""
    job: dict[Any, Any] = {date(2024, 1, 1): 1, True: 2, None: 3}
    assert apply_overrides(job, {}) == {"2024-01-01": 1, "True": 2, "None": 3}
    with pytest.raises(UserError, match="2024-01-01: unknown field"):
        from_dict(job)


def test_a_path_that_no_file_system_takes():
    for path in ("job\0.yaml", "x" * 5000, "x/" * 3000):
        with pytest.raises(UserError, match="cannot be read"):
            load(path)
