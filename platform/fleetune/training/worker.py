"""What one worker process holds: the shared base model and data, and scratch networks through which clients pass."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.training.config import LocalConfig

if TYPE_CHECKING:
    from fleetune.data.tokenize import TokenizedDataset


class Worker:
    """The same object behind the serial executor and inside every host actor."""

    max_networks = 2

    def __init__(self, *, base: BaseModel, lora: LoRAConfig, local: LocalConfig, data: TokenizedDataset):
        self.base, self.lora, self.local, self.data = base, lora, local, data
        self._networks: OrderedDict[Submodel, Network] = OrderedDict()

    def network(self, submodel: Submodel) -> Network:
        """The scratch network of a submodel; the last few stay assembled. Unfused blocks share the base's memory."""
        if submodel not in self._networks:
            while len(self._networks) >= self.max_networks:
                self._networks.popitem(last=False)
            self._networks[submodel] = Network(self.base, submodel, self.lora)
        self._networks.move_to_end(submodel)
        return self._networks[submodel]
