"""The tiny world of `fleetune.check`, with the settings that each method needs in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fleetune.check import tiny_world
from fleetune.check.tiny_world import SPEC, data_file, library_folder, model_folder
from fleetune.spec import RunSpec

__all__ = ["METHOD_SETTINGS", "SPEC", "data_file", "library_folder", "model_folder", "spec"]

# What each method needs beyond its defaults to run on four blocks and three rounds.
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "c2a": {"units": 3, "code_size": 2, "latent_size": 4},
    "adalora": {"target_rank": 1},
    "devft": {"initial_capacity": 1},
    "sfl": {"split_point": 2},
    "sl": {"split_point": 2},
    "split-frozen": {"split_point": 2},
    "split-lora": {"split_point": 2},
    "dofit": {"domains": 2, "step": 0.05},  # a step of 1 is ten times what a tiny tensor moves in training
    "fedadapter": {"width": 2, "width_step": 2, "max_width": 4, "trial_seconds": 1e-3},
    "fedprox": {"mu": 0.1},
    "fedsoda": {
        "quantization": "none",
        "calibration_examples": 8,
        "divergence_examples": 4,
        "align_steps": 2,
        "batch_size": 4,
    },
    "flora": {"ranks": {"jetson-nano": 1}},
    "fwdllm": {"directions": 2, "h": 0.1, "learning_rate": 0.01},
    "lesft": {"split_point": 2},
    "linear-arithmetic": {"adapters": [library_folder()]},
    "lora-flow": {"adapters": [library_folder()]},
    "lorahub": {"adapters": [library_folder()]},
    "mole": {"adapters": [library_folder()]},
    "progfed": {"stages": 2},
    "smartfed": {"adapters": [library_folder()]},
}


def spec(overrides: Mapping[str, Any] | None = None, *, method: str = "fedit") -> RunSpec:
    """The tiny run, with dotted overrides."""
    return tiny_world.spec(method, METHOD_SETTINGS.get(method, {}), overrides)
