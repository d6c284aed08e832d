"""What the API server and the GPU workers agree on, and the imaging library itself.

Imports neither `server` nor `worker`. Importing this package loads nothing heavy: torch comes with the first use of
`zcore.imaging.pipeline`.
"""
