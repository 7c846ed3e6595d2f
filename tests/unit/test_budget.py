"""The budgeted bandit: it pays what it may, its probabilities are exact, and it learns."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsam_ds.pricing.budget import BudgetedExp3
from slsam_ds.pricing.cost import CostModel, PriceList, Workload


def llama(num_blocks: int) -> PriceList:
    """Embedding, equal blocks and a head: a block's forward, input gradient and weight gradient cost as much each."""
    head = 0.5
    adamw = 3 * num_blocks + 3 * head
    above = [head + num_blocks, *(head + num_blocks - index - 0.3 for index in range(num_blocks)), head]
    below = [0.0, *(float(index) if index >= 2 else 0.0 for index in range(num_blocks)), float(num_blocks)]
    return CostModel(
        forward=(num_blocks + head) / adamw,
        forward_below=tuple(flops / adamw for flops in below),
        backward_above=tuple(flops / adamw for flops in above),
        weight_gradient=(0.0, *(1 / adamw for _ in range(num_blocks)), head / adamw),
    ).prices(Workload(ascent=1.0, reused=1.0))


def make(budget: float, num_blocks: int = 16, *, seed: int = 0, gamma: float = 0.1) -> BudgetedExp3:
    selector = BudgetedExp3(num_blocks + 2, budget, gamma, seed)
    selector.use_prices(llama(num_blocks))
    return selector


def taught(budget: float, favourites: tuple[int, ...] = (0, 1, 2)) -> BudgetedExp3:
    """After 300 steps in which some layers were worth more than others."""
    selector = make(budget)
    for step in range(1, 301):
        active = selector.sample(step)
        selector.update(active, [1.0 if arm in favourites else 0.1 for arm in active])
    return selector


@pytest.mark.parametrize("budget", [0.7, 0.85, 1.0, 1.2])
def test_the_expected_price_is_the_budget_before_and_after_learning(budget: float) -> None:
    for selector in (make(budget), taught(budget)):
        assert selector.expected_price() == pytest.approx(budget, abs=1e-6)


@pytest.mark.parametrize("budget", [0.7, 0.85, 1.0, 1.2])
def test_a_run_pays_it_within_three_percent(budget: float) -> None:
    selector = make(budget, seed=3)
    paid = 0.0
    for step in range(1, 201):
        active = selector.sample(step)
        paid += selector.prices.of(active) / 200
        selector.update(active, [1.0 if arm < 3 else 0.1 for arm in active])
    assert paid == pytest.approx(budget, rel=0.03)


def test_probabilities_are_those_of_the_samples() -> None:
    """Over seeds: within a run, draws follow one another evenly and are not independent."""
    selector = taught(1.0)
    probabilities = selector.probabilities().tolist()
    num_draws = 5_000
    counts: Counter[int] = Counter()
    for seed in range(num_draws):
        selector.seed = seed
        counts.update(selector.sample(7))
    for arm, probability in enumerate(probabilities):
        deviation = math.sqrt(probability * (1 - probability) / num_draws)
        assert abs(counts[arm] / num_draws - probability) <= 4.5 * deviation


def test_every_layer_keeps_a_part_and_what_is_worth_more_gets_more() -> None:
    before, after = make(1.0), taught(1.0, favourites=(5, 6))
    share = after.probabilities()
    assert float(share.min()) >= after.gamma / after.num_arms
    assert float(share[5]) > float(before.probabilities()[5])
    assert float(share[5]) > float(share[8])  # though it is the dearer one


def test_a_larger_budget_reaches_deeper() -> None:
    cheap, dear = make(0.7).probabilities(), make(1.2).probabilities()
    assert float(dear[:6].sum()) > float(cheap[:6].sum())


@pytest.mark.parametrize("budget", [0.1, 2.5])
def test_what_cannot_be_paid_is_refused_with_what_can(budget: float) -> None:
    with pytest.raises(ValueError, match=rf"^slsam\.budget={budget}: .* costs from 0\.\d\d to \d\.\d\d of AdamW's"):
        make(budget)


def test_few_layers_are_active_at_once() -> None:
    for budget in (0.7, 1.0, 1.2):
        assert make(budget).k <= 6


@settings(deadline=None, max_examples=40)
@given(
    num_blocks=st.integers(1, 24), budget=st.floats(0.6, 1.5), gamma=st.floats(0.01, 1.0), step=st.integers(1, 10**6)
)
def test_samples_are_ascending_arms_whatever_the_settings(
    num_blocks: int, budget: float, gamma: float, step: int
) -> None:
    selector = BudgetedExp3(num_blocks + 2, budget, gamma)
    try:
        selector.use_prices(llama(num_blocks))
    except ValueError:
        return
    sample = selector.sample(step)
    assert sample == tuple(sorted(set(sample)))
    assert 1 <= len(sample) <= selector.k
    assert sample[0] >= 0
    assert sample[-1] < selector.num_arms
    probabilities = selector.probabilities()
    assert float(probabilities.min()) > 0
    assert float(probabilities.max()) <= 1


def test_state_goes_on_where_it_was() -> None:
    saved = taught(1.0)
    fresh = BudgetedExp3(saved.num_arms, 1.0, saved.gamma)
    fresh.load_state_dict(saved.state_dict())  # as a checkpoint is looked at before anything is counted
    fresh.use_prices(saved.prices)
    fresh.load_state_dict(saved.state_dict())
    assert [fresh.sample(step) for step in range(301, 331)] == [saved.sample(step) for step in range(301, 331)]
    assert fresh.state_dict() == saved.state_dict()
