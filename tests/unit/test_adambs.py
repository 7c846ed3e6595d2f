"""The bandit of the SL-SAM paper follows a second implementation in numpy, and draws as likely as it says."""

import math
import random
from collections import Counter

import pytest

from slsam_ds import SLSAMConfig
from slsam_ds.selectors import AdamBS, Selector, make_selector
from tests.paper import PaperBandit

NUM_STEPS = 300


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.002, 0.03, 0.5, 20.0])
def test_probabilities_follow_the_second_implementation(scale: float, share: float) -> None:
    num_arms = 37
    bandit, other = AdamBS(num_arms, share * num_arms, seed=5), PaperBandit(num_arms, share)
    noise = random.Random(0)
    typical = [scale * math.exp(noise.gauss(0, 1)) for _ in range(num_arms)]
    spread = 0.0
    for step in range(1, NUM_STEPS + 1):
        taken = bandit.sample(step)
        norms = [typical[arm] * math.exp(0.3 * noise.gauss(0, 1)) for arm in taken]
        bandit.update(taken, norms)
        other.update(taken, norms)
        probabilities = bandit.probabilities().tolist()
        assert probabilities == pytest.approx(other.p.tolist(), abs=1e-9)
        assert all(1e-8 <= p <= 1 for p in probabilities)
        spread = max(spread, max(probabilities) - min(probabilities))
    saturated = probabilities.count(1.0)
    if scale == 20.0:  # with many arms to draw, a few have all the weight, and the others do not fill the budget
        assert (sum(probabilities) < 0.95 * share * num_arms) == (share >= 0.5)
    elif share == 1.0:
        assert saturated == num_arms
    elif scale == 0.5 and share >= 0.2:  # norms far above what the constants are made for: a few arms take all
        assert saturated > 0
        assert spread > 0.9 * (1 - share)
    elif scale == 0.002:
        assert spread < 0.1 * share


def test_every_arm_is_drawn_by_itself_as_likely_as_it_says() -> None:
    bandit = AdamBS(6, 1.8)
    bandit._probabilities = [0.05, 0.9, 0.3, 1.0, 0.1, 0.4]
    draws = [bandit.sample(step) for step in range(1, 40_001)]
    counts = Counter(arm for draw in draws for arm in draw)
    for arm, p in enumerate(bandit.probabilities().tolist()):
        assert counts[arm] / len(draws) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(draws)) + 1e-12)
    together = sum({1, 2} <= set(draw) for draw in draws) / len(draws)
    assert together == pytest.approx(0.27, abs=0.01)  # independent, unlike a fixed number of arms
    assert bandit.sample(7) == bandit.sample(7)


def test_an_empty_draw_is_drawn_again() -> None:
    bandit = AdamBS(3, 0.03)
    draws = [bandit.sample(step) for step in range(1, 201)]
    assert all(draws)
    assert {arm for draw in draws for arm in draw} == {0, 1, 2}


def test_it_goes_on_from_its_state() -> None:
    bandit = AdamBS(5, 2.0)
    bandit.update((0, 2), [0.4, 0.1])
    other = AdamBS(5, 2.0)
    other.load_state_dict(bandit.state_dict())
    assert other.probabilities().tolist() == bandit.probabilities().tolist()
    with pytest.raises(ValueError, match=r"the selector is 'bernoulli' in the saved state and 'exp3m' here"):
        make_selector(SLSAMConfig(active_layers=2), 5).load_state_dict(bandit.state_dict())


@pytest.mark.parametrize(
    ("active", "norms", "probabilities", "sentence"),
    [
        ((0, 0), [1.0, 1.0], None, "give distinct arms from 0 to 4"),
        ((7,), [1.0], None, "give distinct arms from 0 to 4"),
        ((0,), [math.nan], None, "give finite norms"),
        ((0,), [1.0], [0.0], r"give numbers in \(0, 1\]"),
        ((0,), [], None, "expected 1 numbers"),
    ],
)
def test_bad_numbers_teach_nothing(
    active: tuple[int, ...], norms: list[float], probabilities: list[float] | None, sentence: str
) -> None:
    bandit = AdamBS(5, 2.0)
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=sentence):
        bandit.update(active, norms, probabilities)
    assert bandit.state_dict() == before


def expected_size(selector: Selector) -> float:
    return math.fsum(selector.probabilities().tolist())


def test_depth_draws_a_lowest_arm_and_all_above_it() -> None:
    selector = make_selector(SLSAMConfig(selector="depth", active_layers=0.4, gamma=0.2), 10)
    assert expected_size(selector) == pytest.approx(4.0)
    draws = [selector.sample(step) for step in range(1, 3001)]
    assert all(draw == tuple(range(draw[0], 10)) for draw in draws)
    assert sum(map(len, draws)) / len(draws) == pytest.approx(4.0, abs=0.1)
    for arm, p in enumerate(selector.probabilities().tolist()):
        assert sum(arm in draw for draw in draws) / len(draws) == pytest.approx(p, abs=0.03)
    for step in range(1, 200):  # the arm with the largest gradient is the lowest one more often, at the same size
        draw = selector.sample(step)
        chances = selector.probabilities().tolist()
        selector.update(draw, [1.0 if arm == 6 else 0.1 for arm in draw], [chances[arm] for arm in draw])
    lowest = Counter(selector.sample(step)[0] for step in range(1, 1001))
    assert lowest.most_common(1)[0][0] == 6
    assert expected_size(selector) == pytest.approx(4.0)


def test_depth_is_as_near_to_its_size_as_exploration_allows() -> None:
    selector = make_selector(SLSAMConfig(selector="depth", active_layers=1), 20)
    assert 1.9 < expected_size(selector) < 2.0  # a tenth of the draws is uniform
