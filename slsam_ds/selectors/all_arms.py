"""All layers, in every step."""

from slsam_ds.bandit import FixedCount


class AllArms(FixedCount):
    """Every arm, at every step."""

    kind = "all"

    def __init__(self, num_arms: int) -> None:
        super().__init__(num_arms, num_arms)

    def sample(self, step: int) -> tuple[int, ...]:
        return tuple(range(self.num_arms))
