"""What tests share: small worlds, runs in this process, commands, servers."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def is_sweep(path: Path) -> bool:
    """Whether a YAML file under jobs/ is a sweep and no job: a sweep names the job that it varies, at the beginning of a line."""
    return any(line.startswith("base:") for line in path.read_text(encoding="utf-8").splitlines())
