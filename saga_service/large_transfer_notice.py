"""The notice of a large transfer: an e-mail to the tenant's owner when more than 10,000 have arrived.

No names and no addresses: the message says which transfer it was, and how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.folds.delivery import Email, Notice, Outgoing

LARGE = 10_000
"""In whole units of the transfer's currency. Exactly so much is not large."""

OWNER = "owner"
"""The contact that gets the e-mail."""

# ISO 4217: digits behind the point, where they are not two.
_NO_DIGITS = ("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV", "XAF", "XOF", "XPF")
_THREE_DIGITS = ("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND")
_DIGITS: Mapping[str, int] = {**dict.fromkeys(_NO_DIGITS, 0), **dict.fromkeys(_THREE_DIGITS, 3)}


def large_transfer(notice: Notice) -> Sequence[Outgoing]:
    """An e-mail, if a completed transfer moved more than LARGE."""
    amount_minor, currency = int(notice.data["amount_minor"]), str(notice.data["currency"])
    transfer_id = str(notice.data["transfer_id"])
    digits = _DIGITS.get(currency, 2)
    if amount_minor <= LARGE * 10**digits:
        return []
    whole, rest = divmod(amount_minor, 10**digits)
    amount = f"{whole:,}.{rest:0{digits}}" if digits else f"{whole:,}"
    return [
        Email(
            to=OWNER,
            subject=f"Large transfer: {amount} {currency}",
            text=f"A transfer of {amount} {currency} was completed.\n\nTransfer {transfer_id}\n",
            html=f"<p>A transfer of <b>{amount} {currency}</b> was completed.</p>\n<p>Transfer <code>{transfer_id}</code></p>\n",
            # One message for a transfer: no message waits for that of another.
            key=transfer_id,
        )
    ]
