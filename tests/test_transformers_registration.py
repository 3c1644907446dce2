"""How transformers comes to know compressed checkpoints: imports in any order, failures, and processes without us."""

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto

import sparsify
from sparsify import hooks
from sparsify.plugins import transformers_quantizer
from sparsify.plugins.transformers_quantizer import SparsifyConfig, SparsifyQuantizer
from tests.checkpoints import Folders, kinds, make_folders, opened, same

ORDERS = [
    "import sparsify, transformers.modeling_utils",
    "import transformers.modeling_utils, sparsify",
    "import transformers, sparsify, transformers.quantizers",
    "import sparsify, transformers.core_model_loading, transformers.quantizers.auto",
    "import sparsify.plugins.transformers_quantizer, importlib; importlib.reload(sparsify)",
    "import importlib, sparsify; importlib.reload(sparsify.hooks); importlib.reload(sparsify)",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids_file: str) -> Folders:
    return make_folders(tmp_path_factory.mktemp("compressed"), ids_file)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize(("family", "pattern"), [("llama", "2:4"), ("llama", "0.5"), ("qwen3_moe", "2:4")])
def test_without_sparsify_nothing_is_made_up(family: str, pattern: str, folders: Folders) -> None:
    packed = folders(family, pattern)[1]
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        f"try: AutoModelForCausalLM.from_pretrained({str(packed)!r})\n"
        "except RuntimeError as error: print('raised')\n"
        "assert 'sparsify' not in sys.modules\n"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "raised\n"), result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each order would take a minute")
def test_imports_in_any_order() -> None:
    code = (
        "import sys, os, torch\n"
        "children = []\n"
        f"for order in {ORDERS!r}:\n"
        "    children.append((os.fork(), order))\n"
        "    if not children[-1][0]:\n"
        "        exec(order)\n"
        "        from transformers.quantizers import auto\n"
        "        assert auto.AUTO_QUANTIZER_MAPPING['sparsify'].__name__ == 'SparsifyQuantizer'\n"
        "        assert not any(type(finder).__module__ == 'sparsify.hooks' for finder in sys.meta_path), order\n"
        "        assert 'exec_module' not in vars(auto.__spec__.loader)\n"
        "        os._exit(0)\n"
        "for child, order in children:\n"
        "    assert os.waitpid(child, 0)[1] == 0, order\n"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_process_of_its_own_opens_checkpoints(folders: Folders) -> None:
    code = (
        "import importlib, sparsify\nfrom transformers import AutoModelForCausalLM\n"
        "from sparsify.plugins import transformers_quantizer\nimportlib.reload(transformers_quantizer)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folders('llama')[1])!r})\n"
        "print(model.hf_quantizer.quantization_config.ignore)"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "['lm_head', 'model.embed_tokens']\n"), result.stderr


def test_importing_us_imports_nothing_else() -> None:
    result = python("import sparsify, sys\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_a_failure_to_register_breaks_nothing() -> None:
    code = (
        "import sys\nsys.modules['sparsify.plugins.transformers_quantizer'] = None\n"
        "import sparsify\nfrom transformers import LlamaConfig, LlamaForCausalLM\nprint(LlamaConfig.model_type)"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "llama\n"), result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "sparsify" in line]
    assert line.startswith("transformers cannot open compressed checkpoints: ModuleNotFoundError")


def test_a_failed_import_of_transformers_may_be_tried_again(folders: Folders) -> None:
    code = (
        "import sys, sparsify\nsys.modules['transformers.quantizers.quantizer_gguf'] = None\n"
        "sys.modules['transformers.quantizers.quantizer_awq'] = None\n"
        "try: import transformers.quantizers.auto\nexcept ImportError: print('failed')\n"
        "del sys.modules['transformers.quantizers.quantizer_awq']\n"
        "sys.modules.pop('transformers.quantizers.quantizer_gguf')\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\nprint('sparsify' in AUTO_QUANTIZER_MAPPING)"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "failed\nTrue\n"), result.stderr


def test_registration_is_idempotent(caplog: pytest.LogCaptureFixture) -> None:
    before = auto.AUTO_QUANTIZER_MAPPING["sparsify"]
    types = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    with caplog.at_level(logging.DEBUG):
        importlib.reload(sparsify)
        hooks.register_with_transformers()
        transformers_quantizer.register()
    assert auto.AUTO_QUANTIZER_MAPPING["sparsify"] is before is SparsifyQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["sparsify"] is SparsifyConfig
    assert types == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert not caplog.records


def test_other_models_are_not_touched(folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("llama")
    model = opened(plain)
    assert getattr(model, "hf_quantizer", None) is None
    model.save_pretrained(tmp_path / "plain")
    same(opened(tmp_path / "plain"), model)
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(packed))
    assert kinds(empty) == {"Linear"}
