"""The durable record of jobs: states, tables, transitions and queries. Does not depend on torch, Celery or HTTP."""
