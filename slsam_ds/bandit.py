"""EXP3.M: the bandit that chooses which arms a step activates.

Ranks never talk here: a sample is a pure function of (state, seed, step), so equal states give equal samples. State is
plain Python float64 and `math` throughout: torch's vectorised exp and sum may round differently from one CPU to the
next, and one differing ulp would in time become a different sample. Torch only carries the results out.
"""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Numbers = Sequence[float] | Tensor


class FixedCount:
    """k of `num_arms` arms, checked; unless overridden, nothing is learned and all arms are included equally often."""

    kind: str
    rewarded_by: ClassVar[Literal["rewards", "ascent_norms"]] = "rewards"

    def __init__(self, num_arms: int, k: int) -> None:
        if num_arms < 1:
            raise ValueError(f"num_arms={num_arms}: there must be at least 1 arm to choose from")
        if not 1 <= k <= num_arms:
            raise ValueError(f"k={k}: choose from 1 to num_arms={num_arms} active arms per step")
        self.num_arms = num_arms
        self.k = k

    def probabilities(self) -> Tensor:
        return torch.full((self.num_arms,), self.k / self.num_arms, dtype=torch.float64)

    def observe(self, norms: Mapping[int, float]) -> None:
        pass

    def update(self, active: Sequence[int], rewards: Numbers, probabilities: Numbers | None = None) -> None:
        pass

    def use_prices(self, prices: Any) -> None:
        pass

    def _chances_of(
        self, active: Sequence[int], marginals: Sequence[float], probabilities: Numbers | None
    ) -> list[float]:
        """How likely each active arm was to be active: as told, else by these probabilities of all arms."""
        if len(set(active)) != len(active) or not all(0 <= arm < self.num_arms for arm in active):
            raise ValueError(f"active={list(active)}: give distinct arms from 0 to {self.num_arms - 1}")
        if probabilities is None:
            return [marginals[arm] for arm in active]
        chances = checked_numbers("probabilities", probabilities, active)
        if not all(0 < chance <= 1 for chance in chances):
            raise ValueError(f"probabilities={chances}: give numbers in (0, 1]")
        return chances

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "num_arms": self.num_arms, "k": self.k}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        titles = {"kind": "the selector", "num_arms": "the number of layers", "k": "the number of active layers"}
        for key, expected in FixedCount.state_dict(self).items():
            if state.get(key) != expected:
                raise ValueError(
                    f"{titles[key]} is {state.get(key)!r} in the saved state and {expected!r} here: "
                    "resume with the settings of the saved run"
                )


