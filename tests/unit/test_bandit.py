"""The bandit: exact marginals, exact k, learning that follows the equations, and state that survives a round trip."""

import json
import math
import random
from collections.abc import Callable

import pytest
import torch

from slsam_ds.bandit import Exp3M
from slsam_ds.config import SLSAMConfig
from slsam_ds.selectors import AllArms, Cyclic, Selector, TopK, Uniform, make_selector

SHAPES = [(1, 1), (2, 1), (2, 2), (8, 1), (8, 3), (8, 7), (8, 8), (32, 6)]
EVERY_KIND: list[Callable[[], Selector]] = [
    lambda: Exp3M(7, 3, seed=5),
    lambda: Uniform(7, 3, seed=5),
    lambda: Cyclic(7, 3),
    lambda: AllArms(7),
    lambda: TopK(7, 3),
]


def with_log_weights(bandit: Exp3M, log_weights: list[float]) -> Exp3M:
    bandit.load_state_dict({**bandit.state_dict(), "log_weights": log_weights})
    return bandit


def skewed() -> Exp3M:
    """Arm 5 is capped, arm 2 nearly, the rest fall off down to the exploration floor."""
    return with_log_weights(Exp3M(8, 3, 0.1, seed=3), [-2.0, -2.5, -0.9, -9.0, -3.0, 4.0, -1.7, -40.0])


def play(bandit: Selector, reward: Callable[[int, int], float], steps: range) -> float:
    """Run the bandit; returns the reward collected."""
    collected = 0.0
    for step in steps:
        active = bandit.sample(step)
        rewards = [reward(arm, step) for arm in active]
        bandit.update(active, rewards)
        collected += sum(rewards)
    return collected


def bernoulli(means: list[float], seed: int) -> Callable[[int, int], float]:
    """Rewards drawn independently of the bandit: the same (arm, step) always gives the same reward."""
    return lambda arm, step: float(random.Random(f"{seed} {arm} {step}").random() < means[arm])


# Probabilities


@pytest.mark.parametrize(("num_arms", "k"), SHAPES)
@pytest.mark.parametrize("gamma", [1e-12, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e5])
def test_probabilities_are_inclusion_probabilities(num_arms: int, k: int, gamma: float, spread: float) -> None:
    noise = random.Random(0)
    bandit = with_log_weights(Exp3M(num_arms, k, gamma), [spread * (noise.random() - 1) for _ in range(num_arms)])
    probabilities = bandit.probabilities()
    assert probabilities.shape == (num_arms,)
    assert probabilities.dtype == torch.float64
    assert probabilities.max() <= 1
    assert probabilities.min() >= k * gamma / num_arms * (1 - 1e-12)  # the exploration floor, up to rounding
    assert abs(probabilities.sum().item() - k) < 1e-12 * num_arms  # a few ulps per arm


def test_uncapped_probabilities_are_the_equation() -> None:
    log_weights = [0.0, -0.3, -0.5, -1.0, -0.2]
    bandit = with_log_weights(Exp3M(5, 2, 0.3), log_weights)
    weights = [math.exp(x) for x in log_weights]
    expected = [2 * (0.7 * w / sum(weights) + 0.3 / 5) for w in weights]
    assert max(expected) < 1
    assert bandit.probabilities().tolist() == pytest.approx(expected, rel=1e-14)


def test_capped_probabilities_solve_the_papers_threshold_equation() -> None:
    """Find α by bisection of α / Σ w' = (1/k - γ/L) / (1-γ), w' = min(w, α), and compare with the closed form."""
    num_arms, k, gamma = 8, 4, 0.05
    log_weights = [0.0, 1.5, -3.0, 0.1, -2.0, -1.0, 3.0, -0.7]
    weights = [math.exp(x) for x in log_weights]
    target = (1 / k - gamma / num_arms) / (1 - gamma)
    low, high = 0.0, max(weights)
    for _ in range(200):
        alpha = (low + high) / 2
        if alpha / sum(min(w, alpha) for w in weights) < target:
            low = alpha
        else:
            high = alpha
    capped = [min(w, alpha) for w in weights]
    expected = [k * ((1 - gamma) * w / sum(capped) + gamma / num_arms) for w in capped]
    assert sum(w > alpha for w in weights) == 2  # the case is worth something: two arms at the cap
    bandit = with_log_weights(Exp3M(num_arms, k, gamma), log_weights)
    assert bandit.probabilities().tolist() == pytest.approx(expected, rel=1e-12)
    assert bandit.probabilities()[[1, 6]].tolist() == [1.0, 1.0]


