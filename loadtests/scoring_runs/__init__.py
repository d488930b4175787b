"""Measures live scoring: how soon scores are in MLflow, how many traces a second, and MLflow's own scoring beside it.

`served` runs a gateway as `gateway serve` does, `traffic` asks it at random moments, `watching` looks into MLflow's
tables for the scores; `judge_server` is the judges' model. `freshness`, `throughput` and `beside` measure with these,
`pages` shows what they found.
"""
