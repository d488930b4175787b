"""From a finished run to a row in Postgres, without making anyone wait, whatever goes away meanwhile.

``outbox`` owns the buffers and the tasks, ``preparing`` turns a run into what is stored, ``storing`` and ``settling``
are the SQL, ``spill`` is the file for when the database is away, ``tally`` counts runs apart from the rows, and
``recovery`` puts in order what a process left that died.
"""