def test_arms_beside_a_capped_giant_keep_their_proportions() -> None:
    """exp(-2000) is 0 in float64: the two small arms must still differ as their weights do."""
    bandit = with_log_weights(Exp3M(3, 2, 0.1), [0.0, -2000.0, -2000.0 - math.log(3)])
    capped, larger, smaller = bandit.probabilities().tolist()
    floor = 2 * 0.1 / 3
    assert capped == 1
    assert (larger - floor) / (smaller - floor) == pytest.approx(3, rel=1e-9)


# Samples


@pytest.mark.parametrize(
    ("make", "joint"), [(skewed, None), (lambda: Uniform(8, 3, seed=3), 3 * 2 / (8 * 7))], ids=["exp3m", "uniform"]
)
def test_marginals_of_samples_match_probabilities(make: Callable[[], Selector], joint: float | None) -> None:
    """Every marginal within 4.5 standard errors, and all of them together: z² sums to a chi-square-like statistic.

    Negatively correlated arms (exactly k of them) keep the sum of z² below about L on average; 30 for 7 free arms is
    beyond the 1e-4 quantile.
    """
    selector = make()
    draws = 100_000
    probabilities = selector.probabilities().tolist()
    counts, pairs = [0] * 8, 0
    for step in range(1, draws + 1):
        active = selector.sample(step)
        pairs += 0 in active and 1 in active
        for arm in active:
            counts[arm] += 1
    squares = 0.0
    for count, p in zip(counts, probabilities, strict=True):
        if p == 1:
            assert count == draws  # a capped arm is never missed
        else:
            z = (count - draws * p) / math.sqrt(draws * p * (1 - p))
            assert abs(z) < 4.5
            squares += z * z
    assert squares < 30
    assert sum(counts) == 3 * draws
    if joint is None:
        assert probabilities[5] == 1
        assert min(probabilities) == pytest.approx(3 * 0.1 / 8, rel=1e-6)
        assert pairs > 0
    else:
        assert abs(pairs - draws * joint) < 4.5 * math.sqrt(draws * joint)


def test_every_pair_of_arms_can_be_active_together() -> None:
    """Rounding in a fixed order would never take two neighbours of small probability."""
    bandit = Exp3M(10, 2, 0.1)
    pairs = {bandit.sample(step) for step in range(1, 2001)}
    assert len(pairs) == 45


