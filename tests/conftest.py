"""What every test shares: one hypothesis profile, few threads, and a fixed random state."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch._dynamo.config

from lrpfast.runtime import convolutions

# Workers share the cores: one thread each, else at most two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

# What is timed here, several workers at once, must not be remembered as this machine's choices.
os.environ["LRPFAST_CACHE_DIR"] = tempfile.mkdtemp(prefix="lrpfast-tests-")
atexit.register(shutil.rmtree, os.environ["LRPFAST_CACHE_DIR"], ignore_errors=True)

# Timing the kernels of a network takes seconds, and which of them wins changes no result but for rounding. Tests of the choice
# lower this again.
convolutions._WORTH_TUNING = sys.maxsize

# Where there is no GPU, Triton's kernels run in its interpreter. Triton asks when the kernels are imported, which is later.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Each example compiles a network, which takes a good part of a second: no deadline, few examples. The draws are the same in every run,
# so that a failure is a failure of the change at hand, and it is shown as found. LRPFAST_HYPOTHESIS=explore looks further, and shrinks.
hypothesis.settings.register_profile(
    "fixed",
    max_examples=10,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "explore",
    parent=hypothesis.settings.get_profile("fixed"),
    max_examples=300,
    derandomize=False,
    phases=tuple(hypothesis.Phase),
)
hypothesis.settings.load_profile(os.environ.get("LRPFAST_HYPOTHESIS", "fixed"))


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache_of_fake_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's cache of what operations do to shapes pays for large networks, and takes a quarter of the time that small ones are built
    in. So only tests of large ones have it."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled="large" in request.keywords):
        yield
