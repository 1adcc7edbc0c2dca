"""Sets what libraries read on import, and has them imported where tests run: not by the process that only hands them out."""

import os
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="m2m-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # on a card, products in float32 are as exact as on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pico models need no more, and tests run side by side


def pytest_configure(config: pytest.Config) -> None:
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out or os.environ.get("M2M_TEST_DEVICE", "cpu") != "cpu":  # which must be there
        config.pluginmanager.import_plugin("pico_fixtures")
