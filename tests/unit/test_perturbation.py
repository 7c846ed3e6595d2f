"""The perturbation: its scale, how it reaches weights that forward reads as bf16, its exact undoing."""

import pytest
import torch
from torch import Tensor

from slsam_ds import perturbation
from slsam_ds.perturbation import perturb_, preserved, rounding_generator, stochastic_round
from slsam_ds.radius import perturbation_scale

BF16 = torch.bfloat16


def generator(*key: int) -> torch.Generator:
    return rounding_generator(torch.device("cpu"), *key)


def scale_of(gradient: Tensor) -> Tensor:
    return perturbation_scale(gradient.double().square().sum(), rho=0.05)


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def test_the_scale_puts_the_gradient_on_the_sphere() -> None:
    gradient = normal(1000)
    assert (scale_of(gradient) * gradient).norm().item() == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_without_a_direction_nothing_moves(value: float) -> None:
    weight, gradient = normal(1000), torch.full((1000,), value)
    scale = scale_of(gradient)
    after, measured = perturbed(weight, gradient)
    assert scale == 0.0
    assert torch.equal(after, weight)
    assert measured.tolist() == [0.0, 0.0]


def test_rounding_noise_is_a_function_of_its_key() -> None:
    values = normal(1000)
    assert torch.equal(stochastic_round(values, generator(1, 2, 3)), stochastic_round(values, generator(1, 2, 3)))
    assert not torch.equal(stochastic_round(values, generator(1, 2, 3)), stochastic_round(values, generator(1, 2, 4)))


@pytest.mark.parametrize("value", [1.001, -1.001, 0.0123, -3.3e-5, 255.9, 1.9999, -0.50001])
def test_stochastic_rounding_is_exact_in_expectation(value: float) -> None:
    exact = torch.full((200_000,), value)
    error = stochastic_round(exact, generator(7)).double() - exact.double()
    spread = error.std().item() / len(exact) ** 0.5
    assert abs(error.mean().item()) <= 4 * spread  # a bias of 1 % of an ulp would be over four of these


def test_stochastic_rounding_picks_one_of_the_two_neighbours() -> None:
    exact = torch.cat([normal(50_000, std=std) for std in (1e-6, 0.02, 1.0, 300.0)])
    rounded = stochastic_round(exact, generator(3))
    assert rounded.dtype == BF16
    nearest = exact.to(BF16)
    beyond = torch.where(exact > nearest.float(), torch.inf, -torch.inf).to(BF16)
    other = torch.nextafter(nearest, beyond)
    assert ((rounded == nearest) | (rounded == other)).all()
    assert (rounded != nearest).any()


def test_stochastic_rounding_keeps_what_bf16_can_hold() -> None:
    exact = normal(10_000).to(BF16).float()
    exact[:3] = torch.tensor([0.0, -0.0, 1.0])
    assert torch.equal(stochastic_round(exact, generator(3)).float(), exact)


def perturbed(
    weight: Tensor, gradient: Tensor, *, master: Tensor | None = None, rounding: str = "stochastic", **kwargs: object
) -> tuple[Tensor, Tensor]:
    """The perturbed weight and what was measured, for rho = 0.05; `weight` itself stays."""
    scale = scale_of(gradient)
    after = weight.clone()
    master = after if master is None else master
    measured = perturb_(after, master, gradient, scale=scale, rounding=rounding, generator=generator(5), **kwargs)
    sq_epsilon = (gradient.double() * scale).masked_fill(scale == 0, 0.0).square().sum()
    assert measured[2].item() == pytest.approx(sq_epsilon.item(), rel=1e-5)
    return after, measured[:2]


def test_float32_weights_move_by_epsilon() -> None:
    weight, gradient = normal(10_000), normal(10_000, seed=1)
    after, measured = perturbed(weight, gradient)
    epsilon = gradient * scale_of(gradient)
    assert torch.equal(after, weight + epsilon)
    # Each element of the change carries the rounding error of a float32 of size 1: 1e-4 of ε, averaged out in the sum.
    assert measured[0].item() == pytest.approx(0.05**2, rel=1e-4)
    assert measured[1].item() == pytest.approx(0.05**2, rel=1e-4)


