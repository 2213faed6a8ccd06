"""The row by which the read service has the summary."""

from __future__ import annotations

from read_service.registry import CALLERS
from shared.folds.projection import Group
from shared.projections.summary_rpcs import SummaryRpcs
from tests.domains.peaks.peaks import PEAK, PEAKS
from upcasters import UPCASTERS

ROW = SummaryRpcs(PEAK, Group("peaks", (PEAKS,), UPCASTERS), CALLERS)
