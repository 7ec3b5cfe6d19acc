"""The name of the column that is embedded unless another one is given."""

from typing import Final

TEXT_COLUMN: Final = "text"
