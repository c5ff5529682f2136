"""The paper's figures from the embedded study, in the paper's order, and those that it lacks."""

from figures.directions import DIRECTIONS, VARIANCES
from figures.fig1_convergence import FIG1A, FIG1B
from figures.fig2_toy import FIG2
from figures.fig3_training_loss import FIG3
from figures.fig3cd_largest_rho import FIG3CD
from figures.fig4_open_classes import FIG4
from figures.fig5_sensitivity import FIG5
from figures.fig6ab_unseen_flatness import FIG6AB
from figures.fig6c_step_cost import FIG6C
from figures.fig7_disparity import FIG7
from figures.fig8_order import FIG8
from figures.forest import FOREST
from figures.gains import GAINS
from figures.lambda_max import LAMBDA_MAX
from figures.landscape import LANDSCAPE
from figures.rate import RATE
from figures.turning import TURNING
from figures.where_differs import WHERE_DIFFERS

FIGURES = (
    FIG1A,
    FIG1B,
    FIG2,
    FIG3,
    FIG3CD,
    FIG4,
    FIG5,
    FIG6AB,
    FIG6C,
    FIG7,
    FIG8,
    LAMBDA_MAX,
    LANDSCAPE,
    RATE,
    FOREST,
    GAINS,
    DIRECTIONS,
    VARIANCES,
    TURNING,
    WHERE_DIFFERS,
)
