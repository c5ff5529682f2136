"""The whole ledger: every verdict is the expected one, and every check has at least two mutations that flip it."""

import importlib
from collections import Counter

import pytest

from proofs_checks import CLAIMS

# each has MUTATIONS: claim id -> what is wrong -> a call without arguments that gives the Evidence of that statement
MODULES = (
    "test_method_claims",
    "test_theorem1",
    "test_theorem1_variants",
    "test_theorem1_steps",
    "test_theorem2_claims",
    "test_theorem3_claims",
    "test_corrected_claims",
    "test_weights_claims",
    "test_dynamics_claims",
    "test_empirical_claims",
    "test_arithmetic",
    "test_significance",
    "test_released_code",
    "test_fig2",
    "test_radius_claims",
    "test_disparity_claims",
    "test_fig4",
    "test_where_differs",
    "test_gains_claims",
    "test_flatness_claims",
    "test_cost_claims",
)
MUTATIONS = [
    (claim, label, mutated)
    for module in MODULES
    for claim, wrong in importlib.import_module(module).MUTATIONS.items()
    for label, mutated in wrong.items()
]
BY_ID = {claim.id: claim for claim in CLAIMS}


def test_every_claim_has_two_mutations_and_every_mutation_a_claim():
    counts = Counter(claim for claim, _, _ in MUTATIONS)
    assert {claim.id: counts[claim.id] for claim in CLAIMS if counts[claim.id] < 2} == {}
    assert set(counts) <= set(BY_ID)


@pytest.mark.parametrize(("claim", "label", "mutated"), MUTATIONS, ids=[f"{c}: {label}" for c, label, _ in MUTATIONS])
def test_a_wrong_statement_flips_the_verdict(claim, label, mutated):
    assert mutated().verdict is not BY_ID[claim].expected


@pytest.mark.parametrize("claim", [c for c in CLAIMS if not c.statistical], ids=lambda claim: claim.id)
def test_every_verdict_is_the_expected_one(claim):
    evidence = claim.check(None)
    assert claim.expects(evidence.verdict)
    assert evidence.reason
    assert evidence.data


def test_repairs_and_ids():
    assert len(BY_ID) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.repaired_by is None or claim.repaired_by in BY_ID
        assert claim.where
        assert claim.scope
