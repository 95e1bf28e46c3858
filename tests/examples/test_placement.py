"""The launchers of examples/placement, run by a shell whose programs say what they were asked."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml
from torch.distributed.run import get_args_parser

from prefloop.commands import COMMANDS
from prefloop.config.checks import validate
from prefloop.config.resolve import resolve
from prefloop.recipes.pipeline import read_stages

PLACEMENT = Path(__file__).parents[2] / "examples" / "placement"
SHELL = sorted(p for p in PLACEMENT.iterdir() if p.suffix in (".sh", ".sbatch"))
SAY = '#!/bin/bash\nline=$(printf "%q " "gpus=$CUDA_VISIBLE_DEVICES" "dev=$VLLM_SERVER_DEV_MODE" '
SAY += '"${0##*/}" "$@")\necho "$line" >> "$SAID"\n'  # at once: servers start side by side
STUBS = {
    "torchrun": SAY,
    "python": SAY,
    "scontrol": "#!/bin/bash\nprintf '%s\\n' node0 node1 node2\n",
    "srun": SAY + 'while [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
}
HOSTS = ["node0", "node1", "node2"]


class Asked(NamedTuple):
    """A program's words, and two variables of its environment."""

    gpus: str
    dev: str
    program: str
    words: list


@pytest.fixture
def shell(tmp_path):
    """Runs a script; gives what each program was asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STUBS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    said = tmp_path / "said"

    def run(script, **variables):
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SAID": str(said)}
        waiting = f"{script}\nwait"  # for what it leaves in the background
        subprocess.run(
            ["bash", "-c", waiting], env=environment | variables, cwd=PLACEMENT, check=True
        )
        asked = []
        for line in said.read_text().splitlines():
            gpus, dev, program, *words = shlex.split(line)
            asked.append(
                Asked(gpus.removeprefix("gpus="), dev.removeprefix("dev="), program, words)
            )
        said.unlink()
        return asked

    return run


class Launched(NamedTuple):
    """What torchrun was asked, and the settings of the command that it starts."""

    torchrun: object
    command: str
    config: object

    @property
    def ranks(self):
        """`1:1` nodes where none are given."""
        nodes = int(self.torchrun.nnodes.partition(":")[0])
        return nodes * int(self.torchrun.nproc_per_node)


def launched(asked, folder=PLACEMENT):
    """By torchrun's own parser and our own; nothing is run."""
    [one] = [each for each in asked if each.program == "torchrun"]
    found = get_args_parser().parse_args(one.words)
    assert (found.module, found.training_script) == (True, "prefloop")
    command, *flags = found.training_script_args
    path = None
    if "--config" in flags:
        place = flags.index("--config")
        path = folder / flags[place + 1]
        flags = flags[:place] + flags[place + 2 :]
    config = resolve(COMMANDS[command].config, path, flags)
    validate(config)
    return Launched(found, command, config)


def check_servers(asked, config):
    """Those that are started are those that are asked, and let weights in; no GPU has two."""
    servers = [each for each in asked if each.program == "python"]
    assert all(
        server.words[:2] == ["-m", "vllm.entrypoints.openai.api_server"] for server in servers
    )
    assert all(server.dev == "1" for server in servers)
    options = [dict(zip(s.words[2::2], s.words[3::2], strict=True)) for s in servers]
    ports = [int(option["--port"]) for option in options]
    urls = [urlsplit(url) for url in config.rollout_servers]
    assert sorted(url.port for url in urls) == sorted(ports) and len(set(ports)) == len(ports)
    gpus = [gpu for server in servers for gpu in server.gpus.split(",")]
    assert len(set(gpus)) == len(gpus)
    for option, server in zip(options, servers, strict=True):
        assert option["--model"] == f"{config.model}/model"
        assert option["--logprobs-mode"] == "processed_logprobs"
        assert int(option.get("--tensor-parallel-size", 1)) == len(server.gpus.split(","))
        assert option["--host"] == "0.0.0.0" or urls[0].hostname == option["--host"]
    return urls, gpus


def mesh_of(config):
    replicas, shards = map(int, config.mesh.split("x"))
    return replicas * shards


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", path], check=True)
    assert "set -euo pipefail" in path.read_text()
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


def test_one_machine_is_a_pipeline(tmp_path):
    stages = read_stages(PLACEMENT / "one-machine.yaml", tmp_path, COMMANDS)
    assert [(s.name, s.ranks) for s in stages] == [
        ("sft", 8),
        ("rm", 8),
        ("ppo", 8),
        ("compare", 1),
    ]
    assert stages[2].config.reward_model == str(tmp_path / "rm")


