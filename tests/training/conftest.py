import pytest

from pruneutils import _torch


@pytest.fixture(params=["float32", "bfloat16"])
def auto_runs(request, monkeypatch):
    """What precision="auto" runs in: the CPU is made to be able, and not."""
    monkeypatch.setattr(_torch, "bfloat16_pays", lambda device_type: request.param == "bfloat16")
    return request.param
