"""What holds for every test: no network, Hypothesis without a clock, and one thread of BLAS for each worker.

Profiles: `HYPOTHESIS_PROFILE=thorough` looks four times longer, `nightly` a hundred times.
"""

import gc
import os
import sys
from collections.abc import Generator

import pytest
import pytest_socket
from hypothesis import HealthCheck, settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Before numpy: workers that share processors wait for each other.

# tmp_path is shared by the examples of one test: each writes its file anew.
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("default", max_examples=60, derandomize=True, database=None, **_SHARED)
settings.register_profile("thorough", max_examples=240, derandomize=True, database=None, **_SHARED)
settings.register_profile("nightly", max_examples=6000, print_blob=True, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while tests are collected, nor later among them: all of it stays, and there is much of it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _no_network():
    pytest_socket.disable_socket(allow_unix_socket=True)
    yield
    pytest_socket.enable_socket()


@pytest.fixture(scope="session", autouse=True)
def _shared_bytecode(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have programs that tests start share what they compile, where nothing is kept beside the sources."""
    if sys.dont_write_bytecode:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.getbasetemp().parent / "bytecode")
