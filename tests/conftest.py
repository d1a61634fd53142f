"""Fixtures of every test: devices, seeds, and NaN in all memory that an operator must write."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch


class _TorchRandom:
    """torch's generator, so that hypothesis seeds it for every example and can replay one."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps a weak reference
hypothesis.register_random(_TORCH_RANDOM)
# The same examples in every run: a tolerance that fails must fail for everybody.
hypothesis.settings.register_profile("zebra", derandomize=True, deadline=None)
hypothesis.settings.load_profile("zebra")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The same test bodies run on the CPU everywhere and on a GPU with ``-m gpu``."""
    return request.param


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """Seed the generators; make uninitialised tensors NaN, also those that C++ allocates."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    # Several workers share a GPU, and some tests fill a good part of it.
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 4 << 30:
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A GPU run on a machine without a GPU is an error, not a silent skip."""
    if config.getoption("markexpr") == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu: torch sees no CUDA device here")
