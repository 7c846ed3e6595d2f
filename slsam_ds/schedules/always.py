"""Perturb in every step."""

from slsam_ds.schedules.schedule import Schedule


class Always(Schedule):
    """SAM as published: every step climbs."""

    def ascends(self, step: int) -> bool:
        return True
