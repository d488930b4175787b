"""Quality: what people in operations see.

``rollups``   the figures, read from the tables at the moment they are asked for; ``GET /v1/quality`` gives them as JSON
``links``     where MLflow's UI shows a trace or a conversation
``page``      the same figures as one web page, ``GET /ops``

Nothing here writes, and nothing here waits on MLflow for longer than a moment: the figures stand on Postgres alone.
"""
