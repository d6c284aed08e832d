"""Webhook delivery, and the addresses that it never reaches."""
