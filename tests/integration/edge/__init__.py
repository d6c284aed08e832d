"""The outer layer of the API: hostile bytes, slow clients and what holds for every answer."""
