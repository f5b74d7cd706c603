"""What a subset looks like beside its pool: numbers as one tidy table, and plots.

`diagnose` gives the numbers of one subset; `overlap` compares the subsets of several methods; `pool_map` and
`plots` draw. The quantities are those of DESIGN section 6.
"""

from clipcov_pipeline.diagnostics.overlap import overlap
from clipcov_pipeline.diagnostics.subset import diagnose
from clipcov_pipeline.diagnostics.tables import SCHEMA

__all__ = ["SCHEMA", "diagnose", "overlap"]
