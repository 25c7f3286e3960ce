"""The state of one worker process: the shared base model and data, and scratch networks through which clients pass."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.models.model import Model
from fleetune.models.network import Network
from fleetune.models.stored import key_of, stored
from fleetune.training.config import LocalConfig

if TYPE_CHECKING:
    from fleetune.data.tokenize import TokenizedDataset


class Worker:
    """The same object behind the serial executor and inside every worker actor."""

    max_networks = 2

    def __init__(
        self,
        *,
        base: BaseModel,
        lora: LoRAConfig,
        local: LocalConfig,
        data: TokenizedDataset,
        precision: str = "fp32",
    ):
        """``base`` is on the worker's device, in the type of its products (`models.base.placed`)."""
        self.base, self.lora, self.local, self.data, self.precision = base, lora, local, data, precision
        self._networks: dict[Hashable, Network] = {}

    def adopt(self, networks: dict[Hashable, Network]) -> None:
        """Use, and add to, networks that were assembled for the same base model and adapter form."""
        self._networks = networks

    def network(self, model: Model) -> Network:
        """The scratch network of what a client holds; the last few stay assembled. Unfused blocks share the base's memory."""
        key = key_of(model)
        network = self._networks.pop(key, None)
        if network is None:
            while len(self._networks) >= self.max_networks:
                del self._networks[next(iter(self._networks))]
            base, submodel = stored(self.base, model, scaling=self.lora.scaling)
            network = Network(base, submodel, self.lora, precision=self.precision)
        self._networks[key] = network  # last in the dict: the first one is the longest unused
        network.hold(model.held)
        return network
