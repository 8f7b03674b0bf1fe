"""Other batchers, each a server process of its own before the same engine as Chorus has. Packages: extra `bench`.

Settings of the engine come from the environment, as for Chorus. Command line: address, `--rows`, `--wait-ms`.
"""
