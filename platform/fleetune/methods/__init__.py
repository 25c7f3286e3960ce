"""All methods, by the name that a job file gives them."""

from __future__ import annotations

from fleetune.methods.adalora import AdaLoRA
from fleetune.methods.base import Method
from fleetune.methods.c2a import C2A
from fleetune.methods.centralized import Centralized
from fleetune.methods.devft import DevFT
from fleetune.methods.dofit import DoFIT
from fleetune.methods.fedadapter import FedAdapter
from fleetune.methods.fedavg import FedAvg, FedIT
from fleetune.methods.fedprox import FedProx
from fleetune.methods.fedsa_lora import FedSALoRA
from fleetune.methods.fedsoda import FedSODA
from fleetune.methods.flora import FLoRA
from fleetune.methods.fwdllm import FwdLLM
from fleetune.methods.lesft import LESFT
from fleetune.methods.linear_arithmetic import LinearArithmetic
from fleetune.methods.lora_flow import LoRAFlow
from fleetune.methods.lorahub import LoRAHub
from fleetune.methods.mole import MoLE
from fleetune.methods.progfed import ProgFed
from fleetune.methods.sfl import SFL
from fleetune.methods.sl import SL
from fleetune.methods.smartfed import SmartFed
from fleetune.methods.split_frozen import SplitFrozen
from fleetune.methods.split_lora import SplitLoRA

METHODS: dict[str, type[Method]] = {
    "adalora": AdaLoRA,
    "c2a": C2A,
    "centralized": Centralized,
    "devft": DevFT,
    "dofit": DoFIT,
    "fedadapter": FedAdapter,
    "fedavg": FedAvg,
    "fedit": FedIT,
    "fedprox": FedProx,
    "fedsa-lora": FedSALoRA,
    "fedsoda": FedSODA,
    "flora": FLoRA,
    "fwdllm": FwdLLM,
    "lesft": LESFT,
    "linear-arithmetic": LinearArithmetic,
    "lora-flow": LoRAFlow,
    "lorahub": LoRAHub,
    "mole": MoLE,
    "progfed": ProgFed,
    "sfl": SFL,
    "sl": SL,
    "smartfed": SmartFed,
    "split-frozen": SplitFrozen,
    "split-lora": SplitLoRA,
}
