"""Rewards are shares of a decaying maximum."""

from slsam_ds.rewards import RewardScale


def test_rewards_are_shares_of_a_maximum_that_decays() -> None:
    scale = RewardScale("grad_norm", [10, 10])
    assert scale.rewards({0: 2.0, 1: 8.0}) == {0: 0.25, 1: 1.0}
    later = scale.rewards({0: 2.0})[0]
    assert 0.25 < later < 0.26  # against a maximum a little below 8
    for _ in range(1000):
        last = scale.rewards({0: 2.0})[0]
    assert last == 1.0  # the large norm of long ago is forgotten


def test_rms_rewards_divide_by_the_number_of_weights() -> None:
    scale = RewardScale("grad_rms", [100, 400])
    assert scale.rewards({0: 1.0, 1: 1.0}) == {0: 1.0, 1: 0.5}


def test_no_gradient_at_all_gives_no_reward_and_no_nan() -> None:
    assert RewardScale("grad_norm", [10, 10]).rewards({0: 0.0, 1: 0.0}) == {0: 0.0, 1: 0.0}
