"""What tests share: small worlds, runs in this process, commands, servers."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
