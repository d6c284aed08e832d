"""The admin, over real HTTP and in a real browser."""
