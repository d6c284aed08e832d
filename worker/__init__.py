"""GPU work and side effects out: generation, delivery of webhooks, and the clock that puts right what was lost."""
