"""What every process needs: one place each for settings, errors, metrics, logs and the frame of a gRPC server."""
