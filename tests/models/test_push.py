"""Pushing to the hub, against a stand-in of its HTTP API.

The hub's client reads its address once, when it is loaded: so each push is a process of its own, as
on the command line; most of them know no torch and start at once.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from prefloop.cli import main
from prefloop.models.export import export_model
from prefloop.models.load import load_policy
from tests.hub import TOKEN, standing_in
from tests.models.test_export import moved
from tests.models.test_load import folder_of
from tests.tiny import tiny_model
from tests.training.small import CPU, python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    model = moved(load_policy(folder_of(folder / "base", tiny_model("llama")), CPU, lora_rank=2))
    export_model(model, folder / "adapter")
    return folder / "adapter"


def process(place, address, *words, token=TOKEN, **more):
    """Exit code, output and errors of a Python that finds the hub at `address`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}",
        "HF_HOME": str(place / "home"),
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",  # whose storage the stand-in does not have
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **({"HF_TOKEN": token} if token else {}),
        **more,
    }
    done = subprocess.run(
        python(*map(str, words)),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=place,
    )
    return done.returncode, done.stdout, done.stderr


def prefloop(place, address, *words, **more):
    return process(place, address, "-m", "prefloop", *words, **more)


ALONE = """
import sys
from pathlib import Path
from prefloop import hub
from prefloop.errors import UserError
try:
    hub.require_login("owner/name")
    print(hub.push(Path(sys.argv[1]), "owner/name", sys.argv[2] == "private"))
except UserError as error:
    sys.exit("prefloop: " + str(error))
assert "torch" not in sys.modules
"""


def pushed(folder, address, private="", **more):
    """The same of a login and a push alone."""
    return process(folder.parent, address, "-c", ALONE, folder.name, private, **more)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"weights" * 999)
    return tmp_path / "out"


def told(errors):
    """The one line of a failure."""
    [line] = [line for line in errors.splitlines() if line.startswith("prefloop: ")]
    assert "Traceback" not in errors
    return line


def test_a_merged_model_goes_up_with_its_card(adapter, tmp_path):
    with standing_in() as hub:
        code, printed, errors = prefloop(
            tmp_path, hub.url, "export", adapter, "--merge", "--dtype", "bfloat16",
            "--push-to-hub", "owner/name", "--private",
        )  # fmt: skip
    assert (code, printed) == (0, f"{hub.url}/owner/name\n"), errors
    assert (hub.private, hub.commits) == (True, 1)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= hub.files.keys()
    weights = load(hub.files["model.safetensors"])
    base = load_file(adapter.parent / "base" / "model.safetensors")
    assert weights.keys() == base.keys()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads(hub.files["config.json"])["dtype"] == "bfloat16"
    _, head, text = hub.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("owner/name")' in text
    assert str(adapter.parent) not in text
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


@pytest.mark.slow
def test_a_file_for_llama_cpp_is_named_after_the_repository(adapter, tmp_path):
    pytest.importorskip("gguf")
    with standing_in() as hub:
        code, _, errors = prefloop(
            tmp_path, hub.url, "export", adapter, "--merge", "--gguf", "--push-to-hub", "owner/name"
        )
    assert code == 0, errors
    assert {name for name in hub.files if "." in name[1:]} == {"README.md", "name-F32.gguf"}
    assert hub.files["name-F32.gguf"][:4] == b"GGUF"
    assert "llama-server --model name-F32.gguf" in hub.files["README.md"].decode()


@pytest.mark.parametrize("private", ["private", ""])
def test_a_folder_goes_up_as_one_commit(private, folder):
    with standing_in() as hub:
        code, printed, errors = pushed(folder, hub.url, private)
    assert (code, printed) == (0, f"{hub.url}/owner/name\n"), errors
    assert (hub.private, hub.commits) == (bool(private), 1)
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fails_at", ["/repos/create", "/preupload/", "/objects/", "/commit/"])
def test_what_the_hub_refuses_is_one_line(fails_at, folder):
    with standing_in(fails_at) as hub:
        code, _, errors = pushed(folder, hub.url)
    assert code == 1
    line = told(errors)
    assert line.startswith("prefloop: --push-to-hub owner/name: ")
    assert "403" in line
    assert line.endswith("; out is whole, push it again from there")
    assert hub.commits == 0


def test_no_token_a_foreign_one_and_no_network_are_one_line(folder):
    with standing_in() as hub:
        assert told(pushed(folder, hub.url, token=None)[2]) == (
            "prefloop: --push-to-hub owner/name: no token of the hub here; run `hf auth login`, or "
            "set HF_TOKEN"
        )
        line = told(pushed(folder, hub.url, token="hf_other")[2])
        assert line.endswith("look at the token and the network")
        assert "offline mode is enabled" in told(pushed(folder, hub.url, HF_HUB_OFFLINE="1")[2])
    assert not any("repos" in asked for asked in hub.asked)


@pytest.mark.slow
def test_a_failed_push_leaves_the_folder_and_a_failed_login_none(adapter, tmp_path):
    words = ("export", adapter, "--merge", "--output", "out", "--push-to-hub", "owner/name")
    with standing_in() as hub:
        code, _, errors = prefloop(tmp_path, hub.url, *words, token="hf_other")
    assert code == 2
    assert told(errors).endswith("; look at the token and the network")
    assert not (tmp_path / "out").exists()
    with standing_in("/commit/") as hub:
        code, _, errors = prefloop(tmp_path, hub.url, *words)
    assert code == 2
    assert told(errors).endswith("; out is whole, push it again from there")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_adapter_of_a_folder_here_is_not_pushed_alone(adapter, capsys):
    assert main(["export", str(adapter), "--push-to-hub", "owner/name"]) == 2
    assert "which nobody else can load; give --merge" in capsys.readouterr().err
