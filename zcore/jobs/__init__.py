"""The durable record of jobs: states, tables, transitions and reads. Knows no torch, no Celery and no HTTP."""
