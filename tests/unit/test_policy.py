"""Who is perturbed and who is updated, given a sample."""

import json

import pytest

from slsam_ds.config import SLSAMConfig
from slsam_ds.plan import Choice
from slsam_ds.policy import Policy
from slsam_ds.rewards import RewardScale
from slsam_ds.selectors import make_selector

NUM_ARMS = 6
ALL = tuple(range(NUM_ARMS))


def make(norm_layers: tuple[int, ...] = (), **knobs: object) -> Policy:
    config = SLSAMConfig(**knobs)  # type: ignore[arg-type]
    return Policy(
        make_selector(config, NUM_ARMS),
        RewardScale("grad_norm", [10] * NUM_ARMS),
        perturb=config.perturb,
        update=config.update,
        norm_layers=norm_layers,
        redraw_every=config.redraw_every,
    )


def chosen(policy: Policy, num_steps: int = 30) -> list[Choice]:
    return [policy.choose(step) for step in range(1, num_steps + 1)]


def test_a_sample_is_perturbed_and_updated() -> None:
    for choice in chosen(make(active_layers=2)):
        assert choice.perturbed == choice.updated == choice.sampled
        assert choice.probability == {arm: choice.probabilities[arm] for arm in choice.sampled}


def test_above_is_everything_from_the_lowest_arm() -> None:
    for choice in chosen(make(active_layers=2, perturb="above", update="above", update_scale="none")):
        assert choice.perturbed == choice.updated == ALL[choice.sampled[0] :]
        assert len(choice.sampled) == 2


def test_a_few_may_be_perturbed_and_all_updated() -> None:
    for choice in chosen(make(active_layers=2, update="all")):
        assert choice.perturbed == choice.sampled
        assert choice.updated == ALL
        assert choice.probability == dict.fromkeys(ALL, 1.0)
    for choice in chosen(make(active_layers=2, perturb="all")):
        assert choice.updated == choice.sampled
        assert choice.perturbed == ALL


@pytest.mark.parametrize("selector", ["exp3m", "top_k", "bernoulli", "depth"])
def test_a_sample_stays_for_as_long_as_it_is_told(selector: str) -> None:
    """Its probabilities too, though the selector learns; and a resumed run goes on with both."""
    policy = make(selector=selector, active_layers=2, redraw_every=3, gamma=0.5)
    choices = []
    for step in range(1, 31):
        choice = policy.choose(step)
        assert policy.choose(step) == choice
        norms = {arm: float(arm + 1) for arm in ALL}
        policy.learn(choice, norms, {})
        choices.append(choice)
        other = make(selector=selector, active_layers=2, redraw_every=3, gamma=0.5)
        other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
        assert other.choose(step + 1) == policy.choose(step + 1)
    for start in range(0, 30, 3):
        assert choices[start] == choices[start + 1] == choices[start + 2]
    assert len({choice.sampled for choice in choices}) > 1
    assert "held" not in make(selector=selector).state_dict()


def test_norm_layers_may_be_perturbed_alone() -> None:
    policy = make(norm_layers=(1, 4), selector="all", granularity="tensor", perturb="norm_layers")
    assert {choice.perturbed for choice in chosen(policy)} == {(1, 4)}
    with pytest.raises(ValueError, match="the model trains no weights of normalisation layers"):
        make(selector="all", granularity="tensor", perturb="norm_layers")


def test_the_bandit_of_the_paper_learns_from_the_gradient_at_the_weights() -> None:
    policy = make(selector="bernoulli", active_layers=0.5)
    before = policy.selector.probabilities().tolist()
    choice = next(choice for choice in chosen(policy) if len(choice.sampled) > 1)
    first, *others = choice.sampled
    ascent_norms = {arm: 0.5 if arm == first else 0.01 for arm in choice.sampled}
    policy.learn(choice, dict.fromkeys(choice.sampled, 1.0), ascent_norms)
    after = policy.selector.probabilities().tolist()
    assert after[first] > before[first]
    assert all(after[arm] < before[arm] for arm in others)


def test_without_an_ascent_it_learns_from_the_descent() -> None:
    one, other = (make(selector="bernoulli", active_layers=0.5) for _ in range(2))
    choice = one.choose(1)
    norms = {arm: 0.1 * (1 + arm) for arm in choice.sampled}
    one.learn(choice, norms, {})
    other.learn(choice, {}, norms)
    assert one.state_dict() == other.state_dict()


def test_updating_all_teaches_of_all() -> None:
    """With the norms of all arms every step, `top_k` perturbs those with the largest."""
    policy = make(selector="top_k", active_layers=2, update="all")
    policy.learn(policy.choose(1), dict(enumerate([1.0, 5.0, 2.0, 9.0, 0.5, 3.0])), {})
    assert policy.choose(2).perturbed == (1, 3)
