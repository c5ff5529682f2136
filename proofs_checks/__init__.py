"""The ledger: every claim that is checked, in the paper's order."""

from proofs_checks.arithmetic import ARITHMETIC_CLAIMS
from proofs_checks.empirical import EMPIRICAL_CLAIMS, THM1_GAMMA
from proofs_checks.method import METHOD_CLAIMS
from proofs_checks.theorem1 import THEOREM1_CLAIMS

CLAIMS = (*METHOD_CLAIMS, *THEOREM1_CLAIMS, THM1_GAMMA, *EMPIRICAL_CLAIMS, *ARITHMETIC_CLAIMS)
