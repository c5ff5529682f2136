"""Per-domain curvature, sharpness and training traces, and the means to check a paper's claims with them.

domains -> losses -> operators -> spectrum; losses -> perturbations -> training -> traces; all -> claims -> report.
"""

__version__ = "0.1.0"
