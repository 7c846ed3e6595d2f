"""Descend along the gradient at the perturbed point."""

from slsam_ds.combinations.combination import Combination


class Perturbed(Combination):
    """h as it is: SAM as published (Foret et al. 2021)."""
