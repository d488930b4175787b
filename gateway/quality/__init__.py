"""Quality: what people in operations see.

``rollups``   the figures, read from the tables at the moment they are asked for; ``GET /v1/quality`` gives them as JSON
``estimates`` what all of the traffic is like, from what was scored of it: weights, intervals, and whether it is enough
``ledger``    what became of the runs, and whether it adds up: ``GET /v1/ledger``
``reading``   how they are read: all of one moment
``links``     where MLflow's UI shows a trace or a conversation
``page``      the same figures as one web page, ``GET /ops``, put together from ``sections`` and ``funnel``
``terminal``  the ledger in a terminal, ``gateway ledger``

Nothing here writes, and nothing here waits on MLflow for longer than a moment: the figures stand on Postgres alone.
"""