@pytest.mark.parametrize(("num_arms", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["exp3m", "uniform", "cyclic", "top_k"])
def test_exactly_k_distinct_arms_ascending(num_arms: int, k: int, kind: str) -> None:
    selector = make_selector(SLSAMConfig(selector=kind, active_layers=k), num_arms)  # type: ignore[arg-type]
    noise = random.Random(1)
    for step in range(1, 300):
        active = selector.sample(step)
        assert len(active) == k
        assert list(active) == sorted(set(active))
        assert set(active) <= set(range(num_arms))
        assert all(type(arm) is int for arm in active)
        selector.observe({arm: noise.random() for arm in active})
        selector.update(active, [noise.random() for _ in active])


@pytest.mark.parametrize("gamma", [1e-300, 1e-12, 1.0])
def test_exactly_k_arms_where_rounding_errors_are_worst(gamma: float) -> None:
    noise = random.Random(2)
    for trial in range(300):
        num_arms = noise.randint(2, 60)
        k = noise.randint(1, num_arms)
        bandit = with_log_weights(Exp3M(num_arms, k, gamma), [-(10 ** noise.uniform(-17, 4)) for _ in range(num_arms)])
        for step in range(5):
            assert len(set(bandit.sample(step))) == k, trial


@pytest.mark.parametrize("make", [skewed, lambda: Uniform(8, 3, seed=3)], ids=["exp3m", "uniform"])
def test_a_sample_is_a_pure_function_of_state_seed_and_step(make: Callable[[], Selector]) -> None:
    first, second = make(), make()
    forward = {step: first.sample(step) for step in range(1, 200)}
    backward = {step: second.sample(step) for step in reversed(range(1, 200))}
    random.seed(0)  # nor does anybody else's generator matter
    assert forward == backward == {step: first.sample(step) for step in range(1, 200)}
    assert len(set(forward.values())) > 10
    other = Exp3M(8, 3, seed=4) if isinstance(first, Exp3M) else Uniform(8, 3, seed=4)
    if isinstance(first, Exp3M):
        other.load_state_dict(first.state_dict())
    assert sum(other.sample(step) == sample for step, sample in forward.items()) < 150


def test_samples_stay_the_same_across_releases() -> None:
    """A resumed run must continue as it would have: a change here breaks people's checkpoints."""
    assert [skewed().sample(step) for step in range(1, 5)] == [(1, 4, 5), (2, 5, 6), (0, 2, 5), (0, 2, 5)]
    assert [Uniform(8, 3, seed=3).sample(step) for step in range(1, 5)] == [(0, 1, 2), (1, 3, 4), (0, 3, 7), (0, 6, 7)]


# Updates


def test_an_update_is_the_equation() -> None:
    num_arms, k, gamma, share = 5, 2, 0.3, 0.01
    log_weights = [0.0, -0.3, -0.5, -1.0, -0.2]
    bandit = with_log_weights(Exp3M(num_arms, k, gamma, share=share), log_weights)
    p = bandit.probabilities().tolist()
    bandit.update((3, 1), [0.9, 0.4])  # rewards come in the order of `active`, whatever it is
    old = [math.exp(x) for x in log_weights]
    new = [w + math.e * share / num_arms * sum(old) for w in old]
    for arm, reward in ((3, 0.9), (1, 0.4)):
        new[arm] += old[arm] * (math.exp(k * gamma * reward / p[arm] / num_arms) - 1)
    after = bandit.state_dict()["log_weights"]
    assert [math.exp(x - after[0]) for x in after] == pytest.approx([w / new[0] for w in new], rel=1e-13)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_given_probabilities_replace_the_bandits_own(as_tensor: bool) -> None:
    """A forced sample counts as probability 1, whatever its size."""
    bandit = Exp3M(6, 2, 0.2, share=0.0)
    rewards, ones = [0.5, 1.0, 0.25], [1.0, 1.0, 1.0]
    if as_tensor:
        bandit.update((4, 0, 2), torch.tensor(rewards), torch.tensor(ones))
    else:
        bandit.update((4, 0, 2), rewards, ones)
    x = bandit.state_dict()["log_weights"]
    unit = 2 * 0.2 / 6
    assert [value - x[1] for value in x] == pytest.approx([unit, 0, 0.25 * unit, 0, 0.5 * unit, 0], abs=1e-15)


def test_capped_arms_keep_their_weight() -> None:
    bandit = with_log_weights(Exp3M(4, 2, 0.1, share=0.0), [5.0, 0.0, 0.0, 0.0])
    assert bandit.probabilities()[0] == 1
    bandit.update((0, 1), [1.0, 0.0])
    x = bandit.state_dict()["log_weights"]
    assert x[0] - x[1] == pytest.approx(5, abs=1e-12)


def test_zero_rewards_and_no_sharing_change_no_probability() -> None:
    bandit = with_log_weights(Exp3M(4, 2, 0.1, share=0.0), [0.0, -0.5, -0.25, -1.0])
    before = bandit.probabilities()
    play(bandit, lambda arm, step: 0.0, range(1, 200))
    assert torch.equal(bandit.probabilities(), before)


def test_zero_rewards_with_sharing_forget() -> None:
    bandit = with_log_weights(Exp3M(4, 2, 0.1, share=0.01), [0.0, -0.5, -0.25, -30.0])
    play(bandit, lambda arm, step: 0.0, range(1, 2000))
    assert bandit.probabilities().tolist() == pytest.approx([0.5] * 4, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.001])
