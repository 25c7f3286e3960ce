"""Sustained fractions, fitted inside the roofline: ``python -m fleetune.pricing.fit`` prints them beside the catalogue's.

A device's fraction of its peak is the one with which half of the steps that were measured on it come out too long and half too
short, memory-bound operators and launches included. A fraction above 1 means that a rate, or the count of bytes, is wrong: the
catalogue has none, but assumes a fraction for such a device and says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fleetune.fleet.devices import device
from fleetune.pricing.published import MEASUREMENTS, Measurement
from fleetune.pricing.validation import step_of

LOWEST, HIGHEST = 1e-4, 1e2


def fitted_devices() -> dict[str, list[Measurement]]:
    """{device: the measured steps to which its fraction is fitted}, a device's all in one precision."""
    out: dict[str, list[Measurement]] = {}
    for run in MEASUREMENTS:
        if run.step_seconds is not None and run.fits:
            out.setdefault(run.fits, []).append(run)
    return out


def fitted_fraction(runs: list[Measurement]) -> float:
    """The sustained fraction at which the median of predicted over measured seconds is 1; infinite if no fraction is enough.

    The ratio falls as the fraction grows, so the interval is halved (on a logarithmic scale) until it is narrow.
    """
    low, high = LOWEST, HIGHEST
    if _median_ratio(runs, high) > 1:
        return float("inf")
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _median_ratio(runs, middle) > 1 else (low, middle)
    return high


def _median_ratio(runs: list[Measurement], fraction: float) -> float:
    ratios = []
    for run in runs:
        profile = replace(device(run.device), sustained_fp32=fraction, sustained_fp16=fraction)
        seconds = step_of(run).seconds(run.batch_size, run.num_tokens, profile)
        ratios.append(seconds / (run.step_seconds or np.nan))
    return float(np.median(ratios))


def table() -> str:
    """Fitted fractions beside the catalogue's, and those to which held out measurements would lead, as a Markdown table."""
    lines = ["| device | precision | fitted | in the catalogue | to | used |", "|---|---|---|---|---|---|"]
    groups = {(name, runs[0].source, "yes"): runs for name, runs in fitted_devices().items()}
    for run in MEASUREMENTS:
        if run.step_seconds is not None and not run.fits and run.weights != "nf4":
            groups.setdefault((run.device, run.source, "no"), []).append(run)
    for (name, source, used), runs in groups.items():
        precision = runs[0].precision
        profile = device(name)
        stands = profile.sustained_fp32 if precision == "fp32" else profile.sustained_fp16
        steps = f"{len(runs)} step{'s' * (len(runs) > 1)}, {source}"
        lines.append(f"| {name} | {precision} | {fitted_fraction(runs):.3g} | {stands:g} | {steps} | {used} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
