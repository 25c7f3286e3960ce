"""A run as data: the job file read, overridden, checked, and turned into a frozen `RunSpec`."""

from fleetune.spec.assignments import parse_overrides, split_assignment, value_of, yaml_value
from fleetune.spec.job_file import from_dict, job_text, json_schema, load, named_method, read_yaml
from fleetune.spec.run_spec import RunSpec
from fleetune.spec.validation import as_user_error
from fleetune.spec.values import MAX_INTEGER, apply_overrides, plain

__all__ = [
    "MAX_INTEGER",
    "RunSpec",
    "apply_overrides",
    "as_user_error",
    "from_dict",
    "job_text",
    "json_schema",
    "load",
    "named_method",
    "parse_overrides",
    "plain",
    "read_yaml",
    "split_assignment",
    "value_of",
    "yaml_value",
]
