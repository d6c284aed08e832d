"""Webhook delivery: signed requests that report ended jobs, retried by schedule."""
