"""The ledger: every claim that is checked, in the paper's order."""

from proofs_checks.algorithm1 import ALGORITHM1_CLAIMS
from proofs_checks.arithmetic import ARITHMETIC_CLAIMS
from proofs_checks.corrected import CORRECTED_CLAIMS
from proofs_checks.cost import COST_CLAIMS
from proofs_checks.disparity import DISPARITY_CLAIMS
from proofs_checks.dynamics import DYNAMICS_CLAIMS
from proofs_checks.empirical import EMPIRICAL_CLAIMS, THM1_GAMMA
from proofs_checks.fig4 import FIG4_CLAIMS
from proofs_checks.flatness import FLATNESS_CLAIMS
from proofs_checks.gains import GAINS_CLAIMS
from proofs_checks.method import METHOD_CLAIMS
from proofs_checks.radius import RADIUS_CLAIMS
from proofs_checks.released_code import RELEASED_CODE_CLAIMS
from proofs_checks.significance import SIGNIFICANCE_CLAIMS
from proofs_checks.theorem1 import THEOREM1_CLAIMS
from proofs_checks.theorem1_descent import THEOREM1_DESCENT_CLAIMS
from proofs_checks.theorem1_steps import THEOREM1_STEP_CLAIMS
from proofs_checks.theorem1_sums import THEOREM1_SUM_CLAIMS
from proofs_checks.theorem1_turning import THEOREM1_TURNING_CLAIMS
from proofs_checks.theorem1_variants import THEOREM1_VARIANT_CLAIMS
from proofs_checks.theorem2 import THEOREM2_CLAIMS
from proofs_checks.theorem3 import THEOREM3_CLAIMS
from proofs_checks.toy import TOY_CLAIMS
from proofs_checks.weights import WEIGHTS_CLAIMS
from proofs_checks.where_differs import WHERE_CLAIMS

CLAIMS = (
    *METHOD_CLAIMS,
    *WEIGHTS_CLAIMS,
    *ALGORITHM1_CLAIMS,
    *THEOREM1_CLAIMS,
    *THEOREM1_VARIANT_CLAIMS,
    *THEOREM1_STEP_CLAIMS,
    *THEOREM1_DESCENT_CLAIMS,
    *THEOREM1_TURNING_CLAIMS,
    *THEOREM1_SUM_CLAIMS,
    THM1_GAMMA,
    *CORRECTED_CLAIMS,
    *DYNAMICS_CLAIMS,
    *THEOREM2_CLAIMS,
    *THEOREM3_CLAIMS,
    *TOY_CLAIMS,
    *RADIUS_CLAIMS,
    *DISPARITY_CLAIMS,
    *EMPIRICAL_CLAIMS,
    *FIG4_CLAIMS,
    *FLATNESS_CLAIMS,
    *COST_CLAIMS,
    *GAINS_CLAIMS,
    *WHERE_CLAIMS,
    *ARITHMETIC_CLAIMS,
    *SIGNIFICANCE_CLAIMS,
    *RELEASED_CODE_CLAIMS,
)
