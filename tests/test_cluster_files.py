"""What lies in cluster/, as far as it can be checked without Docker, Kubernetes, Slurm and a cloud."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetune.cli import app
from support import commands, services

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
YAML = sorted(CLUSTER.rglob("*.yaml"))
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))

# Fields of ray.io/v1 that may be used here: KubeRay's API reference, version 1.6.
# https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html
CLUSTER_SPEC = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"),
    *("headServiceAnnotations", "gcsFaultToleranceOptions", "suspend", "managedBy", "upgradeStrategy"),
}
HEAD_GROUP = {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources", "labels"}
WORKER_GROUP = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts", "rayStartParams"),
    *("template", "scaleStrategy", "suspend", "resources", "labels"),
}
JOB_SPEC = {
    *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"),
    *("runtimeEnvYAML", "submissionMode", "activeDeadlineSeconds", "submitterPodTemplate", "metadata", "jobId"),
    *("clusterSelector", "suspend", "entrypointNumCpus", "entrypointResources", "deletionStrategy"),
}


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / path).read_text(encoding="utf-8"))


# -- Kubernetes ---------------------------------------------------------------------------------------------------------
def check_pod(template: dict[str, Any]) -> None:
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert container["name"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        # Ray sees as many cores as the limit says, so a request below it would promise cores that are not there.
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all(len(port["name"]) <= 15 for port in container.get("ports", ()))  # Kubernetes' limit


def check_cluster(spec: dict[str, Any]) -> None:
    assert set(spec) <= CLUSTER_SPEC
    assert spec["authOptions"] == {"mode": "token"}
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert set(head) <= HEAD_GROUP
    check_pod(head["template"])
    for group in workers:
        assert set(group) <= WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        check_pod(group["template"])
    for group in (head, *workers):  # a Go map[string]string: a bare 0 or true is refused
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_manifests_for_kuberay():
    """The job brings the very cluster of raycluster.yaml, and asks for the volume of storage.yaml."""
    cluster, job = read("kubernetes/raycluster.yaml"), read("kubernetes/rayjob.yaml")
    assert [(m["apiVersion"], m["kind"]) for m in (cluster, job)] == [
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    ]
    check_cluster(cluster["spec"])
    assert set(job["spec"]) <= JOB_SPEC
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    (volume,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == read("kubernetes/storage.yaml")["metadata"]["name"]
    python, dash_m, fleetune, *command = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, fleetune) == ("python", "-m", "fleetune")
    check_command(command)


# -- Ray's own launcher ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["ray/onprem.yaml", "ray/aws.yaml"])
def test_the_clusters_of_ray_up(path: str):
    """Ray's schema, after its own defaults; every node starts with the token that is copied to it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(path)
    validate_config(prepare_config(config))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_one_version_of_ray_everywhere():
    """Nodes and clients of one Ray cluster must have the same."""
    text = "\n".join(path.read_text() for path in [*YAML, CLUSTER / "Dockerfile"])
    versions = re.findall(r"(?:ray==|rayVersion: |RAY_VERSION=|tune\]==|rayproject/ray:)(\d+\.\d+\.\d+)", text)
    assert len(versions) >= 5
    assert len(set(versions)) == 1


# -- containers -----------------------------------------------------------------------------------------------------------
def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def test_the_dockerfile():
    """Known instructions, sources that exist and are sent to the builder, versions that are pinned, and no root at the end."""
    known = {"FROM", "ARG", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE", "ENTRYPOINT"}
    assert {name for name, _ in instructions()} <= known
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    for name, rest in instructions():
        if name == "COPY":
            *sources, _ = [word for word in shlex.split(rest) if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)
            assert all(any(source.startswith(kept[1:]) for kept in sent if kept[0] == "!") for source in sources)
        if name == "FROM":
            assert re.search(r":[\d$]", rest), rest
    stages = "\n".join(" ".join(one) for one in instructions()).split("FROM ")[1:]
    for stage in stages:
        assert re.findall(r"^USER (\S+)", stage, flags=re.M)[-1] not in ("root", "0")


def test_the_mlflow_stack_asks_for_every_secret_and_listens_on_this_machine_alone():
    text = (CLUSTER / "compose.yaml").read_text()
    example = (CLUSTER / ".env.example").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == set(re.findall(r"^(\w+)=$", example, flags=re.M))  # named, and empty
    assert not [name for name in re.findall(r"\$\{(\w+):?-", text) if re.search("PASSWORD|KEY|SECRET", name)]
    services = read("compose.yaml")["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"mlflow": ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]}
    assert all(re.search(r":v?\d", service["image"]) for service in services.values() if "image" in service)
    build = services["mlflow"]["build"]
    assert (CLUSTER / build["context"] / build["dockerfile"]).exists()
    assert any(name == "FROM" and rest.endswith(f"AS {build['target']}") for name, rest in instructions())
    volumes = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert volumes == set(read("compose.yaml")["volumes"])


def has_compose() -> bool:
    return (
        bool(shutil.which("docker"))
        and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    )


@pytest.mark.skipif(not has_compose(), reason="needs docker compose")
def test_docker_compose_reads_the_mlflow_stack(tmp_path: Path):
    lines = (CLUSTER / ".env.example").read_text().splitlines()
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.write_text("\n".join(lines))
    full.write_text("\n".join(f"{line}x" if line.endswith("=") else line for line in lines))
    for file, status in ((empty, 1), (full, 0)):
        command = ["docker", "compose", "--file", CLUSTER / "compose.yaml", "--env-file", file, "config", "--quiet"]
        assert bool(subprocess.run(command, capture_output=True).returncode) == bool(status)


def test_nothing_listens_on_all_interfaces_without_authentication():
    """Where 0.0.0.0 stands, a token or a password guards it."""
    found = {str(path.relative_to(CLUSTER)) for path in [*YAML, *SCRIPTS] if "0.0.0.0" in path.read_text()}
    assert found == {"compose.yaml", "kubernetes/raycluster.yaml", "kubernetes/rayjob.yaml"}
    assert "--app-name basic-auth" in (CLUSTER / "mlflow" / "serve.sh").read_text()


# -- scripts and README ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one(path: Path):
    shell = path.read_text().partition("\n")[0].rpartition("/")[2].rpartition(" ")[2]
    assert subprocess.run([shell, "-n", path]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "--severity=warning", path]).returncode == 0


def check_command(arguments: list[str]) -> None:
    """It parses, and the job file that it names exists."""
    import typer

    name, *rest = arguments
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    parsed = command.make_context(name, list(rest))
    file = parsed.params.get("job") or parsed.params.get("file")
    assert file is None or (ROOT / file).exists(), arguments


def test_what_the_readme_says_to_type_is_there():
    text = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, flags=re.S))
    commands = re.findall(r"^\s*(?:\w+=\S+ )*fleetune (.*?)(?:\s+#.*)?$", blocks, flags=re.M)
    assert len(commands) >= 3
    for command in commands:
        check_command(shlex.split(command))
    named = re.findall(r"cluster/[\w./-]*\w", text)
    assert len(named) >= 6
    assert [path for path in named if not (ROOT / path).exists()] == []
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s:]+)\)", text)]
    assert [link for link in links if not (CLUSTER / link).exists()] == []


