"""A lock that a killed run left is told of; one that somebody holds is not."""

import logging
from pathlib import Path

import pytest

from slsam_ds.engines.deepspeed.operator_locks import abandoned_locks, warn_of_abandoned_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "operator").mkdir()
    return tmp_path / "operator" / "lock"


def test_an_abandoned_lock_is_named(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock.touch()
    with caplog.at_level(logging.WARNING):
        warn_of_abandoned_locks()
    assert str(lock) in caplog.text


def test_a_lock_in_use_and_no_lock_are_not(lock: Path) -> None:
    assert abandoned_locks() == []
    with lock.open("w"):
        assert abandoned_locks() == []
    assert abandoned_locks() == [lock]
