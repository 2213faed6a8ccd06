"""The announcements of all tenants, in one place. Each is switched by its name, like the write service's overrides.

`write_service/overrides.py` names each of them too, so that `foldline overrides` lists and switches them.
"""

from __future__ import annotations

from saga_service.large_transfer_notice import large_transfer
from saga_service.transfer import TRANSFER, TRANSFER_COMPLETED
from shared.folds.delivery import Announcements

UMBRELLA = "umbrella"

ANNOUNCEMENTS = Announcements()
ANNOUNCEMENTS.notice(UMBRELLA, "large-transfer-notice", TRANSFER.type, TRANSFER_COMPLETED, large_transfer)
