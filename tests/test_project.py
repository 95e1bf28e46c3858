"""Packaging and the files that hosts and helpers read: they parse, and name what exists."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def parsed(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([s.operator for s in r.specifier] == ["=="] for r in required)
    return {r.name.lower().replace("_", "-"): next(iter(r.specifier)).version for r in required}


def make_targets(text):
    return set(re.findall(r"\bmake ([a-z-]+)", text))


def test_python_versions_agree():
    admitted = SpecifierSet(PROJECT["requires-python"])
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert named == {"3.11", "3.12", "3.13"}
    assert {f"3.{n}" for n in range(9, 20) if f"3.{n}" in admitted} == named


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_exact_versions_are_admitted(name):
    found = pins(name)
    for package, requirement in DEPENDENCIES.items():
        assert package in found, package
        assert found[package] in requirement.specifier, package


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_oldest_pair_is_the_lowest_that_is_admitted(package):
    (bound,) = DEPENDENCIES[package].specifier
    assert bound.operator == ">="
    assert pins("constraints-oldest.txt")[package] == f"{bound.version}.0"


def test_the_makefile_installs_the_pinned_torch():
    makes = (ROOT / "Makefile").read_text()
    wanted = [pins(name)["torch"] for name in ("constraints.txt", "constraints-oldest.txt")]
    assert sorted(re.findall(r"torch==(\S+)", makes)) == sorted(wanted)


def test_only_recipes_need_the_extra_demo_and_gguf_is_loaded_where_it_is_written():
    assert {"gguf", "scikit-learn"}.isdisjoint(DEPENDENCIES)
    extra = [Requirement(r).name for r in PROJECT["optional-dependencies"]["demo"]]
    assert sorted(extra) == ["gguf", "scikit-learn"]
    for path in (ROOT / "src").rglob("*.py"):
        if re.search(r"^\s*(from|import) (gguf|sklearn)\b", path.read_text(), flags=re.MULTILINE):
            assert path.parent.name == "recipes" or path.stem == "gguf", path


WITHOUT = """
import sys
sys.modules["{module}"] = None  # as if it were not installed
from prefloop.cli import main
sys.exit(main({words}))
"""


@pytest.mark.parametrize(
    ("module", "extra", "words"),
    [
        ("gguf", "demo", ["fetch-model"]),
        ("gguf", "demo", ["demo", "--output", "out"]),
        ("sklearn", "demo", ["demo", "--output", "out"]),
        ("sklearn", "demo", "evaluate winrate --answers a.jsonl --baseline a.jsonl".split()),
        ("gguf", "gguf", ["export", "base", "--gguf", "--output", "out"]),
    ],
)
def test_a_command_without_its_extra_tells_the_remedy(module, extra, words, tmp_path):
    if words[0] == "export":
        tiny_model("llama").config.save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
    if words[0] == "evaluate":
        words = [*words, "--judge", "prefloop.recipes.sentiment_data:gold_reward"]
        (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(module=module, words=words)],
        cwd=tmp_path,
        env={"PREFLOOP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"not installed: {module}; run pip install 'prefloop[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "src" / "prefloop" / "py.typed").exists()
    assert importlib.metadata.version("prefloop") == PROJECT["version"]


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    kinds = re.findall(r"^### (.*)$", text, flags=re.MULTILINE)
    assert set(kinds) <= set("Added Changed Deprecated Removed Fixed Security".split())


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_issue_forms_are_whole(name):
    form = parsed(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form.keys() == {"name", "description", "labels", "body"}
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids)) > 1
    for part in form["body"]:
        assert part["type"] == "textarea"
        assert part["attributes"]["label"]


def test_the_pull_request_template_names_what_exists():
    path = ROOT / ".github" / "pull_request_template.md"
    text = path.read_text(encoding="utf-8")
    assert {"check", "test"} <= make_targets(text) <= TARGETS
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / target).exists(), target


def test_the_workflow_runs_what_we_run():
    flow = parsed(".github/workflows/ci.yml")
    assert flow[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    assert "bash .ci/run" in runs
    assert make_targets("\n".join(runs)) <= TARGETS
    tested = [flow["jobs"]["ci"]["steps"][1]["with"]["python-version"]]
    tested += flow["jobs"]["versions"]["strategy"]["matrix"]["python-version"]
    assert all(f"Programming Language :: Python :: {v}" in PROJECT["classifiers"] for v in tested)


def test_pre_commit_hooks_are_make_targets():
    (repo,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"  # nothing but what constraints.txt pins
    assert {hook["entry"].removeprefix("make ") for hook in repo["hooks"]} <= TARGETS


def test_ci_runs_the_oldest_pair():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test-oldest" in script
    assert make_targets(script) <= TARGETS
