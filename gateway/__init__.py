"""The process that callers talk to.

It sees only wire messages. Read in this order: `server`, `servicer`, `pipeline` (the main path), `backends`.
"""
