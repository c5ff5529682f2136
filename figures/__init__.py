"""The paper's figures from the embedded study, in the paper's order, and four that it lacks."""

from figures.fig1_convergence import FIG1A, FIG1B
from figures.fig2_toy import FIG2
from figures.fig3_training_loss import FIG3
from figures.fig8_order import FIG8
from figures.forest import FOREST
from figures.lambda_max import LAMBDA_MAX
from figures.landscape import LANDSCAPE
from figures.rate import RATE

FIGURES = (FIG1A, FIG1B, FIG2, FIG3, FIG8, LAMBDA_MAX, LANDSCAPE, RATE, FOREST)
