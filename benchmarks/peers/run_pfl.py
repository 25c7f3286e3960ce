"""pfl-research's simulated backend: one process, or several with ``torchrun --standalone --nproc_per_node=2 run_pfl.py``."""

import types

import numpy as np
import torch
import work
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class NoOp(FederatedAveraging):
    """Clients return the difference of nothing."""

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):
        """No local training."""
        return model.get_model_difference(initial_model_state), Metrics()


class EndOfRound(TrainingProcessCallback):
    """Notes when a round is over."""

    def on_train_begin(self, *, model):
        """The clock starts."""
        self.clock = work.Clock()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """A round is over."""
        self.clock.mark()
        return False, Metrics()


class Flat(torch.nn.Module):
    """A state of so many numbers and no work."""

    def __init__(self, num_elements: int):
        super().__init__()
        self.state = torch.nn.Parameter(torch.zeros(num_elements))

    def loss(self, x):
        """Never called: clients do not train."""
        return self.state.sum()

    def metrics(self, x):
        """Nothing to measure."""
        return {"loss": Weighted(0, 1)}


def trained_model() -> torch.nn.Module:
    """The LoRA workload's model with the two functions that pfl asks for."""
    net = work.build_model()

    def loss(self, x):
        self.train()
        return self(input_ids=x, labels=x).loss

    def metrics(self, x):
        with torch.no_grad():
            return {"loss": Weighted(float(self(input_ids=x, labels=x).loss) * len(x), len(x))}

    net.loss, net.metrics = types.MethodType(loss, net), types.MethodType(metrics, net)
    return net


def main() -> None:
    args = work.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)
    net = trained_model() if args.work == "lora" else Flat(args.elements)
    trainable = [p for p in net.parameters() if p.requires_grad]
    users = list(range(args.clients))

    def make_user(client_id: int) -> Dataset:
        examples = work.client_tokens(client_id) if args.work == "lora" else torch.zeros(16, 1)
        return Dataset((examples,), user_id=str(client_id))

    sampler = get_user_sampler("minimize_reuse", users)
    data = FederatedDataset(make_user, sampler, user_id_to_weight=dict.fromkeys(users, 1))
    end_of_round = EndOfRound()
    algorithm = FederatedAveraging() if args.work == "lora" else NoOp()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=args.rounds + 1,
            evaluation_frequency=10**9,
            train_cohort_size=args.clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(
            model=net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(trainable, 1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.LEARNING_RATE, local_batch_size=work.BATCH_SIZE
        ),
        model_eval_params=None,
        callbacks=[end_of_round],
    )
    distributed = get_framework_module().distributed
    if distributed.global_rank == 0:
        end_of_round.clock.report(f"pfl-research, {distributed.world_size} process(es)", args.clients)


if __name__ == "__main__":
    main()
