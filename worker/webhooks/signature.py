"""Signature headers of Standard Webhooks 1.0.0 (standardwebhooks.com, MIT)."""

import base64
import hashlib
import hmac

from zcore.keys import WEBHOOK_SECRET_PREFIX


def signature_headers(secret: str, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the three headers of a signed webhook.

    `secret` is `whsec_` followed by base64; `timestamp` is the time of this attempt in Unix seconds.
    """
    key = base64.b64decode(secret.removeprefix(WEBHOOK_SECRET_PREFIX))
    signed = f"{event_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {"webhook-id": event_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}
