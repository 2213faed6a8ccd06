"""The announcements of all tenants, in one place. Each line can be switched off by its name (FOLDLINE_OVERRIDES_OFF)."""

from __future__ import annotations

from saga_service.large_transfer_notice import large_transfer
from saga_service.transfer import TRANSFER, TRANSFER_COMPLETED
from shared.folds.delivery import Announcements

UMBRELLA = "umbrella"

ANNOUNCEMENTS = Announcements()
ANNOUNCEMENTS.notice(UMBRELLA, "large-transfer-notice", TRANSFER.type, TRANSFER_COMPLETED, large_transfer)
