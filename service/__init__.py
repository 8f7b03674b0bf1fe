"""The process that owns an engine.

Here the wire and the batcher meet. Read in this order: `server`, `servicer`, `speech` (what is asked), `speaking` (the
main path), `engines`.
"""
