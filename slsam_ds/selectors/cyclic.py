"""The layers in turn."""

from slsam_ds.bandit import FixedCount


class Cyclic(FixedCount):
    """The next k arms in turn: step 1 takes 0..k-1. Probabilities are the long-run shares, k/L."""

    kind = "cyclic"

    def sample(self, step: int) -> tuple[int, ...]:
        start = (step - 1) * self.k
        return tuple(sorted((start + offset) % self.num_arms for offset in range(self.k)))