def test_the_slurm_script_s_port_is_one_that_nobody_takes(monkeypatch: pytest.MonkeyPatch):
    """The script's own line, for job ids of every size: outside of what Ray gives its workers (10002 to 19999, which its head
    refuses) and of what Linux hands out (32768 to 60999); neighbours in time get different ports; RAY_PORT wins.
    """
    (line,) = re.findall(r"^port=.*$", (CLUSTER / "slurm.sh").read_text(), flags=re.M)
    ids = [1, *range(9_990, 10_020), *range(11_990, 12_010), *range(19_990, 20_010), 31_999, 4_294_967, 2**31 - 1]
    monkeypatch.delenv("RAY_PORT", raising=False)
    loop = f"for SLURM_JOB_ID in {' '.join(map(str, ids))}; do {line}; echo $port; done"
    ports = [int(port) for port in subprocess.check_output(["bash", "-c", loop], text=True).split()]
    assert len(ports) == len(ids)
    assert all(19999 < port < 32768 for port in ports)
    assert all(a != b for a, b in itertools.pairwise(ports))
    chosen = subprocess.check_output(["bash", "-c", f"RAY_PORT=7000; SLURM_JOB_ID=5; {line}; echo $port"], text=True)
    assert chosen.strip() == "7000"


def test_what_a_quickstart_leaves_behind_is_ignored():
    """Runs, sweeps, reports and MLflow's files of a workspace in the checkout; jobs/sweeps/ is a part of the sources."""
    left = ["runs/a/spec.yaml", "sweeps/a/sweep.yaml", "report/report.html", "mlflow.db", "mlartifacts/x", "mlruns/x"]
    asked = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *left, "jobs/sweeps/growth_rate.yaml"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == left


FAKES = {
    # The allocation of a job with two nodes, both of them this machine.
    "scontrol": "#!/bin/sh\nprintf 'one\\ntwo\\n'\n",
    "hostname": "#!/bin/sh\necho 127.0.0.1\n",
    "srun": '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do echo "$1" >>"$SRUN_LOG"; shift; done\nexec "$@"\n',
}


@pytest.mark.ray
@pytest.mark.nodes
@pytest.mark.timeout(200)
def test_the_slurm_script_runs_a_job_on_two_nodes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """With stand-ins for Slurm's commands that start on this machine what they should start on a node.

    The run's two workers ask for a core each, and each node has one: both nodes work. Ray ends with the script.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, source in FAKES.items():
        (programs / name).write_text(source)
        (programs / name).chmod(0o755)
    (programs / "fleetune").write_text(f'#!/bin/sh\nexec {sys.executable} -m fleetune "$@"\n')
    (programs / "fleetune").chmod(0o755)
    job = commands.job_file(tmp_path, {"rounds.num_rounds": 1, "execution.workers": 2})
    env = {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SRUN_LOG": str(tmp_path / "srun.log"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_TMPDIR": str(tmp_path_factory.mktemp("r")),
        "RAY_PORT": str(services.free_port()),
    }
    command = ["bash", CLUSTER / "slurm.sh", "run", job, "--workspace", tmp_path, "--json"]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out = commands.finish(process)
    assert out.status == 0, out.stderr
    assert out.document["status"] == "finished"
    assert "in 2 Ray workers" in out.stderr
    log = (tmp_path / "srun.log").read_text().splitlines()
    assert [line for line in log if line.startswith("--nodelist")] == [f"--nodelist={n}" for n in ("one", "one", "two")]
    assert subprocess.run(["bash", CLUSTER / "slurm.sh"], env=env, capture_output=True).returncode == 2
