"""How busy the machine is, under the names that MLflow's page of system metrics shows."""

from __future__ import annotations

import time
from typing import Any


class SystemMetrics:
    """MLflow's own monitors of processor, memory, disk and network, asked when a round is sent."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]

    def sample(self, *, step: int) -> list[Any]:
        """Metrics ``system/…`` of this moment."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        out = []
        for monitor in self._monitors:
            monitor.collect_metrics()
            out += [
                Metric(f"system/{name}", float(value), now_ms, step)
                for name, value in monitor.aggregate_metrics().items()
            ]
            monitor.clear_metrics()
        return out
