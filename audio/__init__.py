"""Audio formats and their encoding. Imports nothing of the rest, so that service and gateway share it.

`formats` says what is served, `encode` encodes a speech as it comes, `background` does so off the event loop, for no
more speeches at once than `budget` allows.
"""
