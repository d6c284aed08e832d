"""Routes: translate HTTP to and from the use cases, one module per resource."""
