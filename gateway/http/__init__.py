"""What clients touch. Handlers decode into a `gateway.runs.runner.RunRequest` and encode its result; no more."""
