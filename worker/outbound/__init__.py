"""HTTP requests to addresses that callers choose."""
