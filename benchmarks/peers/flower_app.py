"""Flower's client and server for the benchmark. The settings come through the environment, as Ray's workers import this file."""

import json
import os

import work
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

SETTINGS = json.loads(os.environ["FLEETUNE_BENCH_FLOWER"])
client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's local work."""
    arrays, loss = message.content["arrays"], 0.0
    if SETTINGS["work"] == "lora":
        model = work.kept_model() if SETTINGS["keep_model"] else work.build_model()
        client_id = int(context.node_config["partition-id"])
        adapter, loss = work.local_training(model, arrays.to_torch_state_dict(), client_id)
        arrays = ArrayRecord(adapter)
    metrics = MetricRecord({"num-examples": work.NUM_STEPS * work.BATCH_SIZE, "loss": loss})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that notes when a round is over."""

    clock = work.Clock()

    def aggregate_train(self, server_round, replies):
        """As FedAvg."""
        out = super().aggregate_train(server_round, replies)
        self.clock.mark()
        return out


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """All rounds, every client in each."""
    import torch

    if SETTINGS["work"] == "lora":
        state = work.read_adapter(work.build_model())
    else:
        state = {"state": torch.zeros(SETTINGS["elements"])}
    num_clients = SETTINGS["clients"]
    strategy = TimedFedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients
    )
    strategy.clock = work.Clock()
    strategy.start(grid=grid, initial_arrays=ArrayRecord(state), num_rounds=SETTINGS["rounds"] + 1)
    name = "Flower, model kept" if SETTINGS["keep_model"] else "Flower, as its LLM example"
    strategy.clock.report(name if SETTINGS["work"] == "lora" else "Flower", num_clients)
