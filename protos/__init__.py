"""The contract and its generated stubs."""
