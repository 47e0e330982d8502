"""A table of numbers that the engine's loops write cell by cell, and NumPy reads as a whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Table:
    """Writes to an array (L, J) of float64, C order, as fast as the loops themselves run."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values
        self._cells = values

    def put(self, layer: int, index: int, value: float) -> None:
        self._cells[layer, index] = value

    def __reduce__(self) -> tuple[type[Table], tuple[NDArray[np.float64]]]:
        # Compiled, `_cells` is a view that cannot be copied by itself.
        return Table, (self.values,)
