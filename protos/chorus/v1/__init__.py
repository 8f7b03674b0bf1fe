"""The contract, version 1: `tts.proto`."""
