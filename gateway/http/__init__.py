"""What clients touch. Handlers decode into a `gateway.runs.requests.RunRequest` and encode its result; no more.

=================================  =====================================================================
`access`                           who may call which address
`bodies`, `dataframes`             the bodies as they are decoded
`requests`                         from a body to a `RunRequest`
`serving`                          what every request for a run goes through
`answers`, `chunks`, `streaming`   a run's answer, whole or as it comes
`errors`                           every error, in the form that the address' clients know
`invocations`, `batches`           MLflow's and the cloud runtimes' address
`openai`, `sessions`, `probes`     the other addresses
`openapi`, `reference`             what describes them, from `operations`, `accepted`, `answered` and
                                   `examples`
=================================  =====================================================================
"""
