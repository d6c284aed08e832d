"""The admin pages: one module per page, plus sessions, rendering and formatting."""