@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32])
def test_a_perturbation_far_below_an_ulp_reaches_what_forward_reads(weight_dtype: torch.dtype) -> None:
    weight, gradient = normal(2_000_000, std=0.02).to(weight_dtype), normal(2_000_000, seed=1)
    after, (along, sq_norm) = perturbed(weight, gradient, read_dtype=BF16)
    assert torch.equal(after.to(BF16).to(after.dtype), after)  # on the grid: the cast to what forward reads keeps it
    epsilon = gradient * scale_of(gradient)
    applied = after.to(BF16).double() - weight.to(BF16).double()
    assert along.item() == pytest.approx((applied * epsilon).sum().item(), rel=1e-5)
    assert sq_norm.item() == pytest.approx(applied.square().sum().item(), rel=1e-5)
    # One ulp is 300 ε here; over 2e6 elements the noise of the projection has a standard deviation below 1 %.
    assert along.item() / 0.05**2 == pytest.approx(1.0, abs=0.03)


def test_rounding_to_nearest_loses_part_of_it() -> None:
    weight, gradient = normal(2_000_000, std=0.02).to(BF16), normal(2_000_000, seed=1)
    _, (along, _) = perturbed(weight, gradient, rounding="nearest")
    assert along.item() / 0.05**2 < 0.9


@pytest.mark.parametrize("read_dtype", [None, BF16])
def test_nearest_starts_from_the_master_weight(read_dtype: torch.dtype | None) -> None:
    master, gradient = normal(10_000, std=0.02), normal(10_000, seed=1)
    epsilon = gradient * scale_of(gradient)
    weight = master.to(BF16) if read_dtype is None else master
    after, (along, _) = perturbed(weight, gradient, master=master, rounding="nearest", read_dtype=read_dtype)
    assert torch.equal(after, (master + epsilon).to(after.dtype))
    applied = after.to(BF16).double() - weight.to(BF16).double()
    assert along.item() == pytest.approx((applied * epsilon).sum().item(), rel=1e-5)


@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32])
def test_an_element_without_gradient_is_read_as_before(weight_dtype: torch.dtype) -> None:
    weight, gradient = normal(10_000, std=0.02).to(weight_dtype), normal(10_000, seed=1)
    gradient[::2] = 0.0
    after, _ = perturbed(weight, gradient, read_dtype=BF16)
    assert torch.equal(after[::2].to(BF16), weight[::2].to(BF16))


def test_pieces_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradient = normal(10_001), normal(10_001, seed=1)
    whole, measured = perturbed(weight, gradient)
    monkeypatch.setattr(perturbation, "_CHUNK_NUMEL_ON_CPU", 1000)
    in_pieces, measured_in_pieces = perturbed(weight, gradient)
    assert torch.equal(in_pieces, whole)
    assert torch.allclose(measured_in_pieces, measured, rtol=1e-5)  # float32 sums, taken in another order


def test_an_empty_shard_measures_nothing() -> None:
    after, measured = perturbed(torch.zeros(0), torch.zeros(0))
    assert after.numel() == 0
    assert measured.tolist() == [0.0, 0.0]


class PassError(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("raises", [False, True])
def test_preserved_puts_back_every_bit(dtype: torch.dtype, raises: bool) -> None:
    storage = normal(1000).to(dtype)
    storage[0] = -0.0
    parts = [storage[:300].view(30, 10), storage[300:]]  # views, as the flat buffers of sharded engines hand out
    original = storage.clone()

    def spoil() -> None:
        with preserved(parts):
            for part in parts:
                part.add_(0.1)
            if raises:
                raise PassError

    if raises:
        with pytest.raises(PassError):
            spoil()
    else:
        spoil()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(storage.view(bits), original.view(bits))
