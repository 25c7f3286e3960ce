"""All methods, by the name that a job file gives them."""

from __future__ import annotations

from fleetune.methods.base import Method
from fleetune.methods.devft import DevFT
from fleetune.methods.fedavg import FedAvg, FedIT
from fleetune.methods.fedprox import FedProx
from fleetune.methods.fedsa_lora import FedSALoRA
from fleetune.methods.split_lora import SplitLoRA

METHODS: dict[str, type[Method]] = {
    "devft": DevFT,
    "fedavg": FedAvg,
    "fedit": FedIT,
    "fedprox": FedProx,
    "fedsa-lora": FedSALoRA,
    "split-lora": SplitLoRA,
}
