"""MLflow's own server behind a door that loses answers: whatever is lost, the store holds everything once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetune.tracking.client import make_client
from fleetune.tracking.sync import sync
from support.stored import expected_steps, steps
from support.synthetic_runs import make_run, make_spec


class LossyDoor:
    """Passes calls on to MLflow's application, and loses the answers that it is told to lose."""

    def __init__(self, app: Callable[..., Iterable[bytes]]):
        self.app = app
        self.lose: dict[str, int] = {}
        """End of a path -> how many answers are still to be lost."""
        self.how = "500"
        self.lost: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        answer: list[Any] = []
        body = b"".join(self.app(environ, lambda status, headers, info=None: answer.extend([status, headers])))
        path = environ["PATH_INFO"]
        for ending, left in self.lose.items():
            if environ["REQUEST_METHOD"] == "POST" and path.endswith(ending) and left:
                self.lose[ending] -= 1
                self.lost.append(path)
                if self.how == "cut":
                    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                    raise ConnectionAbortedError("the line is cut")
                start_response(f"{self.how} lost", [("Content-Length", "0")])
                return [b""]
        start_response(*answer)
        return [body]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LossyDoor, str]]:
    """One server for all tests here, in a thread of this process."""
    folder = tmp_path_factory.mktemp("server")
    uri = f"sqlite:///{folder}/server.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", uri)
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(folder / "artifacts"))
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        make_client(uri)
        from mlflow.server import app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, type: str, message: str, *args: Any) -> None: ...

        lossy = LossyDoor(app)
        server = make_server("127.0.0.1", 0, lossy, threaded=True, request_handler=Quiet)  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lossy, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("how", ["500", "cut"])
def test_one_lost_answer_of_each_call_makes_nothing_twice(how: str, door: tuple[LossyDoor, str], tmp_path: Path):
    """Every call is carried out, and its first answer lost: by an error of the server or a proxy, or a connection that breaks."""
    lossy, uri = door
    run = make_run(tmp_path, f"lossy-{how}", spec={**make_spec(num_rounds=3), "name": f"lossy {how}"})
    (run.path / "figures").mkdir()  # drawn already
    endings = (
        "experiments/create",
        "runs/create",
        "log-inputs",
        "log-batch",
        "logged-models",
        "outputs",
        "runs/update",
    )
    lossy.lose, lossy.how, lossy.lost = dict.fromkeys(endings, 1), how, []
    report = sync(run.path, uri=uri)
    assert {path.rpartition("/")[2] for path in lossy.lost} >= {
        "create",
        "log-inputs",
        "log-batch",
        "logged-models",
        "outputs",
    }
    assert lossy.lose["runs/create"] == lossy.lose["logged-models"] == 0
    client = make_client(uri)
    (stored,) = client.search_runs([report.experiment_id], filter_string=f"tags.fleetune_run_id = '{run.run_id}'")
    assert stored.info.status == "FINISHED"
    assert steps(uri, report.mlflow_run_id) == expected_steps(run)
    (model,) = client.search_logged_models([report.experiment_id])
    assert [out.model_id for out in client.get_run(report.mlflow_run_id).outputs.model_outputs] == [model.model_id]
    assert len(client.get_run(report.mlflow_run_id).inputs.dataset_inputs) == 1
    again = sync(run.path, uri=uri)
    assert (again.num_metrics, again.num_params, again.num_artifacts) == (0, 0, 0)


def test_a_run_that_was_made_twice_is_one_after_a_sync(door: tuple[LossyDoor, str], tmp_path: Path):
    """As an earlier version, or an answer that came after all waiting, leaves it: the empty one goes to MLflow's trash."""
    lossy, uri = door
    lossy.lose = {}
    run = make_run(tmp_path, "twice", spec={**make_spec(num_rounds=2), "name": "twice"})
    (run.path / "figures").mkdir()
    client = make_client(uri)
    experiment_id = client.create_experiment("twice")
    for _ in range(2):
        client.create_run(experiment_id, tags={"fleetune_run_id": "twice"})
    report = sync(run.path, uri=uri)
    (stored,) = client.search_runs([experiment_id])
    assert (stored.info.run_id, stored.info.status) == (report.mlflow_run_id, "FINISHED")


def test_a_server_that_refuses_is_asked_once(door: tuple[LossyDoor, str], tmp_path: Path):
    """An answer that is clear is no reason to try again, and no other call is repeated less often for it."""
    import os

    from mlflow.exceptions import MlflowException

    from fleetune.tracking.client import RETRIES, made_once

    asked: list[str] = []

    def refuse() -> None:
        asked.append(os.environ[RETRIES])
        raise MlflowException.invalid_parameter_value("no")

    before = os.environ[RETRIES]
    with pytest.raises(MlflowException, match="no"):
        made_once(refuse, lambda: None)
    assert (asked, os.environ[RETRIES]) == (["0"], before)
