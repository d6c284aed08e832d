"""The HTTP server: accepts submissions, reports on jobs, serves admin pages and the playground. Imports no torch."""
