"""A typed asynchronous client, and the command line `chorus` on top of it."""
