"""From a run to a finished trace in the outbox, and to a state in the ledger.

In the order of the way: ``capture`` turns what happens in a run into `spans.Trace`, ``sampling`` decides which
conversations are kept and why, ``redaction`` takes out what is personal or secret, ``handover`` brings runs to Postgres
in batches. ``sweeper`` lets go of what was held in vain, ``ledger`` says what became of all runs, ``balance`` whether
they add up.

Nothing here makes a request wait: the event loop only ever appends to a list.
"""
