"""Fingerprints, and the words for a disagreement between ranks."""

from slsam_ds.engines.agreement import describe_disagreement, fingerprint


def test_fingerprints_tell_values_apart_and_fit_int64_twice() -> None:
    prints = {fingerprint(value) for value in ([1, 2], [2, 1], "1", 1, {"a": 1.0}, {"a": 1.0000001})}
    assert len(prints) == 6
    assert all(-value >= -(2**63) and value < 2**63 for value in prints)
    assert fingerprint({"a": (1, 2)}) == fingerprint({"a": (1, 2)})


def test_a_disagreement_names_what_differs_and_who_holds_what() -> None:
    claims = [
        {"the step": 4, "the sample": (1, 2)},
        {"the step": 4, "the sample": (1, 3)},
        {"the step": 4, "the sample": (1, 2)},
    ]
    assert describe_disagreement(claims) == "the sample (ranks 0, 2: (1, 2); rank 1: (1, 3))"