def test_extreme_updates_never_leave_float64(share: float) -> None:
    """1e5 updates that add the largest step possible to one arm: the weight itself would be exp(1e5)."""
    bandit = Exp3M(4, 1, 0.1, share=share)
    floor = 1 * 0.1 / 4
    for _ in range(100_000):
        bandit.update((2,), [1.0], [floor])
    probabilities = bandit.probabilities().tolist()
    assert probabilities == pytest.approx([floor, floor, 1 - 3 * floor, floor], abs=2e-3)
    assert max(bandit.state_dict()["log_weights"]) == 0
    for _ in range(200_000 if share == 0 else 100):  # and the way back is open, faster where evidence is forgotten
        bandit.update((1,), [1.0], [floor])
    assert bandit.probabilities().argmax() == 1


# Learning


def test_the_bandit_concentrates_on_the_good_arms() -> None:
    means = [0.1, 0.8, 0.1, 0.1, 0.8, 0.1, 0.1, 0.1]
    bandit = Exp3M(8, 2, 0.1, seed=1)
    play(bandit, bernoulli(means, seed=1), range(1, 3001))
    p = bandit.probabilities()
    assert p[[1, 4]].sum() > 1.5  # of 2 - 6 · kγ/L = 1.85 that exploration leaves; uniform would be 0.5
    assert p[[1, 4]].min() > 0.5
    assert p[[0, 2, 3, 5, 6, 7]].max() < 0.2


def test_regret_grows_like_the_square_root_of_time() -> None:
    """Four times the steps cost about twice the regret; without learning, or exploring for ever, four times."""
    means = [0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]

    def regret(steps: int) -> float:
        total = 0.0
        for seed in range(6):
            config = SLSAMConfig(active_layers=2, gamma="auto", share=0.0, seed=seed)
            bandit = make_selector(config, 8, total_steps=steps)
            for step in range(1, steps + 1):
                active = bandit.sample(step)
                total += 1.0 - sum(means[arm] for arm in active)  # pseudo-regret: less noisy than the rewards drawn
                bandit.update(active, [bernoulli(means, seed)(arm, step) for arm in active])
        return total / 6

    short, long = regret(1500), regret(6000)
    bound = 2.63 * math.sqrt(2 * 1500 * 8 * math.log(8 / 2))
    assert 0 < short < bound
    assert long / short < 2.9


def test_sharing_follows_a_drifting_best_arm() -> None:
    """The best arm changes: with sharing the bandit turns over soon, without it the old lead has to be worked off.

    k = 1, where no cap stops a lead from growing.
    """

    def reward(arm: int, step: int) -> float:
        return float(arm == (0 if step <= 4000 else 5))

    late = {}
    for share in (0.001, 0.0):
        bandit = Exp3M(8, 1, 0.1, seed=2, share=share)
        assert play(bandit, reward, range(1, 4001)) > 2500  # both have learned the first arm
        late[share] = play(bandit, reward, range(4001, 6501))
    assert late[0.001] > 1250
    assert late[0.0] < 500


# State


@pytest.mark.parametrize("make", EVERY_KIND)
def test_state_survives_json_and_continues_identically(make: Callable[[], Selector]) -> None:
    noise = random.Random(7)

    def advance(selector: Selector, step: int, rewards: list[float]) -> tuple[tuple[int, ...], list[float]]:
        active = selector.sample(step)
        probabilities = selector.probabilities().tolist()
        selector.observe(dict(zip(active, rewards, strict=False)))
        selector.update(active, rewards[: len(active)])
        return active, probabilities

    rewards = [[noise.random() for _ in range(7)] for _ in range(400)]
    original, resumed = make(), make()
    for step in range(1, 201):
        advance(original, step, rewards[step - 1])
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    assert resumed.state_dict() == original.state_dict()
    for step in range(201, 401):
        assert advance(resumed, step, rewards[step - 1]) == advance(original, step, rewards[step - 1])


@pytest.mark.parametrize("make", EVERY_KIND)
def test_state_is_a_copy_both_ways(make: Callable[[], Selector]) -> None:
    def scribble(state: dict[str, object]) -> None:
        for value in state.values():
            if isinstance(value, list):
                value[0] = -9.0

    selector = make()
    selector.observe({0: 1.0, 1: 2.0})
    state = selector.state_dict()
    saved = json.dumps(state)
    scribble(selector.state_dict())
    assert json.dumps(selector.state_dict()) == saved
    active = selector.sample(1)
    selector.observe(dict.fromkeys(active, 3.0))
    selector.update(active, [1.0] * len(active))
    assert json.dumps(state) == saved
    selector.load_state_dict(state)
    scribble(state)
    assert json.dumps(selector.state_dict()) == saved