class Exp3M(FixedCount):
    """EXP3.M: an adversarial bandit that plays k arms at once, with EXP3.S sharing to follow a drifting target.

    Args:
        num_arms: Number of arms L.
        k: Arms per step, from 1 to L.
        gamma: Exploration in (0, 1]: every arm keeps inclusion probability ≥ k·gamma/L.
        seed: Seed of the samples.
        share: Part α in [0, 1) of the total weight spread over all arms at each update.

    Raises:
        ValueError: An argument outside its range, in one sentence.

    Reference: Uchiya, Nakamura, Kudo 2010, algorithm EXP3.M; Auer et al. 2002, algorithm EXP3.S (sharing).
    """

    kind = "exp3m"

    def __init__(self, num_arms: int, k: int, gamma: float = 0.1, seed: int = 0, *, share: float = 0.001) -> None:
        super().__init__(num_arms, k)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma={gamma}: choose exploration in (0, 1]")
        if not 0 <= share < 1:
            raise ValueError(f"share={share}: choose sharing in [0, 1)")
        self.gamma = gamma
        self.seed = seed
        self.share = share
        self._log_weights = [0.0] * num_arms

    def probabilities(self) -> Tensor:
        """p_i = k[(1-γ) w'_i/Σw' + γ/L], where w' caps the weights so that p_i ≤ 1. Shape (L,), float64, sum k."""
        return torch.tensor(self._marginals()[0], dtype=torch.float64)

    def sample(self, step: int) -> tuple[int, ...]:
        return dependent_rounding(self._marginals()[0], counter_generator(self.seed, step))

    def update(self, active: Sequence[int], rewards: Numbers, probabilities: Numbers | None = None) -> None:
        """w_i ← w_i exp(kγ r̂_i/L) + (eα/L) Σ_j w_j, with r̂_i = r_i/p_i for active arms below the cap and 0 elsewhere.

        Raises:
            ValueError: Arms, rewards or probabilities outside their ranges, in one sentence; nothing was learned.
        """
        marginals, capped = self._marginals()
        chances = self._chances_of(active, marginals, probabilities)
        gains = checked_numbers("rewards", rewards, active)
        if not all(0 <= gain <= 1 for gain in gains):
            raise ValueError(f"rewards={gains}: give finite numbers in [0, 1]")

        log_weights = list(self._log_weights)
        for arm, gain, chance in zip(active, gains, chances, strict=True):
            if arm not in capped:
                log_weights[arm] += self.k * self.gamma * gain / chance / self.num_arms
        if self.share > 0:
            log_total = _log_suffix_sums(sorted(self._log_weights, reverse=True))[0]
            log_shared = 1 + math.log(self.share) - math.log(self.num_arms) + log_total
            log_weights = [_log_add(log_weight, log_shared) for log_weight in log_weights]
        # Only ratios of weights matter. With the largest at log 0 and at most 1 gained per step (p_i ≥ kγ/L), a million
        # steps stay far inside float64; the weights themselves would overflow after some hundreds.
        highest = max(log_weights)
        self._log_weights = [log_weight - highest for log_weight in log_weights]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "log_weights": list(self._log_weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._log_weights = checked_numbers("log_weights", state["log_weights"], range(self.num_arms))

    def _marginals(self) -> tuple[list[float], frozenset[int]]:
        """Inclusion probabilities of all arms, and the arms held at 1 by the cap."""
        return capped_marginals(self._log_weights, self.k, self.gamma)


def counter_generator(seed: int, step: int, purpose: str = "selection") -> random.Random:
    """A fresh generator keyed by (seed, step): no state to save, to broadcast or to leave out of step."""
    key = hashlib.blake2b(f"slsam {purpose} {seed} {step}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(key, "big"))


def capped_marginals(log_weights: Sequence[float], k: int, gamma: float) -> tuple[list[float], frozenset[int]]:
    """Inclusion probabilities that sum to k, and the arms that the cap holds at 1.

    Every arm gets kγ/L; the rest of k is handed out in proportion to the weights, and no arm takes more than up to 1.
    That is the paper's threshold α, solved exactly: going down from the heaviest arm, an arm is capped as long as its
    part of what is left would fill the room it has, 1 - kγ/L.

    Reference: Uchiya, Nakamura, Kudo 2010, algorithm EXP3.M.
    """
    num_arms = len(log_weights)
    if k == num_arms:
        return [1.0] * num_arms, frozenset(range(num_arms))
    base = k * gamma / num_arms
    room = 1 - base
    order = sorted(range(num_arms), key=log_weights.__getitem__, reverse=True)
    # Sums over the arms not yet capped, in logs: next to a capped giant they would underflow to 0.
    log_sums = _log_suffix_sums([log_weights[arm] for arm in order])
    for num_capped, arm in enumerate(order):
        left = max(0.0, k * (1 - gamma) - num_capped * room)
        if num_capped == k or left * math.exp(log_weights[arm] - log_sums[num_capped]) < room:
            break
    marginals = [1.0] * num_arms
    for arm in order[num_capped:]:
        marginals[arm] = base + left * math.exp(log_weights[arm] - log_sums[num_capped])
    return marginals, frozenset(order[:num_capped])


def shuffled(num_arms: int, generator: random.Random) -> list[int]:
    # Python promises the sequence of random() across its versions, not that of shuffle() and sample().
    keys = [generator.random() for _ in range(num_arms)]
    return sorted(range(num_arms), key=keys.__getitem__)


def dependent_rounding(marginals: Sequence[float], generator: random.Random) -> tuple[int, ...]:
    """Round probabilities that sum to a whole number k to exactly k arms, keeping every marginal.

    One undecided arm is carried along; each newcomer meets it, and one of the two is decided so that neither's
    expectation changes: rejected where their total fits into one arm, chosen where it does not. The walk decides one
    arm per step, whatever rounding errors do, and the last undecided arm (0 or 1 up to rounding) fills the count.

    Reference: Gandhi, Khuller, Parthasarathy, Srinivasan 2006 (DepRound).
    """
    k = round(math.fsum(marginals))
    chosen: list[int] = []
    carried, mass = -1, 0.0
    # In a fixed order neighbours would almost never be chosen together.
    for arm in shuffled(len(marginals), generator):
        total, draw = mass + marginals[arm], generator.random()
        if total <= 1:
            carried = carried if draw * total < mass else arm
            mass = total
        else:
            winner = carried if draw * (2 - total) < 1 - marginals[arm] else arm
            carried = arm if winner == carried else carried
            chosen.append(winner)
            mass = total - 1
    if len(chosen) < k:
        chosen.append(carried)
    assert len(chosen) == k, f"probabilities {marginals} do not sum to {k}"
    return tuple(sorted(chosen))


def _log_suffix_sums(descending: Sequence[float]) -> list[float]:
    """log Σ_{j≥i} exp(x_j) for each i, summed from the small end."""
    sums, running = [0.0] * len(descending), -math.inf
    for index in reversed(range(len(descending))):
        running = _log_add(descending[index], running)
        sums[index] = running
    return sums


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), where at least one is finite."""
    return max(a, b) + math.log1p(math.exp(min(a, b) - max(a, b)))


def checked_numbers(name: str, values: Numbers, arms: Sequence[int]) -> list[float]:
    numbers = [float(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    if len(numbers) != len(arms):
        raise ValueError(f"{name}={numbers}: expected {len(arms)} numbers, one for each of the arms {list(arms)}")
    return numbers
