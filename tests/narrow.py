"""A small network that does not fit into memory with more samples at once than it has room for."""

from torch import nn


class Narrow(nn.Module):
    """``error`` is raised where the inputs are more than ``room``."""

    room = 10**6
    error: Exception = MemoryError()

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, num_classes))

    def forward(self, inputs):
        if len(inputs) > self.room:
            raise self.error
        return self.inner(inputs)
