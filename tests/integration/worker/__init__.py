"""Workers on a real database, with stand-ins for the model; and whole worker processes."""