def test_trainers_and_servers_of_one_machine_share_its_gpus(shell):
    asked = shell((PLACEMENT / "trainer-and-server.sh").read_text())
    run = launched(asked)
    urls, gpus = check_servers(asked, run.config)
    assert {url.hostname for url in urls} == {"127.0.0.1"}
    [own] = [each.gpus.split(",") for each in asked if each.program == "torchrun"]
    assert len(own) == run.ranks == 6 and run.torchrun.standalone
    assert sorted(own + gpus) == [str(n) for n in range(8)]


def test_several_machines_meet_at_one(shell):
    asked = shell((PLACEMENT / "torchrun.sh").read_text(), HEAD="node0", NODES="4")
    run = launched(asked)
    assert (run.command, run.ranks, mesh_of(run.config)) == ("sft", 32, 32)
    assert (run.torchrun.rdzv_backend, run.torchrun.rdzv_endpoint) == ("c10d", "node0:29500")
    assert run.config.output.is_relative_to("/shared")


def test_slurms_nodes_are_trainers_and_one_writer(shell):
    text = (PLACEMENT / "slurm.sbatch").read_text()
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    asked = shell(text, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node[0-2]")
    run = launched(asked)
    urls, gpus = check_servers(asked, run.config)
    starts = [dict(w[2:].split("=") for w in each.words if re.match("--[a-z]+=", w))
              for each in asked if each.program == "srun"]  # fmt: skip
    writer, trainers = sorted(starts, key=lambda start: start["nodes"])
    assert {url.hostname for url in urls} == {writer["nodelist"]} == {trainers["exclude"]}
    assert writer["nodelist"] == HOSTS[-1] and trainers["ntasks"] == trainers["nodes"]
    assert int(writer["nodes"]) + int(trainers["nodes"]) == int(told["nodes"]) == len(HOSTS)
    assert int(told["gpus-per-node"]) == int(run.torchrun.nproc_per_node) == len(gpus)
    assert int(run.torchrun.nnodes) == int(trainers["nodes"]) and told["ntasks-per-node"] == "1"
    assert run.ranks == mesh_of(run.config) and run.torchrun.rdzv_endpoint == "node0:29500"
    assert told["signal"].startswith("TERM@") and run.torchrun.rdzv_id == "7"


def containers(job):
    pod = job["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return job["template"]["spec"], pod, container


def test_kubernetes_pods_find_each_other(shell):
    [jobs] = yaml.safe_load_all((PLACEMENT / "kubernetes.yaml").read_text())
    name, subdomain = jobs["metadata"]["name"], jobs["spec"]["network"]["subdomain"]
    trainer, server = jobs["spec"]["replicatedJobs"]
    job, pod, container = containers(trainer)
    asked = shell(container["args"][0], JOB_COMPLETION_INDEX="1")
    run = launched(relocated(asked))
    assert job["parallelism"] == job["completions"] == int(run.torchrun.nnodes)
    assert job["completionMode"] == "Indexed" and run.torchrun.node_rank == 1
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(run.torchrun.nproc_per_node)
    assert run.torchrun.master_addr == f"{name}-{trainer['name']}-0-0.{subdomain}"
    assert [{"containerPort": run.torchrun.master_port}] == container["ports"]
    assert run.ranks == mesh_of(run.config)
    assert jobs["spec"]["successPolicy"]["targetReplicatedJobs"] == [trainer["name"]]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert run.config.output.is_relative_to(mounts["shared"]) and mounts["config"] == "/config"
    _, pod, container = containers(server)
    urls, gpus = check_servers(shell(container["args"][0]), run.config)
    assert {url.hostname for url in urls} == {f"{name}-{server['name']}-0-0.{subdomain}"}
    assert [{"containerPort": url.port} for url in urls] == container["ports"]
    assert len(gpus) == container["resources"]["limits"]["nvidia.com/gpu"]


def relocated(asked):
    """The configuration map's file is the one beside."""
    return [each._replace(words=[w.removeprefix("/config/") for w in each.words]) for each in asked]


def test_skypilots_variables_are_torchruns(shell):
    task = yaml.safe_load((PLACEMENT / "skypilot.yaml").read_text())
    kind, _, gpus = task["resources"]["accelerators"].partition(":")
    variables = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": gpus}
    variables["NUM_NODES"] = str(task["num_nodes"])
    asked = shell(task["run"], **{f"SKYPILOT_{name}": value for name, value in variables.items()})
    run = launched(asked)
    assert (run.command, run.ranks, run.torchrun.node_rank) == ("dpo", 16, 1)
    assert (run.torchrun.master_addr, run.torchrun.master_port) == ("10.0.0.1", 29500)
    [mounted] = task["volumes"]
    assert run.config.output.is_relative_to(mounted) and kind


def test_every_file_is_tried_here():
    text = Path(__file__).read_text(encoding="utf-8")
    tried = [p.name for p in PLACEMENT.iterdir() if f'/ "{p.name}"' in text]
    assert {p.name for p in PLACEMENT.iterdir()} == {*tried, "ppo.yaml"}  # which launchers name
