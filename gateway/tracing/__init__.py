"""From a run to a finished trace in the outbox, in the order of the files' use.

``sampling`` decides which sessions are kept, ``capture`` turns the SDK's spans into `spans.Trace`, ``redaction`` takes
out what is personal or secret, ``outbox`` hands traces over to Postgres in batches, ``ledger`` names the states.

Nothing here makes a request wait: the event loop only ever appends to a list.
"""