@pytest.mark.parametrize(
    ("saved", "difference"),
    [
        (Uniform(8, 3), "the selector is 'uniform' in the saved state and 'exp3m' here"),
        (Exp3M(9, 3), "number of layers is 9 .* 8 here"),
        (Exp3M(8, 2), "number of active layers is 2 .* 3 here"),
    ],
)
def test_a_state_of_another_setup_is_refused(saved: Selector, difference: str) -> None:
    bandit = skewed()
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=difference):
        bandit.load_state_dict(saved.state_dict())
    assert bandit.state_dict() == before


def test_a_state_with_missing_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log_weights=.*expected 8 numbers"):
        with_log_weights(Exp3M(8, 3), [0.0] * 7)


# The simpler selectors


def test_cyclic_takes_consecutive_arms_and_visits_all_equally() -> None:
    selector = Cyclic(5, 2)
    assert [selector.sample(step) for step in range(1, 7)] == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4), (0, 1)]
    assert selector.probabilities().tolist() == [0.4] * 5


def test_uniform_ignores_rewards() -> None:
    selector = Uniform(5, 2)
    play(selector, lambda arm, step: float(arm == 0), range(1, 50))
    assert selector.probabilities().tolist() == [0.4] * 5


def test_all_arms() -> None:
    selector = AllArms(4)
    assert (selector.num_arms, selector.k) == (4, 4)
    assert selector.sample(3) == (0, 1, 2, 3)
    assert selector.probabilities().tolist() == [1.0] * 4


def test_top_k_takes_unseen_arms_first_then_the_largest_norm_last_seen() -> None:
    selector = TopK(5, 2)
    assert selector.sample(1) == (0, 1)
    selector.observe({0: 5.0, 1: 0.5})
    assert selector.sample(2) == (2, 3)
    assert selector.probabilities().tolist() == [0, 0, 1, 1, 0]
    selector.observe({2: 3.0, 3: 3.0})
    assert selector.sample(3) == (0, 4)  # arm 4 was never seen, arm 0 has the largest norm
    selector.observe({4: 1e9, 0: 0.1})
    assert selector.sample(4) == (2, 4)  # arm 0's new norm replaces the old; of 2 and 3 the lower index
    selector.update((2, 4), [0.0, 0.0])  # rewards are not norms
    assert selector.sample(5) == (2, 4)
    assert selector.probabilities().sum() == 2


@pytest.mark.parametrize("norms", [{0: math.nan}, {0: math.inf}, {0: -1.0}, {5: 1.0}, {-1: 1.0}])
def test_top_k_refuses_bad_norms(norms: dict[int, float]) -> None:
    selector = TopK(5, 2)
    with pytest.raises(ValueError, match=r"norms=.*finite norms ≥ 0 of arms from 0 to 4"):
        selector.observe(norms)


# Construction and refusals


@pytest.mark.parametrize(
    ("name", "kind", "k"),
    [("exp3m", Exp3M, 2), ("uniform", Uniform, 2), ("cyclic", Cyclic, 2), ("top_k", TopK, 2), ("all", AllArms, 10)],
)
def test_make_selector(name: str, kind: type, k: int) -> None:
    selector = make_selector(SLSAMConfig(selector=name), 10)  # type: ignore[arg-type]
    assert type(selector) is kind
    assert (selector.num_arms, selector.k) == (10, k)
    assert selector.state_dict()["kind"] == name


def test_make_selector_passes_the_knobs_on() -> None:
    bandit = make_selector(SLSAMConfig(gamma=0.25, share=0.02, seed=9), 10)
    assert isinstance(bandit, Exp3M)
    assert (bandit.gamma, bandit.share, bandit.seed) == (0.25, 0.02, 9)
    uniform = make_selector(SLSAMConfig(selector="uniform", seed=9), 10)
    assert uniform.sample(1) == Uniform(10, 2, seed=9).sample(1)


