"""Every set of layers is as likely."""

from slsam_ds.bandit import FixedCount, counter_generator, shuffled


class Uniform(FixedCount):
    """Every set of k arms is equally likely (LISA's choice)."""

    kind = "uniform"

    def __init__(self, num_arms: int, k: int, seed: int = 0) -> None:
        super().__init__(num_arms, k)
        self.seed = seed

    def sample(self, step: int) -> tuple[int, ...]:
        return tuple(sorted(shuffled(self.num_arms, counter_generator(self.seed, step))[: self.k]))
