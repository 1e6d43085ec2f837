"""The same for every test: one torch thread a process, no network, nothing that depends on the clock or on an earlier run.

The environment is set before torch, transformers and datasets are imported; subprocesses that tests start inherit it.
"""

import atexit
import os
import shutil
import sys
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A cache of its own: a result cached by an older version of the code must not answer for the present one.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="p3o-datasets-")

import hypothesis
import pytest
import torch
from running import p3o  # noqa: F401  (a fixture)
from saved_models import policy_folder, reward_folder  # noqa: F401  (fixtures)

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)

# The same examples every time, however slow the machine.
hypothesis.settings.register_profile("p3o", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("p3o")


@pytest.fixture(autouse=True)
def forget_what_a_test_wrote_and_imported():
    """Tests write modules of the same name: one must not be given another's."""
    yield
    for name, module in list(sys.modules.items()):
        if "pytest-of-" in str(getattr(module, "__file__", None)):
            del sys.modules[name]
