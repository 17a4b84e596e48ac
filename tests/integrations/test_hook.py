import os
import subprocess
import sys

import pytest


def run(script: str) -> str:
    strict = {**os.environ, "PYTHONWARNINGS": "error::UserWarning:loftq"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=strict)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


INSTALL = "from loftq.integrations import _hook; _hook.install(); _hook.install()\n"
SHOW = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as c
print(q.get("loftq").__name__, c.get("loftq").__name__)
"""


@pytest.mark.parametrize(
    "script",
    [
        INSTALL + "import transformers.modeling_utils",
        INSTALL + "from transformers import AutoModelForCausalLM, LlamaForCausalLM",
        "import transformers.modeling_utils\n" + INSTALL,
        "import transformers.quantizers\n" + INSTALL + INSTALL,
        INSTALL + "import loftq.integrations.transformers",
        INSTALL + "from loftq.integrations.config import LoftqConfig",
        INSTALL + "from loftq.integrations.conv1d import QuantConv1D",
    ],
)
def test_registers_whichever_is_imported_first(script: str):
    assert run(script + SHOW) == "LoftqHfQuantizer LoftqConfig"


def test_installing_imports_neither_torch_nor_transformers():
    loaded = run(
        INSTALL + "import sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert loaded == "False False"


def test_a_failing_registration_leaves_transformers_usable():
    script = """
import sys, warnings
from loftq.integrations import _hook
sys.modules["loftq.integrations.transformers"] = None
_hook.install()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import LlamaForCausalLM
print(any("could not register" in str(w.message) for w in caught))
"""
    assert run(script) == "True"
