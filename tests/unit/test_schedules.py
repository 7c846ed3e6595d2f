"""Schedules that observe what steps find."""

from slsam_ds.schedules import make_schedule


def test_norms_above_the_usual_ascend_and_a_resumed_run_goes_on() -> None:
    norms = [4.0, 1.0, 1.0, 9.0, 1.0, 1.1, 0.9, 5.0, 0.1]
    schedule = make_schedule({"norm_above": 0.5})
    resumed = make_schedule({"norm_above": 0.5})
    resumed.observe(100.0)
    mean = variance = 0.0
    assert schedule.ascends(1)
    assert schedule.state_dict() is None
    for step, norm in enumerate(norms, start=2):
        schedule.observe(norm)
        mean = 0.9 * mean + 0.1 * norm
        variance = 0.9 * variance + 0.1 * (norm - mean) ** 2
        assert schedule.ascends(step) == (norm >= mean + 0.5 * variance**0.5)
        resumed.load_state_dict(schedule.state_dict())
        assert resumed.ascends(step) == schedule.ascends(step)
    assert not schedule.ascends(step)
    assert 0 < schedule.share < 0.5 == make_schedule({"norm_above": 0.0}).share
