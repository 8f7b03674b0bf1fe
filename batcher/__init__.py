"""Continuous batching for engines that make sound step by step.

Plain Python: no model, no network, no clock of its own.

Read in this order: `engine` (the door to the engine), `request` (what is scheduled), `scheduler` (what happens next),
`runner` (the thread that makes it happen), `outbox` (how it reaches the reader).
"""
