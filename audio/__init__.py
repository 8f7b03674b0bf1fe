"""Audio formats and their encoding. Imports nothing of the rest, so that service and gateway share it."""
