"""HTTP in: accepts requests, answers for jobs, serves the admin. Loads no torch."""
