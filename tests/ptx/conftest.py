import pytest
from helpers.emulated_gpu import EmulatedGpu, missing


@pytest.fixture(scope="session")
def gpu():
    """The emulated GPU of this test process."""
    if (reason := missing(None)) is not None:
        pytest.skip(reason)
    gpu = EmulatedGpu()
    yield gpu
    gpu.close()
