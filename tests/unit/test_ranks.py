"""What ranks ask of the process that they are in."""

from types import SimpleNamespace

import pytest
import torch

from slsam_ds.engines import ranks


def test_several_ranks_need_their_device_to_be_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun loop that moves its model to `cuda:1` and never says so elsewhere."""
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(current_device=lambda: 0))
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 2)
    for fine in ("cpu", "cuda", "cuda:0"):
        assert ranks.ProcessGroupRanks(None, torch.device(fine)).world_size == 2
    with pytest.raises(ValueError, match=r"on cuda:1, but cuda:0 is .* torch\.cuda\.set_device\(1\) before") as refused:
        ranks.ProcessGroupRanks(None, torch.device("cuda:1"))
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 1)
    ranks.ProcessGroupRanks(None, torch.device("cuda:1"))