def test_gamma_auto() -> None:
    def gamma(num_arms: int, k: int, total_steps: int) -> float:
        config = SLSAMConfig(gamma="auto", active_layers=k)
        bandit = make_selector(config, num_arms, total_steps=total_steps)
        assert isinstance(bandit, Exp3M)
        return bandit.gamma

    assert gamma(12, 3, 1000) == pytest.approx(math.sqrt(12 * math.log(4) / ((math.e - 1) * 3 * 1000)))
    assert gamma(12, 3, 1) == 1.0
    assert 0 < gamma(12, 12, 1000) <= 1  # ln(L/k) = 0, which no bandit accepts


@pytest.mark.parametrize("total_steps", [None, 0, -5])
def test_gamma_auto_needs_the_length_of_the_run(total_steps: int | None) -> None:
    with pytest.raises(ValueError, match=rf'gamma="auto" with total_steps={total_steps}: .*choose gamma in \(0, 1\]'):
        make_selector(SLSAMConfig(gamma="auto"), 10, total_steps=total_steps)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Exp3M(0, 1), "num_arms=0: .*at least 1"),
        (lambda: Uniform(-2, 1), "num_arms=-2: .*at least 1"),
        (lambda: AllArms(0), "num_arms=0: .*at least 1"),
        (lambda: Exp3M(4, 0), "k=0: choose from 1 to num_arms=4"),
        (lambda: TopK(4, 5), "k=5: choose from 1 to num_arms=4"),
        (lambda: Exp3M(4, 2, 0.0), r"gamma=0.0: .*\(0, 1\]"),
        (lambda: Exp3M(4, 2, 1.5), r"gamma=1.5: .*\(0, 1\]"),
        (lambda: Exp3M(4, 2, math.nan), r"gamma=nan: .*\(0, 1\]"),
        (lambda: Exp3M(4, 2, share=-0.1), r"share=-0.1: .*\[0, 1\)"),
        (lambda: Exp3M(4, 2, share=1.0), r"share=1.0: .*\[0, 1\)"),
        (lambda: Exp3M(4, 2, share=math.nan), r"share=nan: .*\[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Selector], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("active", "rewards", "probabilities", "sentence"),
    [
        ((0, 1), [0.5, math.nan], None, r"rewards=\[0.5, nan\]: give finite numbers in \[0, 1\]"),
        ((0, 1), [0.5, math.inf], None, r"rewards=\[0.5, inf\]: give finite"),
        ((0, 1), [-0.1, 0.5], None, r"rewards=\[-0.1, 0.5\]: give finite"),
        ((0, 1), [1.1, 0.5], None, r"rewards=\[1.1, 0.5\]: give finite"),
        ((0, 1), [0.5], None, r"rewards=\[0.5\]: expected 2 numbers"),
        ((0, 1), torch.ones(3), None, r"rewards=.*: expected 2 numbers"),
        ((0, 0), [0.5, 0.5], None, r"active=\[0, 0\]: give distinct arms from 0 to 3"),
        ((0, 4), [0.5, 0.5], None, r"active=\[0, 4\]: give distinct arms from 0 to 3"),
        ((-1, 2), [0.5, 0.5], None, r"active=\[-1, 2\]: give distinct arms from 0 to 3"),
        ((0, 1), [0.5, 0.5], [1.0], r"probabilities=\[1.0\]: expected 2 numbers"),
        ((0, 1), [0.5, 0.5], [0.0, 1.0], r"probabilities=\[0.0, 1.0\]: give numbers in \(0, 1\]"),
        ((0, 1), [0.5, 0.5], [1.0, 1.5], r"probabilities=\[1.0, 1.5\]: give numbers in \(0, 1\]"),
        ((0, 1), [0.5, 0.5], [1.0, math.nan], r"probabilities=\[1.0, nan\]: give numbers in \(0, 1\]"),
    ],
)
def test_bad_updates_are_refused_and_change_nothing(active, rewards, probabilities, sentence) -> None:
    bandit = Exp3M(4, 2)
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=sentence):
        bandit.update(active, rewards, probabilities)
    assert bandit.state_dict() == before
